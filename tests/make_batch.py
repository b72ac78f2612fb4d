"""Makes requests for `nanocu batch` as lists of token ids, for measuring; docs/speed.md has the commands.

    make_batch.py lengths FILE                    prompt and output lengths, a pair a line, as bench --workload takes
    make_batch.py shared REQUESTS PREFIX TAIL NEW  prompts of PREFIX ids that all share and TAIL ids of their own
"""
import json
import sys

VOCABULARY = 30000  # ids below this, which all models have


def write(number, prompt, new):
    body = {"prompt": prompt, "max_tokens": new, "ignore_eos": True, "temperature": 0.6, "seed": number}
    print(json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}))


def ids(start, count):
    return [(start + 7919 * i) % VOCABULARY for i in range(count)]


def main(kind, *arguments):
    if kind == "lengths":
        with open(arguments[0]) as file:
            for number, line in enumerate(file):
                prompt, new = map(int, line.split())
                write(number, ids(number * 101, prompt), new)
    elif kind == "shared":
        requests, prefix, tail, new = map(int, arguments)
        for number in range(requests):
            write(number, ids(1, prefix) + ids(number * 13 + 2, tail), new)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
