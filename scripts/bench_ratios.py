"""The ratios of all figures of the benches between two baselines, as a table for each bench.

    cargo bench --bench tensor_parallel -- --save-baseline before       # at one commit, for any of the benches
    cargo bench --bench tensor_parallel -- --save-baseline after        # at another
    python scripts/bench_ratios.py before after

Benches keep figures in target/performance/NAME/*.jsonl; Criterion keeps times in target/criterion/*/NAME/estimates.json, of which
the medians count; scripts/captured_step.py keeps processor times in target/performance/NAME.json, scripts/finetune_speed.py its own as
benches do.
"""

import argparse
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent / "target"


def kept(name):
    """Values and units by bench and figure."""
    found = {}
    for file in sorted((ROOT / "performance" / name).glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.stem] = {line["figure"]: (line["value"], line["unit"]) for line in lines}
    for file in sorted((ROOT / "criterion").glob(f"**/{name}/estimates.json")):
        group, *rest = file.parent.parent.relative_to(ROOT / "criterion").parts
        median = json.loads(file.read_text())["median"]["point_estimate"]
        found.setdefault(group, {})["/".join(rest) or group] = (median / 1e3, "us")
    steps = ROOT / "performance" / f"{name}.json"
    if steps.exists():
        for model, times in json.loads(steps.read_text()).items():
            found.setdefault("captured_step.py", {}).update({f"{model}: {way}": (took, "ms") for way, took in times.items()})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    options = parser.parse_args()
    before, after = kept(options.before), kept(options.after)
    for name, found in (options.before, before), (options.after, after):
        if not found:
            raise SystemExit(f"bench_ratios.py: no bench has kept a baseline `{name}` in {ROOT}: cargo bench --bench NAME -- --save-baseline {name}")
    if not before.keys() & after.keys():
        raise SystemExit(f"bench_ratios.py: {options.before} is of {sorted(before)}, and {options.after} of {sorted(after)}")
    for bench in sorted(before.keys() & after.keys()):
        print(f"\n| {bench} | {options.before} | {options.after} | {options.after} over {options.before} |\n|---|---|---|---|")
        for figure in sorted(before[bench].keys() & after[bench].keys()):
            (was, unit), (now, _) = before[bench][figure], after[bench][figure]
            ratio = f"{now / was:.3f}" if was else "-"
            print(f"| {figure} | {was:.4g} {unit} | {now:.4g} {unit} | {ratio} |")
    only = sorted(before.keys() ^ after.keys())
    if only:
        print("\nOnly in one of them: " + ", ".join(only))


if __name__ == "__main__":
    main()
