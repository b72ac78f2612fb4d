#!/usr/bin/env python3
"""Draws the pictures of docs/guide.md.

    python3 docs/guide/pictures.py [--check] RECORD MODEL

(make guide does it for you.) RECORD is the program of record.cu; MODEL is the demo model's folder.
Data come from runs of RECORD and from the model's own files, so a picture shows what the code does.
--check writes nothing and ends with status 1 if a picture in docs/guide is not what it would be.

Each picture is 420 units wide and made to be read at 360 pixels. Texts are checked to stay inside it,
with letters as wide as DejaVu's. Colours follow the reader's light or dark scheme.
"""
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent
WIDTH = 420

# name: light fill, light line, dark fill, dark line
COLOURS = {
    "blue": ("#d8e6fd", "#2563c9", "#1e3a66", "#7fb0ff"),
    "orange": ("#fde3c8", "#b45309", "#5a3413", "#f5a962"),
    "green": ("#d3f0dc", "#1f7a43", "#17452a", "#6fd398"),
    "violet": ("#e8defb", "#6d3fc4", "#3b2a66", "#b99bff"),
    "grey": ("#eceef1", "#667080", "#2b3038", "#8f9bab"),
}


def style():
    def rules(light):
        out = [f".bg{{fill:{'#ffffff' if light else '#15181d'}}}",
               f"text{{fill:{'#1b1f24' if light else '#e6e9ee'}}}",
               f".muted{{fill:{'#596270' if light else '#a3adba'}}}",
               f".line{{stroke:{'#596270' if light else '#a3adba'}}}",
               f".tip{{fill:{'#596270' if light else '#a3adba'}}}"]
        for name, c in COLOURS.items():
            fill, line = (c[0], c[1]) if light else (c[2], c[3])
            out.append(f".{name}{{fill:{fill};stroke:{line}}}")
            out.append(f".full-{name}{{fill:{line}}}.text-{name}{{fill:{line}}}")
        return "".join(out)
    return ("text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
            ".mono{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
            ".line{fill:none;stroke-width:1.2}.bold{font-weight:600}.small{font-size:11px}"
            + rules(True) + "@media(prefers-color-scheme:dark){" + rules(False) + "}")


class Picture:
    """An SVG that grows from top to bottom."""

    def __init__(self, name, title, describe):
        self.name, self.title, self.describe, self.parts, self.height = name, title, describe, [], 0

    def grow(self, y):
        self.height = max(self.height, y)

    def text(self, x, y, text, classes="", anchor="start"):
        size = 11 if "small" in classes else 12
        width = len(text) * size * (0.61 if "mono" in classes else 0.57)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        assert left >= 0 and left + width <= WIDTH + 1, (self.name, text, left, width)
        anchors = {"start": "", "middle": ' text-anchor="middle"', "end": ' text-anchor="end"'}
        css = f' class="{classes}"' if classes else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{css}{anchors[anchor]}>{escape(text)}</text>')
        self.grow(y + 6)

    def box(self, x, y, width, height, colour, radius=3):
        self.parts.append(f'<rect x="{x:.6g}" y="{y:.6g}" width="{width:.6g}" height="{height:.6g}" '
                          f'rx="{radius}" class="{colour}"/>')
        self.grow(y + height + 2)

    def label(self, x, y, width, height, colour, text, classes=""):
        """A box with a text in its middle."""
        self.box(x, y, width, height, colour)
        self.text(x + width / 2, y + height / 2 + 4, text, classes, "middle")

    def line(self, *points, arrow=False, dashed=False):
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<path d="{path}" class="line"{dash}/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = math.hypot(x - x0, y - y0)
            dx, dy = (x - x0) / length * 6, (y - y0) / length * 6
            self.parts.append(f'<path d="M{x:g} {y:g}L{x - dx - dy / 2:g} {y - dy + dx / 2:g}'
                              f'L{x - dx + dy / 2:g} {y - dy - dx / 2:g}Z" class="tip"/>')
        self.grow(max(y for _, y in points) + 2)

    def svg(self):
        height = math.ceil(self.height + 6)
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
                f'width="{WIDTH}" height="{height}" role="img" aria-label="{escape(self.title)}">\n'
                f"<title>{escape(self.title)}</title>\n<desc>{escape(self.describe)}</desc>\n"
                f"<style>{style()}</style>\n"
                f'<rect class="bg" width="{WIDTH}" height="{height}"/>\n'
                + "\n".join(self.parts) + "\n</svg>\n")


