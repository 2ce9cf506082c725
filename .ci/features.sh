#!/usr/bin/env bash
# The part of the gate that is built with MPI and `finetune`: the transport suite under mpirun, train_lm on processes, the
# fine-tuning program. Installs Open MPI and libclang from Debian's packages where they are missing. Called by run, with the
# same profile and features of burn.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/steps.sh

missing=()
command -v mpicc > /dev/null || missing+=(libopenmpi-dev)
command -v mpirun > /dev/null || missing+=(openmpi-bin)
# bindgen reads MPI's header with it. libclang-cpp, which comes with other packages, is another library.
if ! ldconfig -p | grep -E 'libclang(-[0-9.]+)?\.so' > /dev/null &&
    ! compgen -G '/usr/lib/llvm-*/lib/libclang.so*' > /dev/null && ! compgen -G '/usr/lib/llvm-*/lib/libclang-[0-9]*.so*' > /dev/null; then
    missing+=(libclang-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
    step "installing ${missing[*]}"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "MPI is not tested: ${missing[*]} missing, and this is not root on Debian. Install them and run this again." >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

features=(--features mpi,finetune)
# Lints of what the features change come with its build, and those of the benches, which nothing else compiles.
step "MPI, fine-tuning, benches: build and documentation"
cargo build "${features[@]}" --example train_lm --example finetune --benches
DOC_TESTS=no cargo test "${features[@]}" --doc

# What the features change: everything else has been tested without them.
step "MPI and fine-tuning: transport suite, train_lm, finetune"
.ci/test "${features[@]}" --test transport_mpi --test finetune
.ci/test "${features[@]}" --test cli -- mpi ways_to_start
