"""Mistral's sliding_window against a model in plain Python; then chunks, prefix reuse, and memory."""
import json
import random

import reference
from checking import *

FOLDER = "build/exercises/8-models/"
draw = random.Random(4)
ids = [draw.randrange(reference.V) for _ in range(150)]
text = ",".join(map(str, ids))

make("build/exercises/nanocu")
reference.make_model(FOLDER + "24", sliding_window=24)
result = run("score", FOLDER + "24", "--ids", text, "--json")
need("a config.json with sliding_window is taken", result.returncode == 0, "exit status 0",
     result.stderr.strip())


def score(window, *flags):
    return json.loads(nanocu("score", FOLDER + str(window), "--ids", text, "--json", *PLAIN,
                             *flags))["token_logprobs"][1:]


weights = reference.make_model(FOLDER + "None")
full = score(None)
exact = reference.log_probabilities(weights, ids)
expect("(without a window nanocu and Python agree)", reference.farthest(full, exact) < 1e-3,
       exact[:5], full[:5])
for window in (1, 5, 16, 17, 24, 40):
    weights = reference.make_model(FOLDER + str(window), sliding_window=window)
    exact, came = reference.log_probabilities(weights, ids, window), score(window)
    far = [i for i, (a, b) in enumerate(zip(exact, came)) if abs(a - b) > 1e-3]
    expect(f"window {window}: log-probabilities are those of attention to the last {window} tokens",
           not far, f"{exact[far[0]]:.5f} for token {far[0] + 1}" if far else "",
           f"{came[far[0]]:.5f}" if far else "")
    fast = run("score", FOLDER + str(window), "--ids", text, "--json")  # with the chapters
    if fast.returncode == 0:
        same = reference.farthest(came, json.loads(fast.stdout)["token_logprobs"][1:]) < 1e-3
    expect(f"window {window}: with the chapters the same, or refused",
           same if fast.returncode == 0 else fast.stderr.count("\n") == 1, "the same, or one line",
           fast.stderr.strip() or "other log-probabilities")
    for chunk in (1, 7, 64):
        equal(f"window {window}: in chunks of {chunk} the same to the bit", came,
              score(window, "--chunk", chunk, "--max-rows", 1))
for window in (150, 1024):
    reference.make_model(FOLDER + str(window), sliding_window=window)
    equal(f"window {window}, longer than the text: full attention, to the bit", full, score(window))
expect("another sliding_window than a size is refused",
       reference.make_model(FOLDER + "bad", sliding_window=-3) and
       run("score", FOLDER + "bad", "--ids", "1,2,3").returncode == 1, "exit status 1", "0")

# Memory: a text of any length needs blocks for its window and three more.
each = json.loads(nanocu("info", FOLDER + "24", "--json"))["kv_bytes_per_token"] * 16
start = ",".join(map(str, ids[:20]))
for window, blocks in ((24, 5), (5, 4), (40, 6)):
    long = ["--ids", start, "-n", 400, "-t", 0.8, "--seed", 3, "--ignore-eos", "--logprobs", 1]
    wanted = generate(*long, *PLAIN, model=FOLDER + str(window))[0]["logprobs"]
    few = ["--kv-memory", blocks * each]
    came = generate(*long, *PLAIN, *few, model=FOLDER + str(window))[0]["logprobs"]
    equal(f"window {window}: 400 tokens in memory for {16 * blocks}, the same to the bit", wanted, came)
    equal(f"window {window}: a prompt of 150 in the same memory", score(window), score(window, *few))
result = run("generate", FOLDER + "None", "--ids", start, "-n", "400", "--kv-memory", 5 * each)
expect("without a window 400 tokens in memory for 80 are refused", result.returncode == 1,
       "exit status 1", result.returncode)

# Many at a time, with equal beginnings, in much memory and in so little that they are preempted.
requests = []
for i in range(9):
    prompt = ids[:(20, 70, 140)[i % 3]] + ([i] if i > 5 else [])
    requests.append({"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {
        "prompt": prompt, "max_tokens": 60, "temperature": 1, "seed": 5, "logprobs": 1,
        "n": 1 + i % 2, "ignore_eos": True}})
with open(FOLDER + "in.jsonl", "w") as file:
    file.writelines(json.dumps(r) + "\n" for r in requests)


def batch(*flags):
    out = nanocu("batch", FOLDER + "24", FOLDER + "in.jsonl", "-o", "-", *PLAIN, *flags,
                 "--threads", 1)
    found = {r["custom_id"]: [n for c in r["response"]["body"]["choices"]
                              for n in c["logprobs"]["token_logprobs"]]
             for r in map(json.loads, out.splitlines())}
    return [found[str(i)] for i in range(9)]


alone = batch("--max-rows", 1, "--no-prefix-cache")
equal("(9 requests, one sample or two of 60 tokens each)", [60, 120] * 4 + [60],
      [len(r) for r in alone])
equal("one after another, with the prefix cache", alone, batch("--max-rows", 1))
equal("all together", alone, batch())
for blocks in (5, 8, 13, 20):
    equal(f"in memory for {16 * blocks} tokens", alone, batch("--kv-memory", blocks * each))
equal("in chunks of 9, little memory", alone, batch("--kv-memory", 9 * each, "--chunk", 9,
                                                    "--max-rows", 5))
done()
