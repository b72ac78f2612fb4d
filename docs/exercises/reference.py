"""A tiny Llama in plain Python and double precision, to compare nanocu with: slow, short, and as the
papers have it. Its weights are random; make_model writes them as Hugging Face does."""
import json
import math
import os
import random
import struct
from operator import mul

CONFIG = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32,
    "vocab_size": 48, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "sliding_window": None,
}
D, HD, H, V, LAYERS = 32, 16, 2, 48, 2


def shapes():
    yield "model.embed_tokens.weight", (V, D)
    yield "lm_head.weight", (V, D)
    yield "model.norm.weight", (D,)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (D,)
        yield layer + "post_attention_layernorm.weight", (D,)
        for name, rows in (("q", H * HD), ("k", HD), ("v", HD), ("o", D)):
            yield layer + f"self_attn.{name}_proj.weight", (rows, D)
        for name in ("gate", "up", "down"):
            yield layer + f"mlp.{name}_proj.weight", (D, D)


def make_model(folder, **changes):
    """Writes a model with this config to folder; returns its weights, lists of rows."""
    draw, weights, header, data = random.Random(1), {}, {}, b""
    for name, shape in shapes():
        count = math.prod(shape)
        numbers = [draw.gauss(1, 0.1) if len(shape) == 1 else draw.gauss(0, 0.4) for _ in range(count)]
        halves = [struct.unpack("<I", struct.pack("<f", x))[0] >> 16 for x in numbers]  # bf16, cut
        values = [struct.unpack("<f", struct.pack("<I", h << 16))[0] for h in halves]
        end = len(data) + 2 * count
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), end]}
        data += struct.pack(f"<{count}H", *halves)
        rows = [values[i:i + D] for i in range(0, count, D)]
        weights[name] = rows if len(shape) == 2 else values
    os.makedirs(folder, exist_ok=True)
    with open(folder + "/config.json", "w") as file:
        json.dump(CONFIG | changes, file)
    text = json.dumps(header).encode()
    with open(folder + "/model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
    return weights


def times(rows, x):
    return [sum(map(mul, row, x)) for row in rows]


def norm(x, weight):
    factor = 1 / math.sqrt(sum(v * v for v in x) / len(x) + CONFIG["rms_norm_eps"])
    return [v * factor * w for v, w in zip(x, weight)]


def softmax(scores):
    top = max(scores)
    e = [math.exp(s - top) for s in scores]
    return [v / sum(e) for v in e]


def default_frequencies(theta=10000.0):
    return [theta ** (-i / HD) for i in range(0, HD, 2)]


def rotate(v, position, frequencies, factor):
    """RoPE of one head; factor: what sine and cosine are multiplied with."""
    out = list(v)
    for i, f in enumerate(frequencies):
        c, s = math.cos(position * f) * factor, math.sin(position * f) * factor
        out[i], out[i + HD // 2] = v[i] * c - v[i + HD // 2] * s, v[i + HD // 2] * c + v[i] * s
    return out


def log_probabilities(weights, ids, window=None, frequencies=None, factor=1.0):
    """Of each id but the first, given those before it. window: how many keys a query sees, its own
    position's included."""
    frequencies = frequencies or default_frequencies()
    xs = [list(weights["model.embed_tokens.weight"][id]) for id in ids]
    for i in range(LAYERS):
        layer = {k.split(".", 3)[3]: w for k, w in weights.items() if k.startswith(f"model.layers.{i}.")}
        keys, values = [], []
        for p, x in enumerate(xs):
            n = norm(x, layer["input_layernorm.weight"])
            q = times(layer["self_attn.q_proj.weight"], n)
            keys.append(rotate(times(layer["self_attn.k_proj.weight"], n), p, frequencies, factor))
            values.append(times(layer["self_attn.v_proj.weight"], n))
            first = max(0, p + 1 - window) if window else 0
            attended = []
            for h in range(H):
                turned = rotate(q[h * HD:(h + 1) * HD], p, frequencies, factor)
                weight = softmax([sum(map(mul, turned, k)) / math.sqrt(HD) for k in keys[first:]])
                attended += times(zip(*values[first:]), weight)
            xs[p] = x = [a + b for a, b in zip(x, times(layer["self_attn.o_proj.weight"], attended))]
            n = norm(x, layer["post_attention_layernorm.weight"])
            gate, up = (times(layer[f"mlp.{name}_proj.weight"], n) for name in ("gate", "up"))
            h = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)]
            xs[p] = [a + b for a, b in zip(x, times(layer["mlp.down_proj.weight"], h))]
    out = []
    for x, id in zip(xs, ids[1:]):
        logits = times(weights["lm_head.weight"], norm(x, weights["model.norm.weight"]))
        top = max(logits)
        out.append(logits[id] - top - math.log(sum(math.exp(v - top) for v in logits)))
    return out


def farthest(a, b):
    """The largest difference of two lists."""
    return max(abs(x - y) for x, y in zip(a, b)) if len(a) == len(b) else math.inf
