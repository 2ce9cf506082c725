"""The speed of `examples/finetune` beside PyTorch with `transformers`, on the same cores, by turns.

    python finetune_speed.py FINETUNE MODEL TEXT [ROUNDS [SEQ BATCH STEPS]]

FINETUNE is the program, MODEL a Hugging Face directory, TEXT a plain text. Each contender makes the same steps of AdamW on rows of one length;
in each round all run one behind the other, so that what else the machine does falls on all. One rank has one core and one thread; two
ranks have two. Of a run its steps but the first count, which captures and allocates. The table has medians over rounds: tokens a second,
tokens a second of processor time, of all ranks together, which is what can be compared on a machine that others use, and the seconds from
the start of the program to its first step, of which reading the weights is a part. Needs torch, transformers and, for the two-process row, gloo.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

finetune, model, text = sys.argv[1:4]
rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 3
SEQ, BATCH, STEPS = map(int, sys.argv[5:8]) if len(sys.argv) > 5 else (128, 4, 4)
here = os.path.dirname(os.path.abspath(__file__))
out = tempfile.mkdtemp()


def burn(*flags):
    return [finetune, "--model", model, "--data", text, "--seq", SEQ, "--batch", BATCH, "--steps", STEPS, "--lr", "1e-4"] + \
        ["--scheduler", "constant", "--seed", 1, "--json", f"{out}/run.json", *flags]


def torch(ranks):
    script = [f"{here}/finetune_reference.py", model, text, SEQ, BATCH, STEPS, f"{out}/run.json", 1]
    if ranks == 1:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, *script]


CONTENDERS = {
    "one rank": (1, burn()),
    "PyTorch, one process": (1, torch(1)),
    "dp 2": (2, burn("--dp", 2)),
    "PyTorch DDP, two processes": (2, torch(2)),
    "tp 2": (2, burn("--tp", 2)),
    "pp 2": (2, burn("--pp", 2, "--micro-batch", 1)),
    "dp 2, ZeRO 3": (2, burn("--dp", 2, "--zero", 3)),
}


def run(cores, command):
    # One thread on a core of its own; where two are asked for, the first two.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    environment |= {"OMP_NUM_THREADS": "1"}
    allowed = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:cores])
    subprocess.run(["taskset", "-c", allowed, *map(str, command)], env=environment, check=True, capture_output=True)
    with open(f"{out}/run.json") as file:
        said = json.load(file)
    per = lambda seconds: len(seconds[1:]) * BATCH * SEQ / sum(seconds[1:])
    return per(said["step_seconds"]), per(said["step_processor_seconds"]), said["seconds_to_first_step"], os.getloadavg()[0]


found = {name: [] for name in CONTENDERS}
for number in range(rounds):
    for name, (cores, command) in CONTENDERS.items():
        found[name].append(run(cores, command))
        print(f"round {number + 1}, {name}: " + ", ".join(f"{value:.2f}" for value in found[name][-1]), file=sys.stderr)
median = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in found.items()}
print(f"rows of {SEQ} tokens, {BATCH} a step, {STEPS} steps, {rounds} rounds\n")
print("| | tokens/s | of one rank | tokens/s of processor time | seconds to the first step | load of the machine |")
print("|---|---|---|---|---|---|")
for name, (speed, processor, start, load) in median.items():
    of = median["PyTorch, one process" if "PyTorch" in name else "one rank"][0]
    print(f"| {name} | {speed:.1f} | {speed / of:.2f} | {processor:.1f} | {start:.1f} | {load:.1f} |")
