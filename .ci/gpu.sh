#!/usr/bin/env bash
# The GPU features, as far as they can be built and tested without a GPU: kernels on a software Vulkan device, and what users
# are told where CUDA or NCCL is missing. A feature set of its own, so burn is built once more, without optimisation.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }

if ! ldconfig -p | grep -q libvulkan_lvp && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "a software Vulkan device (Debian's mesa-vulkan-drivers)"
    apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null ||
        { apt-get update >/dev/null && apt-get install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 >/dev/null; }
fi

say "GPU features, with a stand-in for LLVM"
lock=$(mktemp)
cp Cargo.lock "$lock"
# The lock file names the real crate; the stand-in is only for here.
trap 'cp "$lock" Cargo.lock; rm -f "$lock"' EXIT
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp} CARGO_PROFILE_DEV_DEBUG=0
cargo test --features cuda-nvrtc,wgpu --config tools/no-llvm.toml --test nccl --test device_local --test kernels
