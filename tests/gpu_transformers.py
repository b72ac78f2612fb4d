"""Compares `nanocu score` with transformers at the true shape of a model, with random weights.

    python3 tests/gpu_transformers.py NANOCU tests/configs/qwen3-0.6b [TOKENS]

Prints the root mean square error of the log-probabilities of random ids against transformers in
float32: ours, and transformers' own in bf16. Fails if ours is over 1.2 times the other.
"""
import json
import subprocess
import sys
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def logprobs(model, ids):
    with torch.no_grad():
        logits = model(ids).logits[0].float()
    picked = torch.log_softmax(logits, -1)[:-1].gather(1, ids[0, 1:, None])
    return picked[:, 0].double().cpu()


def main(nanocu, config_folder, tokens=500):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(config_folder)
    config.initializer_range = 0.05  # far from uniform
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.randint(0, config.vocab_size, (1, tokens), device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        in_bf16 = logprobs(model, ids)
        exact = logprobs(model.float(), ids)
        del model
        torch.cuda.empty_cache()
        text = ",".join(map(str, ids[0].tolist()))
        for chunk in (8192, 8, 1):
            command = [nanocu, "score", folder, "--ids", text, "--json", "--chunk", str(chunk),
                       "--max-rows", "1", "--kv-memory", "4G"]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            ours = torch.tensor(json.loads(out)["token_logprobs"][1:], dtype=torch.float64)
            error, other = [(x - exact).pow(2).mean().sqrt().item() for x in (ours, in_bf16)]
            print(f"{config_folder} {tokens} tokens, chunks of {chunk}: rms error {error:.5f}, "
                  f"transformers in bf16 {other:.5f}, ratio {error / other:.2f}; deviation of the "
                  f"log-probabilities {exact.std():.2f}", flush=True)
            assert error <= 1.2 * other


main(*sys.argv[1:3], *map(int, sys.argv[3:]))
