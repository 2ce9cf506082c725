"""Steps of one rank and of two, by turns: eager burn, captured operation by operation, captured and fused, split over two ranks, as two
replicas, and PyTorch; tables of ratios.

    python scripts/captured_step.py [mlp] [gpt] [--rounds N] [--save-baseline NAME] [--baseline NAME] [--compile] [--program PATH]

The models are those of benches/models: an MLP of 33.6 million parameters with SGD, and a GPT of 5.3 million with Adam. Each round runs the
bench `tensor_parallel` for one round and then PyTorch (scripts/torch_step.py) in processes of its own, with one thread a rank; what is
printed are medians over the rounds: of processor time of one rank, and of wall time of two, each over PyTorch's two. `--save-baseline` keeps
them in target/performance/NAME.json, and `--baseline` compares with what was kept, so two commits are measured with the same
commands. PyTorch is left out where it is not installed; `--compile` adds `torch.compile`, and `--program` names a bench that was built
already.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = ROOT / "target" / "performance"
# What the bench calls it: processor time of one rank, wall time of two.
WORK = {
    "eager burn": "eager, work",
    "captured, operation by operation": "captured, one by one, work",
    "captured, fused": "captured, fused, work",
    "each of two ranks, fused": "two ranks, fused, work",
    "each of two replicas, fused": "two replicas, fused, work",
}
WALL = {"tensor parallel, wall": "two ranks, fused, time", "data parallel, wall": "two replicas, fused, time"}


def torch_step(name, way):
    """Wall and processor time of a step in PyTorch; none without it, or where it cannot compile."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
    command = [sys.executable, str(ROOT / "scripts" / "torch_step.py"), name, way]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    return [float(word) for word in run.stdout.split()[-2:]] if run.returncode == 0 else [None, None]


def bench_step(program, name):
    """What the bench measured in one round, by way."""
    command = [program] if program else ["cargo", "bench", "--bench", "tensor_parallel", "--"]
    # The bench keeps the figures that a run does not take.
    shutil.rmtree(KEPT / ".round", ignore_errors=True)
    subprocess.run([*command, name, "1", "--save-baseline", ".round"], stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (KEPT / ".round" / "tensor_parallel.jsonl").read_text().splitlines()]
    found = {line["figure"]: line["value"] for line in lines}
    return {way: found[f"{name}: {figure}"] for way, figure in (WORK | WALL).items()}


def measure(options, name):
    rounds = []
    for _ in range(options.rounds):
        times = bench_step(options.program, name)
        times["PyTorch"] = torch_step(name, "one")[1]
        if options.compile:
            times["PyTorch, compiled"] = torch_step(name, "compiled")[1]
        times["PyTorch, tensor parallel, wall"] = torch_step(name, "tp")[0]
        times["PyTorch, data parallel, wall"] = torch_step(name, "ddp")[0]
        rounds.append({way: took for way, took in times.items() if took is not None})
    return {way: statistics.median(took[way] for took in rounds) for way in rounds[0]}


def table(found, before):
    names = list(found)
    print("| processor time of a step (of two ranks: wall time) | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for way in found[names[0]]:
        cells = []
        for name in names:
            took, was = found[name].get(way), before.get(name, {}).get(way)
            change = f" ({took / was:.2f} of before)" if took and was else ""
            cells.append(f"{took:.0f} ms{change}" if took else "-")
        print(f"| {way} | " + " | ".join(cells) + " |")
    one = ["captured, operation by operation", "eager burn", "PyTorch", "PyTorch, compiled"]
    pairs = [("captured, fused", over) for over in one] + [(way, f"PyTorch, {way}") for way in WALL]
    pairs += [("captured, fused", "each of two ranks, fused"), ("each of two replicas, fused", "captured, fused")]
    for way, over in pairs:
        if any(over in found[name] for name in names):
            ratios = (f"{found[name][way] / found[name][over]:.2f}" if over in found[name] else "-" for name in names)
            print(f"| **{way}, over {over}** | " + " | ".join(ratios) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="mlp, gpt: both if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save-baseline")
    parser.add_argument("--baseline")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--program")
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in ("mlp", "gpt")]
    if unknown:
        parser.error(f"there is no model {unknown[0]}, but mlp and gpt")
    if options.rounds < 1:
        parser.error("--rounds: there is one at least")
    kept = KEPT / f"{options.baseline}.json"
    if options.baseline and not kept.exists():
        parser.error(f"--baseline {options.baseline}: there is no {kept}: --save-baseline {options.baseline} keeps it")
    if options.program:
        options.program = os.path.abspath(options.program)
    before = json.loads(kept.read_text()) if options.baseline else {}
    found = {name: measure(options, name) for name in options.models or ["mlp", "gpt"]}
    table(found, before)
    print(f"\nload averages {' '.join(f'{load:.1f}' for load in os.getloadavg())}, {os.cpu_count()} processors, {options.rounds} rounds")
    if options.save_baseline:
        KEPT.mkdir(parents=True, exist_ok=True)
        (KEPT / f"{options.save_baseline}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
