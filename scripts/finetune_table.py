"""A table of the outcomes (`--json`) of fine-tuning in a directory.

    python finetune_table.py DIRECTORY

Of a run its steps but the first count for their seconds, which captures and allocates. PyTorch trains on other rows: its losses are left out.
"""

import glob
import json
import os
import sys

ROWS = ["one rank", "dp 2", "tp 3", "pp 2", "dp 2, ZeRO 3", "dp 2, LoRA 8", "PyTorch, one process"]


def megabytes(count):
    return "-" if count is None else f"{count / 1e6:.0f}"


if len(sys.argv) != 2:
    raise SystemExit(__doc__)
found = {os.path.basename(path)[: -len(".json")]: path for path in glob.glob(os.path.join(sys.argv[1], "*.json"))}
# Whatever else is there.
found = {name: found[name] for name in ROWS if name in found}
if not found:
    raise SystemExit(f"finetune_table.py: {sys.argv[1]} has no outcome of any of {ROWS}")
print("| | first loss | last loss | seconds to the first step | seconds a step | tokens/s | parameters, MB | gradients, MB | optimizer, MB |")
print("|---|---|---|---|---|---|---|---|---|")
for name in found:
    with open(found[name]) as file:
        run = json.load(file)
    seconds = run["step_seconds"]
    tokens = run["tokens_per_second"] * sum(seconds) / len(seconds)
    rest = seconds[1:] or seconds
    step = sum(rest) / len(rest)
    held = run.get("bytes_held", {})
    losses = ["", ""] if "PyTorch" in name else [f"{run['losses'][place]:.5f}" for place in (0, -1)]
    cells = [
        name,
        *losses,
        f"{run['seconds_to_first_step']:.1f}",
        f"{step:.2f}",
        f"{tokens / step:.1f}",
        *(megabytes(held.get(what)) for what in ("parameters", "gradients", "optimizer")),
    ]
    print("| " + " | ".join(cells) + " |")
