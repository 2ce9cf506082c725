#!/usr/bin/env bash
# The GPU features, as far as they can be built and tested without a GPU: kernels on a software Vulkan device, and what users
# are told where CUDA or NCCL is missing. A feature set of its own, so burn is built once more; with `build` that is all,
# and with `install` only what tests need of the system is put there.
# Every test of Cargo.toml that requires one of these features is run: a new one needs no line here.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/steps.sh

if ! ldconfig -p | grep libvulkan_lvp > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    step "a software Vulkan device (Debian's mesa-vulkan-drivers)"
    apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null ||
        { apt-get update >/dev/null && apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null; }
fi

[ "${1:-}" != install ] || exit 0

# In a copy and a target folder of its own, where the stand-in for LLVM may change the lock file, and beside the rest of the
# gate: next to nothing that is built here is of use there.
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR=$target/gpu
mkdir -p "$CARGO_TARGET_DIR/source"
tar -c --exclude="./${target#"$PWD/"}" --exclude=./.git . | tar -x -C "$CARGO_TARGET_DIR/source"
cd "$CARGO_TARGET_DIR/source"

export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}
# Compiling CubeCL and wgpu with optimisation takes far longer than what it saves in these tests.
features=(--features cuda-nvrtc,wgpu --config tools/no-llvm.toml --config 'profile.dev.package."*".opt-level=0')
export CARGO_PROFILE_DEV_OPT_LEVEL=0

mapfile -t tests < <(awk '
    /^\[/ { kind = $0 }
    /^name = / { gsub(/"/, ""); name = $3 }
    kind == "[[test]]" && /^required-features/ && /"(cuda|cuda-nvrtc|wgpu|cubecl)"/ { print name }' Cargo.toml)
step "GPU features, with a stand-in for LLVM: build and documentation, for tests ${tests[*]}"
# One of the tests starts train_lm.
cargo build "${features[@]}" --example train_lm --example gpu_check
# Not the unit tests: what they are about needs none of these features (src/sources/features.rs makes sure of it).
cargo test "${features[@]}" --no-run "${tests[@]/#/--test=}"
DOC_TESTS=no cargo test "${features[@]}" --doc
[ "${1:-}" != build ] || exit 0

# Beside each other: a process has one thread for each part of its device, which compiles kernels one after the other.
step "GPU features: tests ${tests[*]}, and the check program on the software Vulkan device"
checked=$(mktemp -d)
cargo run "${features[@]}" --example gpu_check -- --device wgpu --quick --json "$checked/json" &> "$checked/said" &
check=$!
trap 'code=$?; kill "$check" 2> /dev/null || true; cat "$checked/said"; rm -rf "$checked"; end_script "$code"' EXIT
failed=0 code=0
.ci/test "${features[@]}" "${tests[@]/#/--test=}" || failed=$?
wait "$check" || code=$?
trap end_script EXIT
cat "$checked/said"
rm -rf "$checked"
[ "$failed" = 0 ] || exit "$failed"
# 2: rows that need NCCL did not run.
[ "$code" = 0 ] || [ "$code" = 2 ] || exit "$code"