def visible(text):
    """A token as a picture shows it: spaces as a low bar, newlines as an arrow."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5")


def draw_step(data):
    d = data["step"]
    p = Picture("step", "One decode step",
                "The way of a token: text, ids, Sequence, Step, forward, logits, id, and back.")
    words, ids = d["words"], d["ids"]
    x = 12
    p.text(12, 20, "the text so far, as ids", "bold")
    for word, number in zip(words, ids):
        width = max(len(visible(word)), len(str(number))) * 7.3 + 10
        p.label(x, 28, width, 20, "blue", visible(word), "mono small")
        p.text(x + width / 2, 62, str(number), "mono small muted", "middle")
        x += width + 4
    new = x
    best = d["tokens"][0]
    p.label(new, 28, len(visible(best["token"])) * 7.3 + 12, 20, "orange", visible(best["token"]),
            "mono small")
    p.text(new + 4, 62, str(best["id"]), "mono small text-orange")
    rows = [("Sequence", "ids, and a block table: where its past is", "blue"),
            ("Step", "flat arrays for one iteration of all", "blue"),
            ("forward", "30 layers of five ops; reads all weights once", "green"),
            ("logits", "a number for each of the 49,152 ids", "violet")]
    y = 80
    for name, what, colour in rows:
        p.line((40, y), (40, y + 12), arrow=True)
        p.label(12, y + 12, 74, 24, colour, name, "bold")
        p.text(94, y + 28, what, "small muted")
        y += 38
    p.line((40, y), (40, y + 10), arrow=True)
    y += 14
    for t in d["tokens"]:
        p.text(100, y + 11, visible(t["token"]), "mono small", "end")
        p.box(106, y + 2, 220 * t["probability"], 11, "orange" if t is best else "violet", 1)
        p.text(112 + 220 * t["probability"], y + 11, f"{100 * t['probability']:.1f}%", "small muted")
        y += 17
    p.text(94, y + 13, "sampler: the next id, behind the others", "small muted")
    p.line((60, y + 9), (84, y + 9))
    p.line((60, y + 9), (4, y + 9), (4, 74), (new + 20, 74), (new + 20, 67), arrow=True)
    return p


def draw_loader(model):
    with open(model / "model.safetensors", "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    total = sum(t["data_offsets"][1] - t["data_offsets"][0]
                for n, t in header.items() if n != "__metadata__")
    size = {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items()
            if n != "__metadata__"}
    layers = 1 + max(int(n.split(".")[2]) for n in size if ".layers." in n)
    each = sum(s for n, s in size.items() if ".layers.0." in n)
    embed = size["model.embed_tokens.weight"]
    p = Picture("loader", "model.safetensors, to scale",
                "Length, header and data of the demo model's file, and the matrices of a layer.")
    scale = 396 / total
    p.text(12, 18, f"model.safetensors: {(total + 8 + length) / 1e6:.0f} MB, mapped, not copied",
           "bold")
    p.text(12, 34, f"8 bytes of length, {length:,} of JSON", "small muted")
    p.text(408, 34, f"{layers} layers of {each / 1e6:.2f} MB", "small muted", "end")
    p.label(12, 42, embed * scale, 30, "violet", f"embed {embed / 1e6:.1f}", "small")
    for i in range(layers):
        x = 12 + (embed + i * each) * scale
        p.box(x, 42, each * scale, 30, "orange" if i == 0 else "green", 0)
    first = 12 + embed * scale
    p.line((first, 74), (12, 96), dashed=True)
    p.line((first + each * scale, 74), (408, 96), dashed=True)
    names = [("q", "self_attn.q_proj"), ("k", "self_attn.k_proj"), ("v", "self_attn.v_proj"),
             ("o", "self_attn.o_proj"), ("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"),
             ("down", "mlp.down_proj")]
    scale, x = 396 / each, 12
    for short, name in names:
        bytes = size[f"model.layers.0.{name}.weight"]
        colour = "blue" if "attn" in name else "orange"
        p.label(x, 98, bytes * scale, 34, colour, short, "bold")
        x += bytes * scale
    p.text(12, 150, "one layer, two bytes a weight (bf16):", "small muted")
    y = 170
    for short, name in names:
        t = header[f"model.layers.0.{name}.weight"]
        rows, cols = t["shape"]
        assert t["dtype"] == "BF16"
        p.text(12, y, f"{short:<5} [{rows}, {cols}]", "mono small")
        p.text(150, y, f"{rows * cols * 2 / 1e6:.2f} MB at byte {8 + length + t['data_offsets'][0]:,}",
               "mono small muted")
        y += 16
    p.text(12, y + 6, "A Matrix is such an address with its rows and cols.", "small")
    return p


def draw_tokenizer(model):
    text = " prefetching"
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    merges = [m.split(" ") if isinstance(m, str) else m for m in tokenizer["model"]["merges"]]
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    symbols = list(text.replace(" ", "\u0120"))  # as GPT-2 writes a space
    p = Picture("tokenizer", "How a word is merged",
                f"The merges of {text!r}, lowest rank first, each a row.")
    p.text(12, 18, "lowest rank first, until nothing joins", "bold")
    y, cell = 28, 24

    def row(joined, note):
        x = 12
        for i, s in enumerate(symbols):
            p.label(x, y, cell * len(s) - 3, 20, "orange" if i == joined else "blue",
                    s.replace("\u0120", "\u2423"), "mono small")
            x += cell * len(s)
        p.text(412, y + 14, note, "small muted", "end")

    row(-1, "bytes")
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:]))
                 if pair in ranks]
        if not pairs:
            break
        rank, i = min(pairs)
        symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        y += 24
        row(i, f"rank {rank:,}")
    y += 28
    x = 12
    for s in symbols:
        number = tokenizer["model"]["vocab"][s]
        p.text(x + cell * len(s) / 2, y + 8, str(number), "mono bold", "middle")
        x += cell * len(s)
    p.text(412, y + 8, "ids", "small muted", "end")
    return p


def draw_blocks(data):
    d = data["blocks"]
    assert (d["prompt"], d["computed"], d["matched"], d["second"]) == (37, 44, 32, 59), d
    assert d["copies"] == [[4, 5]]
    p = Picture("blocks", "Eight blocks, seven calls",
                "Who uses which block after each call of Cache, in a chat of two turns.")
    p.text(12, 18, "block", "small muted")
    left, cell = 202, 26
    for b in range(8):
        p.text(left + b * cell + 12, 18, str(b), "mono small muted", "middle")
    y = 26
    for s in d["snapshots"]:
        p.text(12, y + 13, s["call"], "mono bold")
        p.text(12, y + 28, s["what"], "small muted")
        for b in range(8):
            users = [n for n in "ABC" if b in s["tables"][n]]
            found = str(b) in s["findable"]
            colour = {"": "grey", "A": "blue", "B": "orange", "C": "violet"}.get("".join(users), "green")
            assert len(users) == s["refs"][b]
            if users or found:
                p.box(left + b * cell, y + 2, cell - 3, 28, colour if users else "grey")
                p.text(left + b * cell + 11.5, y + 14 if found else y + 20, "".join(users),
                       "small bold", "middle") if users else None
                if found:
                    p.box(left + b * cell + 4, y + 23, cell - 11, 3, "full-green", 1)
            else:
                p.parts.append(f'<rect x="{left + b * cell}" y="{y + 2}" width="{cell - 3}" '
                               'height="28" rx="3" class="line" stroke-dasharray="2 3"/>')
        y += 40
    p.box(12, y + 4, 16, 3, "full-green", 1)
    p.text(34, y + 10, "can be found again by what it holds", "small muted")
    p.text(12, y + 28, "dashed: free and empty; grey: free, but not forgotten yet", "small muted")
    return p


def draw_ops(config):
    D, F, V, L = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size",
                                      "num_hidden_layers"))
    H, KV = config["num_attention_heads"], config["num_key_value_heads"]
    HD = D // H
    N = (H + 2 * KV) * HD
    weights = {"norm_linear": N * D, "rotate": 0, "attend": 0, "add_linear": D * H * HD,
               "mlp": 3 * F * D}
    p = Picture("ops", "What makes a layer",
                "Shapes of what flows from op to op, and the weights that each op reads.")
    p.text(12, 18, f"x [T, {D}]", "mono bold")
    p.text(412, 18, "weights it reads, to scale", "small muted", "end")
    notes = {"norm_linear": (f"qkv [T, {N}]", "RMS norm; q, k, v in one product"),
             "rotate": (f"qkv [T, {N}]", "RoPE; k and v go into blocks"),
             "attend": (f"att [T, {H * HD}]", "attention over all blocks"),
             "add_linear": (f"x [T, {D}]", "x += att times o"),
             "mlp": (f"x [T, {D}]", "x += (silu(gate) times up) times down")}
    y = 28
    for op, count in weights.items():
        p.line((40, y - 4), (40, y + 6), arrow=True)
        p.label(12, y + 6, 104, 24, "green" if count else "blue", op, "mono")
        p.text(124, y + 16, notes[op][0], "mono small")
        p.text(124, y + 30, notes[op][1], "small muted")
        if count:
            p.box(330, y + 2, 82 * count / (3 * F * D), 10, "orange", 1)
            p.text(412, y + 24, f"{2 * count / 1e6:.2f} MB", "mono small muted", "end")
        y += 42
    p.line((40, y - 4), (40, y + 10), arrow=True)
    p.text(52, y + 8, f"{L} times; then norm and lm_head [{V}, {D}]", "small muted")
    p.text(412, y + 8, f"{2 * V * D / 1e6:.1f} MB", "mono small muted", "end")
    return p


def draw_gpu():
    p = Picture("gpu", "Who does which op",
                "What nano.cu runs for each op on a GPU, and the kernels that chapters have instead.")
    columns = [(92, 112, "nano.cu"), (204, 98, "decodes"), (302, 112, "prompts")]
    for x, width, name in columns:
        p.text(x + width / 2, 18, name, "bold small", "middle")
    rows = [("norm_linear", ["Norm, cuBLAS", "few_rows *", "Norm, cuBLAS"]),
            ("rotate", ["Rotate", "Rotate", "Rotate"]),
            ("attend", ["Attend,|MergeParts", "decode_attend", "prefill_attend"]),
            ("add_linear", ["cuBLAS", "few_rows *", "cuBLAS"]),
            ("mlp", ["Norm, cuBLAS,|Activate, cuBLAS", "few_rows *,|few_rows *",
                     "Norm, cuBLAS,|Activate, cuBLAS"]),
            ("draw", ["DrawIds", "draw_ids", "draw_ids"])]
    y = 28
    for op, kernels in rows:
        p.text(12, y + 20, op, "mono small")
        for (x, width, name), kernel in zip(columns, kernels):
            colour = "green" if kernel[0].isupper() else "grey" if kernel == "cuBLAS" else "orange"
            p.box(x, y, width - 4, 32, colour)
            lines = kernel.split("|")
            for i, text in enumerate(lines):
                p.text(x + width / 2 - 2, y + 20 + 13 * i - 6.5 * (len(lines) - 1), text,
                       "mono small", "middle")
        y += 36
    for i, line in enumerate(["Left: the engine alone. Middle, right: with docs/chapters on top.",
                              "* of up to 8 rows; with more, as in nano.cu",
                              "A step of decodes is a captured graph. On Hopper, up to 8 rows",
                              "are a single kernel, stream_step, but for the draw: chapter 9."]):
        p.text(12, y + 14 + 15 * i, line, "small muted")
    return p


def draw_paged(data):
    d = data["attention"]
    words, table, scores = d["words"], d["table"], d["scores"]
    n = len(words)
    total = sum(math.exp(s) for s in scores)
    p = Picture("paged", "One query over three pages",
                "Attention of the last token to all tokens, page by page, with the running sums.")
    p.text(12, 18, "last token's query, layer 17, head 5; weights of all 35 tokens", "small muted")
    y, top, sums = 30, -math.inf, 0.0
    colours = ["blue", "orange", "violet"]
    for page in range(len(table)):
        part = range(page * 16, min(n, page * 16 + 16))
        p.label(12, y + 14, 64, 24, colours[page], f"block {table[page]}", "small bold")
        p.text(12, y + 54, f"table[{page}]", "mono small muted")
        for i in part:
            weight = math.exp(scores[i]) / total
            x = 84 + (i - page * 16) * 20.4
            height = 44 * weight / 0.4
            p.box(x, y + 50 - height, 17, max(height, 0.6), colours[page], 1)
            if weight > 0.1:
                note = f"{visible(words[i])} {100 * weight:.0f}%"
                at = (x, "start") if x < 100 else (x + 8, "middle")
                p.text(at[0], y + 46 - height, note, "small mono", at[1])
        most = max(scores[i] for i in part)
        new = max(top, most)
        sums = sums * math.exp(top - new) + sum(math.exp(scores[i] - new) for i in part)
        factor = math.exp(top - new)
        top = new
        p.line((84, y + 51), (84 + 16 * 20.4, y + 51))
        p.text(84, y + 66, f"so far: top {top:.2f}, sum {sums:.2f}", "mono small")
        if page:
            p.text(410, y + 66, f"older sum \u00d7 {factor:.2f}", "mono small muted", "end")
        y += 92
    p.text(12, y, "In memory the three are 5, 2, 7 of 8 blocks:", "small muted")
    for b in range(8):
        used = b in table
        p.label(12 + b * 50, y + 8, 44, 22, colours[table.index(b)] if used else "grey",
                str(b), "mono small" + ("" if used else " muted"))
    assert abs(sums * math.exp(top) / total - 1) < 1e-9
    return p


def draw_loop():
    p = Picture("loop", "Who waits for whom", "Host and GPU, without and with steps that overlap.")

    def lane(y, name, pieces):
        p.text(12, y + 16, name, "small bold")
        for begin, length, colour, text in pieces:
            p.label(56 + begin, y, length, 24, colour, text, "small")

    p.text(12, 18, "a plain loop: each waits for the other", "bold")
    lane(28, "host", [(0, 50, "blue", "plan 1"), (132, 50, "blue", "plan 2"),
                      (264, 50, "blue", "plan 3")])
    lane(60, "GPU", [(52, 78, "green", "step 1"), (184, 78, "green", "step 2")])
    p.line((106, 40), (112, 60), arrow=True)
    p.line((186, 60), (190, 52), arrow=True)
    p.line((238, 40), (244, 60), arrow=True)
    p.line((318, 60), (322, 52), arrow=True)
    p.text(12, 116, "as it is: step 2 is launched before id 1 is read", "bold")
    lane(126, "host", [(0, 50, "blue", "plan 1"), (52, 50, "blue", "plan 2"),
                       (132, 30, "orange", "id 1"), (164, 44, "blue", "plan 3"),
                       (212, 30, "orange", "id 2"), (244, 44, "blue", "plan 4")])
    lane(158, "GPU", [(52, 78, "green", "step 1"), (132, 78, "green", "step 2"),
                      (212, 78, "green", "step 3"), (292, 60, "green", "step 4")])
    p.line((106, 138), (112, 158), arrow=True)
    p.line((186, 158), (194, 151), arrow=True)
    p.line((266, 158), (274, 151), arrow=True)
    p.text(12, 204, "The plan of step 2 holds -1 where id 1 belongs; the", "small muted")
    p.text(12, 219, "first kernel finds id 1 in the GPU's own memory.", "small muted")
    return p


def draw_stream():
    p = Picture("stream", "The ring, and what it gives",
                "A ring of slots in shared memory, and times a token from docs/speed.md.")
    p.text(12, 18, "one block on each SM, for the whole step", "bold")
    p.label(12, 30, 88, 36, "orange", "1 producer")
    p.text(12, 82, "asks for the next", "small muted")
    p.text(12, 96, "weights, always", "small muted")
    slots = [("", "grey"), ("...", "orange"), ("...", "orange"), ("full", "green"),
             ("full", "green"), ("full", "green"), ("", "grey")]
    for i, (text, colour) in enumerate(slots):
        p.label(112 + 28 * i, 30, 26, 36, colour, text, "small")
    p.text(210, 82, "slots of 16 KB; few are on", "small muted", "middle")
    p.text(210, 96, "their way at a time", "small muted", "middle")
    p.label(318, 30, 92, 36, "green", "16 warps")
    p.text(318, 82, "multiply, or", "small muted")
    p.text(318, 96, "wait for words", "small muted")
    p.line((100, 48), (110, 48), arrow=True)
    p.line((308, 48), (317, 48), arrow=True)
    p.text(12, 128, "us a token behind 64 tokens, 1 row, H100", "bold")
    log = (FOLDER.parent / "speed.md").read_text()
    row = re.search(r"\| 1 row, 256 tokens behind 64, us a token [^|]*"
                    r"((?:\| \d+ to \d+ \(\d+;[^|]*){3})", log)
    streamed = re.findall(r"\| (\d+) to \d+ \((\d+);", row[1])
    singly = re.search(r"kernel by kernel: (\d+), (\d+), (\d+) us", log).groups()
    y = 138
    for name, (stream, bytes), kernels in zip(["Qwen3-0.6B", "Llama-3.2-1B", "Qwen3-8B"], streamed,
                                              singly):
        bytes, stream, kernels = int(bytes), int(stream), int(kernels)
        p.text(12, y + 14, name, "small bold")
        for value, colour, what in [(bytes, "grey", "bytes alone"), (stream, "green", "streamed"),
                                    (kernels, "blue", "a kernel an op")]:
            width = 175 * value / kernels
            p.box(104, y + 3, width, 14, colour, 1)
            p.text(110 + width, y + 14, f"{value:,} {what}", "small muted")
            y += 18
        y += 8
    return p


def draw_sampling(data):
    d = data["draw"]
    p = Picture("sampling", "From probabilities to one id",
                "The twelve likeliest ids and what temperature, min-p, top-k and top-p leave of them.")
    p.text(12, 18, f"\u201c{d['text']} \u2026\u201d", "bold")
    heads = ["p", "T 0.8", "min-p .05", "top-k 8", "top-p .8"]
    lefts = [88, 150, 214, 282, 350]
    for x, head in zip(lefts, heads):
        p.text(x, 38, head, "small muted")
    y = 46
    stages = [sum(t["weights"][i] for t in d["tokens"]) for i in range(4)]
    for t in d["tokens"]:
        drawn = t["id"] == d["drawn"]
        p.text(80, y + 11, visible(t["token"]), "mono small" + (" bold" if drawn else ""), "end")
        p.box(lefts[0], y + 2, 600 * t["probability"], 11, "grey", 1)
        for i, x in enumerate(lefts[1:]):
            weight = t["weights"][i]
            if weight:
                p.box(x, y + 2, 48 * weight / 2**40, 11,
                      "orange" if drawn and i == 3 else ["violet", "blue", "blue", "green"][i], 1)
        y += 17
    kept = ["49,152", "49,152", d["kept"][1], d["kept"][2], d["kept"][3]]
    p.text(80, y + 12, "ids left", "small muted", "end")
    for x, k in zip(lefts, kept):
        p.text(x, y + 12, str(k), "mono small")
    y += 34
    p.text(12, y, "the draw: kept ids side by side, by id", "bold")
    left = sorted((t for t in d["tokens"] if t["weights"][3]), key=lambda t: t["id"])
    total, x = sum(t["weights"][3] for t in left), 12.0
    at = d["random"]
    before = 0
    for t in left:
        width = 396 * t["weights"][3] / total
        drawn = before <= at * total < before + t["weights"][3]
        before += t["weights"][3]
        assert drawn == (t["id"] == d["drawn"])
        p.label(x, y + 10, width, 24, "orange" if drawn else "green", t["token"].strip(), "mono small")
        x += width
    p.line((12 + 396 * at, y + 54), (12 + 396 * at, y + 36), arrow=True)
    p.text(12 + 396 * at, y + 66, f"Philox's number for seed {d['seed']}: {at:.3f}", "small muted",
           "end")
    return p


def draw_schedule(data):
    d = data["schedule"]
    steps, lengths = d["steps"], d["lengths"]
    p = Picture("schedule", "Four requests in ten blocks",
                "Which request computes what in which step, and how many blocks are in use.")
    left, cell = 92, 9.7
    p.text(12, 18, f"four requests, a pool of {d['blocks']} blocks, {d['chunk']} tokens a step", "bold")
    p.text(12, 38, "step", "small muted")
    for i in range(0, len(steps), 8):
        p.text(left + i * cell + 4, 38, str(i), "mono small muted", "middle")
    # what a step computed beyond its decodes was of prompts: first come, first served
    todo = {r: prompt for r, (prompt, _) in enumerate(lengths)}
    got = [0] * len(lengths)
    cells, resumed = {}, set()
    for i, s in enumerate(steps):
        lost = i and s["preemptions"] > steps[i - 1]["preemptions"]
        if lost:  # the youngest that ran, and did not get a token now
            r = max(r for r in range(len(lengths)) if not todo.get(r) and got[r] and
                    r not in s["tokens"] and r not in resumed)
            todo[r] = lengths[r][0] + got[r]
            resumed.add(r)
            cells[i, r] = "lost"
        decodes = [r for r in s["tokens"] if not todo.get(r)]
        for r in decodes:
            cells[i, r] = "decode"
        if not lost and not s["ended"]:
            rest = s["computed"] - (steps[i - 1]["computed"] if i else 0) - len(decodes)
            for r in sorted(todo, key=lambda r: (r not in resumed, r)):
                take = min(todo[r], rest)
                if take:
                    todo[r], rest, cells[i, r] = todo[r] - take, rest - take, "prompt"
            assert rest == 0, (i, s)
        for r in s["tokens"]:
            got[r] += 1
            assert not todo.get(r), (i, r, todo)
    y = 46
    for r, (prompt, count) in enumerate(lengths):
        p.text(12, y + 12, f"{prompt} + {count}", "mono small")
        last = max(i for i in range(len(steps)) if (i, r) in cells)
        p.line((left, y + 9), (left + cell * (last + 1), y + 9), dashed=True)
        for i in range(len(steps)):
            kind = cells.get((i, r), "")
            colour = {"decode": "green", "prompt": "orange", "lost": ""}.get(kind)
            if colour:
                p.box(left + i * cell, y, cell - 1, 18, colour, 1)
            elif kind == "lost":
                p.text(left + i * cell + 5, y + 13, "\u00d7", "bold text-orange", "middle")
        y += 26
    p.text(12, y + 28, "blocks used", "small muted")
    for i, s in enumerate(steps):
        height = 30 * s["used"] / d["blocks"]
        p.box(left + i * cell, y + 34 - height, cell - 1, max(height, 0.5), "blue", 1)
    p.line((left, y + 4), (left + len(steps) * cell, y + 4), dashed=True)
    y += 46
    for x, colour, text in [(12, "orange", "computes a prompt"), (154, "green", "decodes"),
                            (234, "", "\u00d7 gives its blocks back")]:
        if colour:
            p.box(x, y, 10, 12, colour, 1)
        p.text(x + (16 if colour else 0), y + 10, text, "small muted")
    return p


def main():
    arguments = sys.argv[1:]
    check = arguments[:1] == ["--check"]
    if len(arguments) != 2 + check:
        sys.exit("usage: pictures.py [--check] RECORD MODEL")
    record, model = arguments[check:]
    model = Path(model)
    run = subprocess.run([record, str(model)], stdout=subprocess.PIPE, check=True)
    data = json.loads(run.stdout)
    config = json.loads((model / "config.json").read_text())
    pictures = [draw_step(data), draw_loader(model), draw_tokenizer(model), draw_blocks(data),
                draw_ops(config), draw_gpu(), draw_paged(data), draw_loop(), draw_stream(),
                draw_sampling(data), draw_schedule(data)]
    stale = 0
    for p in pictures:
        path, svg = FOLDER / f"{p.name}.svg", p.svg()
        if path.exists() and path.read_text() == svg:
            continue
        stale += 1
        print(f"docs/guide/{p.name}.svg: " + ("not what would be drawn" if check else "drawn"))
        if not check:
            path.write_text(svg)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
