"""rope type yarn: log-probabilities against a model in plain Python with the formulas of the paper
(Peng et al. 2023), in the form that transformers gives them."""
import json
import math
import random

import reference
from checking import *

FOLDER = "build/exercises/5-model"
draw = random.Random(5)
ids = [draw.randrange(reference.V) for _ in range(120)]
text = ",".join(map(str, ids))


def yarn(factor, old, beta_fast=32, beta_slow=1, attention_factor=None):
    """The frequencies, and what sine and cosine are multiplied with."""
    size, base = reference.HD, 10000.0

    def dimension(turns):
        return size * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(beta_fast)), 0)
    high = min(math.ceil(dimension(beta_slow)), size - 1)
    out = []
    for i, f in enumerate(reference.default_frequencies(base)):
        stretched = min(1, max(0, (i - low) / (high - low or 0.001)))
        out.append(f / factor * stretched + f * (1 - stretched))
    return out, attention_factor or (0.1 * math.log(factor) + 1 if factor > 1 else 1)


# What _compute_yarn_parameters of transformers (4.57.1 and 5.0.0 alike) gives for two of the settings.
# head_dim 16, rope_theta 10000, float32.
for wanted, came in (
    (([1.0, 0.23717082, 0.049999997, 0.007905695, 0.0025, 0.000790569, 0.00025, 7.9057e-05],
      1.138629436111989), yarn(4, 64)),
    (([1.0, 0.31622776, 0.1, 0.017787812, 0.00125, 0.000395285, 0.000125, 3.9528e-05], 0.9),
     yarn(8, 512, 8, 2, 0.9)),
):
    close = all(abs(a / b - 1) < 3e-5 for a, b in zip(wanted[0] + [wanted[1]], came[0] + [came[1]]))
    expect("(this check's own formula gives transformers' numbers)", close, wanted, came)

make("build/exercises/nanocu")


def score(scaling, **changes):
    reference.make_model(FOLDER, rope_scaling=scaling, **changes)
    result = run("score", FOLDER, "--ids", text, "--json", *PLAIN)
    need(f"config.json with {json.dumps(changes or scaling)} is taken", result.returncode == 0,
         "exit status 0", result.stderr.strip())
    came = json.loads(result.stdout)["token_logprobs"][1:]
    fast = run("score", FOLDER, "--ids", text, "--json")  # with the chapters
    if fast.returncode == 0:
        same = reference.farthest(came, json.loads(fast.stdout)["token_logprobs"][1:]) < 1e-3
    expect("  with the chapters the same, or refused",
           same if fast.returncode == 0 else fast.stderr.count("\n") == 1, "the same, or one line",
           fast.stderr.strip() or "other log-probabilities")
    return came


weights = reference.make_model(FOLDER)
plain = reference.log_probabilities(weights, ids)


def compare(numbers, came):
    exact = reference.log_probabilities(weights, ids, None, *numbers)
    expect("(which is far from the result without scaling)", reference.farthest(exact, plain) > 0.05,
           "over 0.05", reference.farthest(exact, plain))
    far = [i for i, (a, b) in enumerate(zip(exact, came)) if not abs(a - b) < 1e-3]
    expect("  its log-probabilities are the reference's", not far,
           f"{exact[far[0]]:.5f} for token {far[0] + 1}" if far else "",
           f"{came[far[0]]:.5f}; {len(far)} of {len(exact)} are wrong" if far else "")


base = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
compare(yarn(4, 64), score(base))
compare(yarn(8, 512, 8, 2, 0.9),
        score({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 8,
               "beta_slow": 2, "attention_factor": 0.9}))
compare(yarn(16, 100, 1, 1),  # where the blended range is empty, or begins at its first dimension
        score(base | {"factor": 16.0, "original_max_position_embeddings": 100, "beta_fast": 1}))
compare(yarn(2, 1024), score({"rope_type": "yarn", "factor": 2.0}))  # the config's own context
compare(yarn(4, 64), score(None, rope_theta=None, rope_parameters=base | {"rope_theta": 10000.0}))
expect("without scaling nothing has changed", reference.farthest(score(None), plain) < 1e-3, plain[:4],
       score(None)[:4])
for key, value in (("mscale", 1.0), ("mscale_all_dim", 0.7), ("truncate", False)):
    reference.make_model(FOLDER, rope_scaling=base | {key: value})
    result = run("score", FOLDER, "--ids", "1,2,3")
    expect(f"{key}, which is not asked for here, is refused by name",
           result.returncode == 1 and key in result.stderr, f"exit status 1, an error with {key}",
           f"{result.returncode}: {result.stderr.strip()}")
done()
