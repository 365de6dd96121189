#!/usr/bin/env bash
# Gather the peers' packages into .whl/ for a GPU machine without network: bench/wheels.sh [--cute]
#
# Pure-Python wheels of the peers and of what TRL imports, about 3 MiB. With --cute also the compiler
# behind Liger's Hopper kernel: its wheels (97 MB) are repacked to one archive of 54 MiB, which takes
# some minutes, so that all of it travels in 64 MiB. `bench/gpu.sh` installs both.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(realpath -s "$(command -v "${PYTHON:-.venv/bin/python}")")
target=${TARGET_PYTHON:-3.12}
read -r -a pip_args <<<"${PIP_ARGS:-}"

download() { # FOLDER PACKAGE...
    "$python" -m pip download --quiet "${pip_args[@]}" --no-deps --only-binary=:all: \
        --python-version "$target" --implementation cp --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
        --constraint constraints.txt --dest "$@"
}

download .whl liger-kernel cut-cross-entropy trl datasets multiprocess dill
if [ "${1:-}" = --cute ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    download "$work" nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core \
        nvidia-cutlass-dsl-libs-cu13 apache-tvm-ffi
    (
        cd "$work"
        for wheel in *.whl; do
            "$python" -m zipfile -e "$wheel" site
        done
        rm -rf site/nvidia_cutlass_dsl/cu13/lib/stubs site/nvidia_cutlass_dsl/dsl_packages/iket
        tar -C site -c . | xz --x86 --lzma2=preset=9e,dict=256MiB,lc=0,lp=2,pb=2 -T1 >cute.tar.xz
    )
    mv "$work/cute.tar.xz" .whl/
fi
# The trainer's benchmark takes lengths of real pairs, and random tokens.
if [ -d ../shared/data ]; then
    "$python" -m bench.training --batch 8 --steps 61 --max-length 2048 --write-lengths .whl/lengths.json
fi
# Hidden states of the real model (`make real-model`), 58 MiB: with them `--cute` does not fit 64 MiB.
if [ "${1:-}" = --cute ] || [ ! -d build/SmolLM2-135M-Instruct ] || [ ! -d ../shared/data ]; then
    echo "no states of a real model in .whl: they need make real-model, ../shared/data, and no --cute" >&2
else
    "$python" -m bench.head.active --model build/SmolLM2-135M-Instruct \
        --pairs ../shared/data/judged_pairs_train.jsonl.gz --write-states .whl/SmolLM2-135M-Instruct.pt
fi
du -sm .whl
