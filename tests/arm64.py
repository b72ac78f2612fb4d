#!/usr/bin/env python3
"""Whether a binary for arm64, run by qemu, gives what one for this machine gives: the ids of greedy
text from the tiny golden models, and the demo model's answer to a question.

    arm64.py HERE ARM64 DEMO_MODEL
"""
import json
import subprocess
import sys
import time

TINY = "tests/data/models/"
QUESTION = "What is the capital of France?"


def output(command):
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{' '.join(command)}: exit {ran.returncode}\n{ran.stderr}")
    return ran.stdout


def cases(demo):
    """(what it is, arguments of nanocu)"""
    for name in ("llama3", "qwen2", "qwen3"):
        with open(f"{TINY}{name}/golden.json") as file:
            for i, one in enumerate(json.load(file)):
                ids = ",".join(map(str, one["prompt"]))
                yield f"{name}, prompt {i}", ["generate", TINY + name, "--ids", ids, "--ignore-eos",
                                              "-n", str(len(one["greedy"])), "-t", "0", "--seed", "0",
                                              "--json"]
    yield QUESTION, ["chat", demo, "-t", "0", "-p", QUESTION]
    # a draw by the seed, which the sampler's integers make the same everywhere
    yield "a draw", ["generate", demo, "-p", "Once upon a time", "-n", "8", "-t", "0.8", "--seed", "7",
                     "-k", "20", "--top-p", "0.95"]


def main():
    here, arm64, demo = sys.argv[1:]
    device = ["--device", "cpu", "--threads", "2"]
    wrong = 0
    for what, arguments in cases(demo):
        start = time.time()
        expected = output([here] + arguments + device)
        got = output(["qemu-aarch64", arm64] + arguments + device)
        same = got == expected
        wrong += not same
        print(f"{what}: {'the same' if same else 'DIFFERENT'}, {time.time() - start:.1f} s", flush=True)
        if not same:
            print(f"  here:  {expected!r}\n  arm64: {got!r}")
    print(f"{arm64}: {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
