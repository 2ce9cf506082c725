"""The same training by PyTorch and `transformers`, for the table beside `examples/finetune`: rows of a plain text, AdamW.

    python finetune_reference.py MODEL TEXT SEQ BATCH STEPS OUTCOME.json [THREADS]

Its rows are cut from the text one behind the other, so its losses are not those of the table; its speed is what is compared.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, text, seq, batch, steps, outcome = sys.argv[1:7]
seq, batch, steps = int(seq), int(batch), int(steps)
if len(sys.argv) > 7:
    torch.set_num_threads(int(sys.argv[7]))
tokenizer = AutoTokenizer.from_pretrained(model)
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
with open(text, encoding="utf-8") as file:
    tokens = torch.tensor(tokenizer(file.read())["input_ids"])
rows = tokens[: len(tokens) // (seq + 1) * (seq + 1)].reshape(-1, seq + 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
losses, started = [], time.time()
for step in range(steps):
    of = rows[[(step * batch + row) % len(rows) for row in range(batch)]]
    logits = model(of[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), of[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
elapsed = time.time() - started
count = sum(param.numel() for param in model.parameters())
bytes_held = dict(parameters=4 * count, gradients=4 * count, optimizer=8 * count)
with open(outcome, "w") as file:
    json.dump(dict(losses=losses, tokens_per_second=steps * batch * seq / elapsed, bytes_held=bytes_held), file)
