#!/usr/bin/env bash
# The GPU features, as far as they can be built and tested without a GPU: kernels on a software Vulkan device, and what users
# are told where CUDA or NCCL is missing. A feature set of its own, so burn is built once more, without optimisation.
# Every test of Cargo.toml that requires one of these features is run: a new one needs no line here.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }

if ! ldconfig -p | grep -q libvulkan_lvp && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "a software Vulkan device (Debian's mesa-vulkan-drivers)"
    apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null ||
        { apt-get update >/dev/null && apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null; }
fi

lock=$(mktemp)
cp Cargo.lock "$lock"
# The lock file names the real crate; the stand-in is only for here.
trap 'cp "$lock" Cargo.lock; rm -f "$lock"' EXIT
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp} CARGO_PROFILE_DEV_DEBUG=0
features=(--features cuda-nvrtc,wgpu --config tools/no-llvm.toml)

mapfile -t tests < <(awk '
    /^\[/ { kind = $0 }
    /^name = / { gsub(/"/, ""); name = $3 }
    kind == "[[test]]" && /^required-features/ && /"(cuda|cuda-nvrtc|wgpu|cubecl)"/ { print name }' Cargo.toml)
say "GPU features, with a stand-in for LLVM: tests ${tests[*]}"
# One of the tests starts it.
cargo build "${features[@]}" --example train_lm
cargo test "${features[@]}" "${tests[@]/#/--test=}"
cargo test "${features[@]}" --lib comm::

say "GPU features: the check program, on the software Vulkan device"
json=$(mktemp)
code=0
cargo run "${features[@]}" --example gpu_check -- --device wgpu --quick --json "$json" || code=$?
rm -f "$json"
# 2: rows that need NCCL did not run.
[ "$code" = 0 ] || [ "$code" = 2 ] || exit "$code"

say "GPU features: lints and documentation"
cargo clippy "${features[@]}" --lib --examples "${tests[@]/#/--test=}" -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc "${features[@]}" --no-deps
