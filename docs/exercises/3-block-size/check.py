"""NANOCU_BLOCK_SIZE: blocks of 8 and 64 tokens must give what blocks of 16 give, to the bit. Then the
curve: what a block's size does to memory and to prefix hits."""
import json
import os

from checking import *

QWEN = TINY + "qwen3"


def program(size):
    """16 is what it is without -D."""
    return binary if size == 16 else f"build/exercises/block-{size}"


def completions(size, prompts, *flags, body=None):
    """(log-probabilities, cached tokens) of these prompts, 24 new tokens each."""
    path = "build/exercises/3-in.jsonl"
    with open(path, "w") as file:
        for i, prompt in enumerate(prompts):
            request = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {
                "prompt": prompt, "max_tokens": 24, "temperature": 0.9, "seed": 4, "logprobs": 2,
                "ignore_eos": True}}
            file.write(json.dumps(request) + "\n")
    out = nanocu("batch", QWEN, path, "-o", "-", "--threads", 1, *flags, program=program(size))
    bodies = {r["custom_id"]: r["response"]["body"] for r in map(json.loads, out.splitlines())}
    return [(bodies[str(i)]["choices"][0]["logprobs"],
             bodies[str(i)]["usage"]["prompt_tokens_details"]["cached_tokens"])
            for i in range(len(prompts))]


def ids(count, seed):
    return [(i * 7919 + seed * 104729 + i * i % 31) % 512 for i in range(count)]


os.makedirs("build/exercises", exist_ok=True)
make(program(8))
info = json.loads(nanocu("info", QWEN, "--json", program=program(8)))
each = info["kv_bytes_per_token"]
need("-DNANOCU_BLOCK_SIZE=8 makes blocks of 8 tokens: memory for 8 tokens is enough for one",
     run("info", QWEN, "--kv-memory", 8 * each, program=program(8)).returncode == 0, "exit status 0",
     "no room for a block")
make(program(16), program(64))

lengths = [1, 7, 8, 9, 31, 64, 65, 100, 130]


def differ(wanted, size, *flags):
    """The lengths of the prompts that give something else with blocks of this size."""
    came = completions(size, [ids(n, n) for n in lengths], *flags)
    return [n for n, a, b in zip(lengths, wanted, came) if a[0] != b[0]]


for whose, flags in (("nano.cu's own ops", PLAIN), ("the vectors of docs/chapters", ())):
    print(whose)
    wanted = completions(16, [ids(n, n) for n in lengths], *flags)
    for size in (8, 64):
        equal(f"blocks of {size}: prompts of {lengths} tokens give the same to the bit", [],
              differ(wanted, size, *flags))
        equal(f"blocks of {size}: in chunks of 7, too", [],
              differ(wanted, size, *flags, "--chunk", 7, "--max-rows", 4))
        equal(f"blocks of {size}: in memory for 192 tokens, too", [],
              differ(wanted, size, *flags, "--kv-memory", each * 192))
demo = ["-p", "The capital of France is", "-t", 0, "-n", 12, "--logprobs", 2, "--seed", 1]
first = generate(*demo, program=program(16))
for size in (8, 64):
    equal(f"blocks of {size}: the demo model", first, generate(*demo, program=program(size)))

print("what the size of a block does:")
workload = "build/exercises/3-workload.txt"
with open(workload, "w") as file:
    file.writelines(f"{10 + 13 * i % 50} {20 + 7 * i % 30}\n" for i in range(40))
rows = []
for size in (8, 16, 64):
    found = [completions(size, [ids(n, 9)] * 2, "--max-rows", 1)[1][1] for n in (20, 60, 100)]
    equal(f"blocks of {size}: the second time floor((n - 1) / {size}) * {size} tokens are found",
          [(n - 1) // size * size for n in (20, 60, 100)], found)
    lines = nanocu("bench", QWEN, "--json", "--workload", workload, "--max-rows", 16, "-k", 0,
                   "--threads", 1, program=program(size)).splitlines()
    unused = json.loads(lines[-1])["unused_at_peak"]
    rows.append(unused)
    print(f"        blocks of {size:2}: of prompts of 20, 60, 100 tokens {found} are found again; "
          f"{100 * unused:.0f}% of the memory in use is empty")
expect("the larger the blocks, the more of them is empty", rows[0] < rows[1] < rows[2],
       "an ascending order", rows)
done()
