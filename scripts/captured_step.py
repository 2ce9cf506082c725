"""Steps of one rank: eager burn, captured operation by operation, captured and fused, and PyTorch, by turns; a table of ratios.

    python scripts/captured_step.py [mlp] [gpt] [--rounds N] [--save-baseline NAME] [--baseline NAME] [--compile] [--program PATH]

The models are those of benches/models: an MLP of 33.6 million parameters with SGD, and a GPT of 5.3 million with Adam. Each round runs the
bench `tensor_parallel` for one round and then PyTorch in a process of its own, with one thread; what is printed are medians over the
rounds, of processor time. `--save-baseline` keeps them in target/performance/NAME.json, and `--baseline` compares with what was kept, so
two commits are measured with the same commands. PyTorch is left out where it is not installed; `--compile` adds `torch.compile`, and
`--program` names a bench that was built already.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS = ["eager burn", "captured, operation by operation", "captured, fused", "each of two ranks, fused"]
LINE = re.compile(r": work ([\d.]+) ms, graph ([\d.]+) ms, fused ([\d.]+) ms, each of two ranks ([\d.]+) ms")


def reference(name, compiled):
    """Milliseconds of processor time that a step takes in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as f

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

        def forward(self, x):
            rows, length, _ = x.shape
            heads = (part(x).view(rows, length, 8, 32).transpose(1, 2) for part in self.parts[:3])
            x = f.scaled_dot_product_attention(*heads, is_causal=True)
            return self.parts[3](x.transpose(1, 2).reshape(rows, length, 256))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(256) for _ in range(2))
            self.attention, self.up, self.down = Attention(), nn.Linear(256, 1024), nn.Linear(1024, 256)

        def forward(self, x):
            x = x + self.attention(self.norms[0](x))
            return x + self.down(f.gelu(self.up(self.norms[1](x))))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(4096, 256), nn.Embedding(128, 256)
            self.blocks = nn.Sequential(*(Block() for _ in range(4)))
            self.norm, self.head = nn.LayerNorm(256), nn.Linear(256, 4096)

        def forward(self, tokens):
            x = self.tokens(tokens) + self.positions(torch.arange(128))
            return self.head(self.norm(self.blocks(x))).flatten(0, 1)

    if name == "mlp":
        layers = [layer for _ in range(4) for layer in (nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))]
        model, loss = nn.Sequential(*layers), f.mse_loss
        inputs, targets = torch.randn(32, 1024), torch.randn(32, 1024)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    else:
        model, loss = Gpt(), f.cross_entropy
        inputs, targets = torch.randint(0, 4096, (8, 128)), torch.randint(0, 4096, (1024,))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    run = torch.compile(model) if compiled else model
    times = []
    for step in range(9):
        began = time.process_time()
        loss(run(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 3:
            times.append(time.process_time() - began)
    print(1e3 * statistics.median(times))


def torch_step(name, *more):
    """The same in a process of its own; none without PyTorch, or where it cannot compile."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    run = subprocess.run([sys.executable, __file__, "--reference", name, *more], capture_output=True, text=True, env=environment)
    return float(run.stdout.split()[-1]) if run.returncode == 0 else None


def bench_step(program, name):
    """What the bench measured in one round, by way."""
    command = [program] if program else ["cargo", "bench", "--bench", "tensor_parallel", "--"]
    out = subprocess.run([*command, name, "1"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return dict(zip(WAYS, map(float, LINE.search(out).groups())))


def measure(options, name):
    rounds = []
    for _ in range(options.rounds):
        times = bench_step(options.program, name)
        times["PyTorch"] = torch_step(name)
        if options.compile:
            times["PyTorch, compiled"] = torch_step(name, "--compile")
        rounds.append({way: took for way, took in times.items() if took is not None})
    return {way: statistics.median(took[way] for took in rounds) for way in rounds[0]}


def table(found, before):
    names = list(found)
    print("| processor time of a step | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for way in found[names[0]]:
        cells = []
        for name in names:
            took, was = found[name].get(way), before.get(name, {}).get(way)
            change = f" ({took / was:.2f} of before)" if took and was else ""
            cells.append(f"{took:.0f} ms{change}" if took else "-")
        print(f"| {way} | " + " | ".join(cells) + " |")
    for over in ["captured, operation by operation", "eager burn", "PyTorch", "PyTorch, compiled"]:
        if any(over in found[name] for name in names):
            ratios = (f"{found[name]['captured, fused'] / found[name][over]:.2f}" if over in found[name] else "-" for name in names)
            print(f"| **captured, fused, over {over}** | " + " | ".join(ratios) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="mlp, gpt: both if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save-baseline")
    parser.add_argument("--baseline")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--program")
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference:
        return reference(options.reference, options.compile)
    kept = ROOT / "target" / "performance"
    before = json.loads((kept / f"{options.baseline}.json").read_text()) if options.baseline else {}
    found = {name: measure(options, name) for name in options.models or ["mlp", "gpt"]}
    table(found, before)
    print(f"\nload averages {' '.join(f'{load:.1f}' for load in os.getloadavg())}, {os.cpu_count()} processors, {options.rounds} rounds")
    if options.save_baseline:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{options.save_baseline}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
