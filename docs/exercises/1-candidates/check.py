"""--candidates K against --json --logprobs K of the same program: the same numbers, shown as text."""
import json
import math
import re

from checking import *

make("build/exercises/nanocu")
result = run("generate", MODEL, "-p", "Paris is", "-t", "0", "-n", "2", "--candidates", "10")
need("generate knows --candidates", result.returncode == 0, "exit status 0", result.stderr.strip())

ONE = re.compile(r'("(?:[^"\\]|\\.)*") (\d+\.\d\d)%')


def parsed(line):
    """The (token, percent) pairs of a line: the new token's, then those of the likeliest."""
    pairs = [(json.loads(token), float(p)) for token, p in ONE.findall(line)]
    rebuilt = [f"{json.dumps(t, ensure_ascii=False)} {p:.2f}%" for t, p in pairs]
    return pairs if rebuilt and line == rebuilt[0] + ": " + ", ".join(rebuilt[1:]) else line


def check(what, k, *arguments):
    print(what)
    truth = generate(*arguments, "--logprobs", k)
    text = nanocu("generate", MODEL, *arguments, "--candidates", k)
    plain = nanocu("generate", MODEL, *arguments)
    expect("without the flag nothing has changed", "%" not in plain, "the text alone", plain)
    outside = 0
    for i, sample in enumerate(truth):
        head = f"--- sample {i}\n" if len(truth) > 1 else ""
        head += sample["text"] + "\n"
        if not expect(f"sample {i}: the text comes first, as before", text.startswith(head), head, text):
            return 0
        lines = text[len(head):].split("\n")
        count = len(sample["ids"])
        expect("a line for each new token", len(lines) > count, count, len(lines) - 1)
        for line, of_token in zip(lines, sample["logprobs"]):
            wanted = [(t["token"], round(100 * math.exp(t["logprob"]), 2))
                      for t in [of_token] + of_token["top"]]
            outside += of_token["id"] not in [t["id"] for t in of_token["top"]]
            came = parsed(line)
            same = (len(came) == len(wanted) and
                    all(a[0] == b[0] and abs(a[1] - b[1]) < 0.011 for a, b in zip(came, wanted)))
            if not same:
                expect(f"the line of {of_token['token']!r}", False, wanted, came)
                return 0
        print(f"  ok    {count} lines with the right tokens and probabilities")
        text = "\n".join(lines[count:])
    equal("nothing behind the last line", "", text.strip("\n"))
    return outside


check("greedy, ten candidates", 10, "-p", "The capital of France is", "-t", 0, "-n", 12)
check("to the end of the text: special tokens, newlines", 5, "-t", 0, "-n", 40, "-p",
      "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")
outside = check("a high temperature, three candidates", 3, "-p", "Once upon a time", "-t", 1.6,
                "-k", 0, "--top-p", 1, "--seed", 5, "-n", 40)
expect("(some of these tokens are not among the three)", outside > 5, "over 5", outside)
check("two samples", 2, "-p", "My name is", "-t", 1, "--seed", 3, "-n", 8, "--samples", 2)
done()
