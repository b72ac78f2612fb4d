"""--no-repeat-ngram N: at every token, what may come is worked out here from the 1,000 likeliest."""
import json

from checking import *

make("build/exercises/nanocu")
result = run("generate", MODEL, "-p", "Paris", "-t", "0", "-n", "2", "--no-repeat-ngram", "2")
need("generate knows --no-repeat-ngram", result.returncode == 0, "exit status 0",
     result.stderr.strip())

PROMPT = "A rose is a rose is a rose. A rose is a"
start = json.loads(nanocu("tokenize", MODEL, "-p", PROMPT))


def forbidden(ids, n):
    """What would end an n-gram that is in ids."""
    last = ids[len(ids) - n + 1:]
    return {ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i:i + n - 1] == last}


def repeats(ids, n):
    """The first place from the prompt's end on where an n-gram ends that was there before."""
    for i in range(len(start), len(ids)):
        if i + 1 >= n and ids[i] in forbidden(ids[:i], n):
            return f"token {i - len(start)} of {ids[len(start):]} ends a repeated {n}-gram"
    return ""


plain = generate("-p", PROMPT, "-t", 0, "-n", 40)[0]["ids"]
for n in (1, 2, 3, 5):
    sample = generate("-p", PROMPT, "-t", 0, "-n", 40, "--no-repeat-ngram", n,
                      "--logprobs", 1000)[0]
    ids, changed, wrong = list(start), 0, None
    for place, (chosen, said) in enumerate(zip(sample["ids"], sample["logprobs"])):
        likeliest = [t["id"] for t in said["top"]]
        no = forbidden(ids, n)
        best = next(id for id in likeliest if id not in no)
        if best != chosen and wrong is None:
            wrong = (place, best, chosen)
        changed += best != likeliest[0]
        ids.append(chosen)
    expect(f"n = {n}, greedy: each token is the likeliest that repeats nothing", wrong is None,
           f"id {wrong[1]} at place {wrong[0]}" if wrong else "", f"id {wrong[2]}" if wrong else "")
    expect(f"n = {n}: the rule made a difference, and --logprobs shows what it was", changed > 0,
           "at least one token is not the first of its 'top'", "all are")
    ranked = generate("-p", PROMPT, "-t", 1, "-k", 1, "--seed", 1, "-n", 40,
                      "--no-repeat-ngram", n)[0]["ids"]
    equal(f"n = {n}: top-k 1 takes the one likeliest of those that are left", sample["ids"], ranked)
    if n == 3:
        text = ",".join(map(str, ids))
        scored = json.loads(nanocu("score", MODEL, "--ids", text, "--json"))["token_logprobs"]
        equal("log-probabilities are the model's own, as score has them", scored[len(start):],
              [t["logprob"] for t in sample["logprobs"]])

for n in (2, 3):
    samples = generate("-p", PROMPT, "-t", 0.7, "--top-p", 0.9, "--seed", 11, "-n", 60,
                       "--ignore-eos", "--samples", 3, "--no-repeat-ngram", n)
    for sample in samples:
        equal(f"n = {n}, drawn, sample {sample['index']}: nothing is repeated", "",
              repeats(start + sample["ids"], n))
    expect(f"n = {n}: the samples differ", samples[0]["ids"] != samples[1]["ids"], "different ids",
           samples[0]["ids"])
equal("n = 0 is off", plain, generate("-p", PROMPT, "-t", 0, "-n", 40, "--no-repeat-ngram", 0)[0]["ids"])
equal("n longer than the text changes nothing", plain,
      generate("-p", PROMPT, "-t", 0, "-n", 40, "--no-repeat-ngram", 100)[0]["ids"])
bad = run("generate", MODEL, "-p", "x", "-n", "1", "--no-repeat-ngram", "-1")
expect("a negative n is refused with one line", bad.returncode == 1 and bad.stderr.count("\n") == 1,
       "exit status 1", f"{bad.returncode}: {bad.stderr.strip()}")
done()
