#!/bin/sh
# Checks burn-parallel on the GPU of this machine: finds libcuda, NCCL and NVRTC, starts the program `gpu_check` beside this
# script, prints a table, writes JSON. Needs no Rust, no compiler and no internet.
#
#   scripts/gpu.sh [gpu_check's options]      --device cuda|wgpu|flex, --only SECTION, --quick, --json FILE
#
# GPU_CHECK names the program, NCCL_LIBRARY a libnccl.so.2, where they are somewhere else. Exit code: 0 all passed, 1 something
# failed, 2 nothing failed but something did not run.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
program=${GPU_CHECK:-}
for candidate in "$here/gpu_check" "$here/../gpu_check" "$here/../target/release/examples/gpu_check"; do
    [ -n "$program" ] || [ ! -f "$candidate" ] || program=$candidate
done
if [ -z "$program" ] || [ ! -f "$program" ]; then
    echo "gpu_check is not beside this script; build and carry it as docs/gpu.md says, or name it with GPU_CHECK" >&2
    exit 1
fi
[ -x "$program" ] || chmod +x "$program"

links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT INT TERM

# Where a library lies: the loader's list, then folders where packages and Python's wheels put it.
find_library() {
    for folder in $(printf '%s' "${LD_LIBRARY_PATH:-}" | tr ':' ' '); do
        [ -e "$folder/$1" ] && { echo "$folder/$1"; return 0; }
    done
    path=$(ldconfig -p 2>/dev/null | awk -v name="$1" '$1 == name { print $NF; exit }')
    [ -n "$path" ] && { echo "$path"; return 0; }
    for folder in "$here" /usr/lib/x86_64-linux-gnu /usr/lib/aarch64-linux-gnu /usr/lib64 /usr/local/cuda/lib64 /usr/local/nvidia/lib64 \
        /usr/lib/wsl/lib; do
        [ -e "$folder/$1" ] && { echo "$folder/$1"; return 0; }
    done
    command -v python3 >/dev/null 2>&1 || return 1
    python3 - "$1" <<'PYTHON'
import glob, site, sys
folders = site.getsitepackages() + [site.getusersitepackages()]
found = [path for folder in folders for path in glob.glob(f"{folder}/nvidia/**/lib/{sys.argv[1]}", recursive=True)]
print(found[0] if found else "", end="")
sys.exit(not found)
PYTHON
}

if driver=$(find_library libcuda.so.1); then
    echo "libcuda: $driver"
    ln -s "$driver" "$links/libcuda.so"
    ln -s "$driver" "$links/libcuda.so.1"
else
    echo "libcuda: not found"
fi
# The loader is asked for libnccl.so; packages ship libnccl.so.2 only.
if nccl=${NCCL_LIBRARY:-$(find_library libnccl.so.2 || find_library libnccl.so)} && [ -n "$nccl" ]; then
    echo "NCCL:    $nccl"
    ln -s "$(cd "$(dirname "$nccl")" && pwd)/$(basename "$nccl")" "$links/libnccl.so"
else
    echo "NCCL:    not found (python3 -m pip install nvidia-nccl-cu12, or name it with NCCL_LIBRARY)"
fi
# burn compiles its kernels with it.
for name in libnvrtc.so.13 libnvrtc.so.12 libnvrtc.so; do
    if nvrtc=$(find_library "$name"); then
        echo "NVRTC:   $nvrtc"
        ln -s "$nvrtc" "$links/libnvrtc.so"
        folder=$(dirname "$nvrtc")
        # It loads its built-in headers from its own folder.
        LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        break
    fi
done
[ -n "${nvrtc:-}" ] || echo "NVRTC:   not found (python3 -m pip install nvidia-cuda-nvrtc-cu12, or set CUDA_PATH)"
command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

export LD_LIBRARY_PATH="$links${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# Several ranks on one GPU: NCCL 2.30 or newer. Older ones ignore it, and the rows that need it are skipped. With a GPU for
# each rank NCCL is left to choose how much of it to use.
export NCCL_MULTI_RANK_GPU_ENABLE="${NCCL_MULTI_RANK_GPU_ENABLE:-1}"
if [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -le 1 ]; then
    export NCCL_MAX_CTAS="${NCCL_MAX_CTAS:-4}"
fi
# Streams that wait for each other must not share a queue of the device.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"

code=0
"$program" "$@" || code=$?
exit "$code"
