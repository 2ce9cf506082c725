"""Makes `qwen3_yarn`, `llama3_biased` and `mistral_linear` with their `golden.json`, by PyTorch and `transformers` 5.

usage: python make.py [DIRECTORY], which is that of this file if none is named
"""

import json
import os
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = 48
COMMON = dict(
    vocab_size=WORDS,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    attention_dropout=0.0,
)
YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=512)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.5)
CASES = {
    # Heads whose width does not follow from the model's; every bias there is but those of the feed-forward.
    "qwen3_yarn": (
        Qwen3ForCausalLM,
        Qwen3Config(**COMMON, head_dim=12, attention_bias=True, tie_word_embeddings=True, rope_parameters=YARN),
    ),
    "llama3_biased": (
        LlamaForCausalLM,
        LlamaConfig(**COMMON, head_dim=8, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    ),
    "mistral_linear": (
        MistralForCausalLM,
        MistralConfig(**COMMON, head_dim=8, sliding_window=None, rope_parameters=LINEAR),
    ),
}


def old_form(folder):
    """Writes the positions of a config as `transformers` 4 did."""
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    with open(path, "w") as file:
        json.dump(config, file, indent=2, sort_keys=True)
        file.write("\n")


def main(out):
    torch.set_num_threads(1)
    for name, (cls, config) in CASES.items():
        torch.manual_seed(11)
        model = cls(config).float()
        folder = os.path.join(out, name)
        os.makedirs(folder, exist_ok=True)
        # Larger than they are drawn, norms and biases away from their first values: so that a wrong reading shows.
        with torch.no_grad():
            for path, param in model.named_parameters():
                if "norm" in path:
                    param.add_(0.2 * torch.randn_like(param))
                elif path.endswith("bias"):
                    param.add_(0.3 * torch.randn_like(param))
                else:
                    param.mul_(8)
        model.save_pretrained(folder, safe_serialization=True)
        os.remove(os.path.join(folder, "generation_config.json"))
        if name == "llama3_biased":
            old_form(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).float()
        tokens = torch.randint(0, WORDS, (3, 4, 49), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits = model(tokens[0, :2, :-1]).logits
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        losses, norms = [], []
        for step in range(len(tokens)):
            optimizer.zero_grad()
            found = model(tokens[step, :, :-1]).logits
            targets = tokens[step, :, 1:].reshape(-1)
            loss = torch.nn.functional.cross_entropy(found.reshape(-1, WORDS), targets)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
            optimizer.step()
            losses.append(loss.item())
        rotary = model.model.rotary_emb
        golden = dict(
            tokens=tokens.tolist(),
            losses=losses,
            grad_norms=norms,
            logits_first=logits[0, 0, :16].tolist(),
            logits_sum=float(logits.double().abs().sum()),
            frequencies=rotary.inv_freq.tolist(),
            attention_factor=rotary.attention_scaling,
        )
        with open(os.path.join(folder, "golden.json"), "w") as file:
            json.dump(golden, file)
            file.write("\n")
        print(name, losses, norms, golden["frequencies"], golden["attention_factor"])


main(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
