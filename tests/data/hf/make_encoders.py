"""Tiny random GPT-2 and BERT of `transformers`, with logits and the losses of AdamW steps, as references for any mesh.

usage: python make_encoders.py OUTDIR; made by torch 2.15 and transformers 5.24, on one thread
"""
import json, os, sys
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

out = sys.argv[1]
torch.set_num_threads(1)
STEPS, ROWS, PAD, IGNORED = 5, 8, 0, -100
cases = {
    "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                                       attn_pdrop=0.0)),
    "bert": BertForMaskedLM(BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                       intermediate_size=128, max_position_embeddings=32, hidden_dropout_prob=0.0,
                                       attention_probs_dropout_prob=0.0)),
}


def causal(vocab, length, generator):
    tokens = torch.randint(0, vocab, (STEPS, ROWS, length + 1), generator=generator)
    return [dict(input_ids=step[:, :-1]) for step in tokens], tokens[:, :, 1:], dict(tokens=tokens.tolist())


def masked(vocab, length, generator):
    """Rows of several lengths, in two parts, of which three tokens are to be found."""
    tokens = torch.randint(1, vocab, (STEPS, ROWS, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (STEPS, ROWS, 1), generator=generator)
    there = torch.arange(length) < lengths
    tokens[~there] = PAD
    types = (torch.arange(length) >= lengths // 2).long() * there
    labels = torch.full_like(tokens, IGNORED)
    labels[:, :, [1, 4, 7]] = torch.randint(1, vocab, (STEPS, ROWS, 3), generator=generator)
    inputs = [dict(input_ids=tokens[step], token_type_ids=types[step], attention_mask=there[step].long()) for step in range(STEPS)]
    return inputs, labels, dict(tokens=tokens.tolist(), types=types.tolist(), labels=labels.tolist())


def logits_of(model, inputs):
    return model(**inputs).logits


for name, made in cases.items():
    torch.manual_seed(7)
    model = type(made)(made.config).float()
    folder = os.path.join(out, name)
    os.makedirs(folder, exist_ok=True)
    # Norms and biases away from their initial values, so that a wrong reading shows.
    with torch.no_grad():
        for path, param in model.named_parameters():
            if "norm" in path.lower() or ".ln_" in path:
                param.add_(0.1 * torch.randn_like(param))
            if path.endswith("bias"):
                param.add_(0.05 * torch.randn_like(param))
    model.save_pretrained(folder, safe_serialization=True)
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(3)
    inputs, targets, said = (masked if name == "bert" else causal)(vocab, 16, generator)
    with torch.no_grad():
        logits = logits_of(model, {key: value[:2] for key, value in inputs[0].items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(logits_of(model, inputs[step]).reshape(-1, vocab), targets[step].reshape(-1), ignore_index=IGNORED)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
        optimizer.step()
        losses.append(loss.item())
    said.update(losses=losses, grad_norms=norms, logits_first=logits[0, 0, :16].tolist(), logits_sum=float(logits.double().abs().sum()))
    json.dump(said, open(os.path.join(folder, "golden.json"), "w"))
    print(name, losses, norms)
