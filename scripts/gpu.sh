#!/bin/sh
# Checks burn-parallel on the GPU of this machine: finds libcuda, NCCL and NVRTC, starts the program `gpu_check` beside this
# script, prints a table, writes JSON. Needs no Rust, no compiler and no internet.
#
#   scripts/gpu.sh [gpu_check's options]      --device cuda|wgpu|flex, --only SECTION, --quick, --json FILE, --seconds N
#
# It ends within 9 minutes, --seconds says otherwise. GPU_CHECK names the program, NCCL_LIBRARY a libnccl.so.2, CUDA_PATH a
# toolkit, where they are somewhere else. Exit code: 0 all passed, 1 something failed, 2 nothing failed but something did not
# run.
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
folders = sys.path[1:] + site.getsitepackages() + [site.getusersitepackages()]
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
    echo "NCCL:    not found (python3 -m pip install nvidia-nccl-cu12 or -cu13, or name it with NCCL_LIBRARY)"
fi
# burn compiles its kernels with it. A driver takes what the NVRTC of its own CUDA or of an older one has made.
cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9][0-9]*\).*/\1/p' | head -n 1)
case "${cuda:-13}" in
    11 | 12) names="libnvrtc.so.12 libnvrtc.so" ;;
    *) names="libnvrtc.so.13 libnvrtc.so.12 libnvrtc.so" ;;
esac
for name in $names; do
    if nvrtc=$(find_library "$name"); then
        echo "NVRTC:   $nvrtc"
        ln -s "$nvrtc" "$links/libnvrtc.so"
        folder=$(dirname "$nvrtc")
        # It loads its built-in headers from its own folder.
        LD_LIBRARY_PATH="$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        break
    fi
done
[ -n "${nvrtc:-}" ] || echo "NVRTC:   not found (see docs/gpu.md for the wheels that bring it, or set CUDA_PATH)"

# The kernels include headers of CUDA: those of a toolkit, or those of Python's wheels, put together in a folder as a toolkit has
# them.
gather_headers() {
    command -v python3 >/dev/null 2>&1 || return 1
    python3 - "$1" "$2" <<'PYTHON'
import glob, os, site, sys
to, nvrtc = sys.argv[1:]
folders = sys.path[1:] + site.getsitepackages() + [site.getusersitepackages()]
# Wheels of CUDA 13 share one folder; those of CUDA 12 have one each.
wheels = ["cu13"] if nvrtc.endswith(".13") else ["cuda_runtime", "cuda_nvrtc", "cuda_nvcc", "cuda_cccl"]
found = [path for folder in folders for wheel in wheels for path in glob.glob(f"{folder}/nvidia/{wheel}/include")]
os.makedirs(to)
for path in found:
    for name in os.listdir(path):
        if not os.path.exists(f"{to}/{name}"):
            os.symlink(f"{path}/{name}", f"{to}/{name}")
sys.exit(not os.path.exists(f"{to}/cuda_fp16.h"))
PYTHON
}
headers=
for folder in "${CUDA_PATH:-}" /usr/local/cuda /opt/cuda /usr; do
    [ -n "$headers" ] || [ -z "$folder" ] || [ ! -e "$folder/include/cuda_fp16.h" ] || headers=$folder
done
if [ -z "$headers" ] && [ -n "${nvrtc:-}" ] && gather_headers "$links/cuda/include" "$nvrtc"; then
    headers=$links/cuda
fi
if [ -n "$headers" ]; then
    echo "headers: $headers/include"
    export CUDA_PATH="$headers"
else
    echo "headers: not found (see docs/gpu.md for the wheels that bring them, or set CUDA_PATH)"
fi
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
# NCCL says what it refuses, and why.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# In the background, so that a signal ends it: its sections end with it.
"$program" "$@" &
started=$!
trap 'kill "$started" 2>/dev/null; rm -rf "$links"; exit 1' INT TERM
code=0
wait "$started" || code=$?
exit "$code"
