"""The same training by PyTorch and `transformers`, for the tables beside `examples/finetune`: rows of a plain text, AdamW.

    python finetune_reference.py MODEL TEXT SEQ BATCH STEPS OUTCOME.json [THREADS]

Under torchrun the processes divide the rows of each step, and average gradients with DistributedDataParallel over gloo. Its rows are cut from
the text one behind the other, so its losses are not those of the tables; its speed is what is compared.
"""

import time

BEGUN = time.time()

import json
import os
import sys

if len(sys.argv) not in (7, 8):
    raise SystemExit(__doc__)
try:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
except ModuleNotFoundError as missing:
    raise SystemExit(f"finetune_reference.py: there is no {missing.name}: {sys.executable} -m pip install torch transformers")

model, text, seq, batch, steps, outcome = sys.argv[1:7]
seq, batch, steps = int(seq), int(batch), int(steps)
if len(sys.argv) > 7:
    torch.set_num_threads(int(sys.argv[7]))
rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
tokenizer = AutoTokenizer.from_pretrained(model)
model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
count = sum(param.numel() for param in model.parameters())
if ranks > 1:
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(model)
with open(text, encoding="utf-8") as file:
    tokens = torch.tensor(tokenizer(file.read())["input_ids"])
rows = tokens[: len(tokens) // (seq + 1) * (seq + 1)].reshape(-1, seq + 1)
if len(rows) == 0:
    raise SystemExit(f"finetune_reference.py: {text} has {len(tokens)} tokens, fewer than a row of {seq + 1}")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
before = time.time() - BEGUN
losses, seconds, processor = [], [], []
for step in range(steps):
    started, taken = time.time(), time.process_time()
    of = rows[[(step * batch + row) % len(rows) for row in range(rank * batch // ranks, (rank + 1) * batch // ranks)]]
    logits = model(of[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), of[:, 1:].flatten())
    loss.backward()
    # Of this process: `finetune` measures the norm in every step too.
    torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    seconds.append(time.time() - started)
    processor.append(time.process_time() - taken)
if ranks > 1:
    of_all = torch.tensor(processor, dtype=torch.float64)
    torch.distributed.all_reduce(of_all)
    processor = of_all.tolist()
if rank == 0:
    said = dict(losses=losses, tokens_per_second=steps * batch * seq / sum(seconds), seconds_to_first_step=before)
    said |= dict(step_seconds=seconds, step_processor_seconds=processor)
    said["bytes_held"] = dict(parameters=4 * count, gradients=4 * count, optimizer=8 * count)
    with open(outcome, "w") as file:
        json.dump(said, file)
