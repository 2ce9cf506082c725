"""A table of the outcomes (`--json`) of fine-tuning in a directory.

    python finetune_table.py DIRECTORY
"""

import glob
import json
import os
import sys

ROWS = ["one rank", "dp 2", "tp 3", "pp 2", "dp 2, ZeRO 3", "dp 2, LoRA 8", "PyTorch, one process"]


def megabytes(count):
    return "-" if count is None else f"{count / 1e6:.0f}"


found = {os.path.basename(path)[: -len(".json")]: path for path in glob.glob(os.path.join(sys.argv[1], "*.json"))}
print("| | first loss | last loss | tokens/s | parameters, MB | gradients, MB | optimizer, MB |")
print("|---|---|---|---|---|---|---|")
for name in sorted(found, key=lambda name: ROWS.index(name) if name in ROWS else len(ROWS)):
    with open(found[name]) as file:
        run = json.load(file)
    held = run.get("bytes_held", {})
    cells = [
        name,
        f"{run['losses'][0]:.5f}",
        f"{run['losses'][-1]:.5f}",
        f"{run['tokens_per_second']:.1f}",
        *(megabytes(held.get(what)) for what in ("parameters", "gradients", "optimizer")),
    ]
    print("| " + " | ".join(cells) + " |")
