#!/usr/bin/env bash
# Test, benchmark and tune the kernels on a GPU machine: bench/gpu.sh COMMIT OUTDIR [STEP ...]
#
# Needs torch, triton, pytest and hypothesis in $PYTHON (default python3), and transformers and accelerate for TRL's head
# and for training; no network, git or install. The package is found through a folder of links. What `make wheels` put
# into .whl/ is unpacked beside it: the peers to compare with, datasets, and a real model's hidden states.
# Steps, in order: machine checks real ours head tune tests shapes; and, only when named, training-1b training-8b training-flex, which
# need the lengths that `make wheels` writes, and scaling. Each has its own limit, and together they end within TOTAL_S
# seconds (default 525); JSON is written case by case, so a step that is cut keeps its rows. OUTDIR gets at most eight
# files. The JSON, put into bench/results/, shows on docs/results.md after `python -m bench.report`.
# Exit status 1: a step failed or was cut.
set -uo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bench/gpu.sh COMMIT OUTDIR [STEP ...]" >&2
    exit 2
fi
commit=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
default="machine checks real ours head tune tests shapes"
steps=" ${*:-$default} "
known=" $default training-1b training-8b training-flex scaling "
for name in $steps; do
    case $known in *" $name "*) ;; *) echo "unknown step: $name; known:$known" >&2; exit 2 ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
total=${TOTAL_S:-525}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/widemargin"
for folder in kernels trainer integrations configs; do
    ln -s "$PWD/$folder" "$site/widemargin/$folder"
done
export PYTHONPATH="$site:$site/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1

shopt -s nullglob
wheels=(.whl/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "${wheels[@]}" || exit 2
fi
for archive in .whl/*.tar.xz; do
    "$python" -m tarfile -e "$archive" "$site" || exit 2
done

failed=0
step() { # NAME LIMIT_S COMMAND...
    local name=$1 limit=$2 status=0 start=$SECONDS
    shift 2
    case $steps in *" $name "*) ;; *) return ;; esac
    if [ "$limit" -gt $((total - SECONDS)) ]; then
        limit=$((total - SECONDS))
    fi
    if [ "$limit" -lt 5 ]; then
        echo "$name: no time left" | tee -a "$out/log.txt"
        failed=1
        return
    fi
    echo "== $name" >>"$out/log.txt"
    timeout --kill-after=10 "$limit" "$@" >"$site/log" 2>&1 || status=$?
    cat "$site/log" >>"$out/log.txt"
    echo "== $name: exit status $status after $((SECONDS - start)) s" | tee -a "$out/log.txt"
    tail -n 40 "$site/log"
    [ "$status" -eq 0 ] || failed=1
}

step machine 40 "$python" -c '
import platform, torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(platform.python_version(), torch.__version__, triton.__version__)
print(torch.cuda.get_device_properties(0))
from bench.head.command import show_choices
show_choices("cuda")'
if [ "$failed" -ne 0 ]; then
    exit 1
fi

# Most of the tests' time is Triton compiling: several processes where pytest-xdist is there.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 12)
# Half precision against fp64, and Triton against torch, before any time is measured.
step checks 100 "$python" -m pytest -p no:cacheprovider "${parallel[@]}" tests/kernels/test_triton_half.py \
    tests/kernels/test_backends_agree.py tests/kernels/test_extras.py

ours=(full-logits widemargin-triton-mean widemargin-triton-exact widemargin-triton-mean-tma
    widemargin-triton-mean-cublas)
peers=(torch-linear-cross-entropy trl-chunked liger-scaled-ce liger-simpo liger-ce-mean liger-ce
    cut-cross-entropy cut-cross-entropy-exact)
head=("$python" -m bench.head --device cuda --commit "$commit")
# The figures that matter most first, and without the peers: one that breaks the device's context takes all with it.
states=.whl/SmolLM2-135M-Instruct.pt
if [ -f "$states" ]; then
    step real 60 "${head[@]}" --states "$states" --repeats 5 --budget-s 8 --providers "${ours[@]}" --out "$out/head_real.json"
elif [[ $steps = *" real "* ]]; then
    echo "real: skipped; make real-model wheels writes $states" | tee -a "$out/log.txt"
fi
step ours 100 "${head[@]}" --repeats 5 --budget-s 10 --providers "${ours[@]}" --out "$out/head_ours.json"
step head 130 "${head[@]}" --repeats 10 --budget-s 20 --providers "${ours[@]}" "${peers[@]}" --out "$out/head.json"
step tune 120 "$python" -m bench.compile.tune --dtype bf16 --kernel-s 18 --processes 12 --commit "$commit" --out "$out/tune.json"

step tests 150 "$python" -m pytest -p no:cacheprovider "${parallel[@]}" -m "gpu or not slow" \
    tests/kernels tests/bench/test_forwards.py --ignore-glob='*test_triton_compile*'

shapes=(llama3-1b gemma2-2b qwen2.5-7b llama3-8b-16k)
cases=("${shapes[@]}" llama3-8b-shuffled llama3-8b-flat "${shapes[@]/%/-shuffled}" "${shapes[@]/%/-flat}")
step shapes 300 "${head[@]}" --repeats 5 --budget-s 4 --case "${cases[@]}" --providers "${ours[@]}" "${peers[@]}" \
    --out "$out/head_shapes.json"

# Whole training steps, in a run of their own: bench/gpu.sh COMMIT OUTDIR machine training-1b training-8b
training=("$python" -m bench.training --device cuda --dtype bfloat16 --checkpointing --batch 8 --rounds 1 --lengths .whl/lengths.json
    --max-length 2048 --append --commit "$commit" --out "$out/training.json")
layouts=(widemargin-padded widemargin-packed widemargin-prefix_shared)
step training-1b 260 "${training[@]}" --shape llama-1b --contenders "${layouts[@]}" trl-cpo
step training-8b 300 "${training[@]}" --shape llama-8b --steps 8 --contenders "${layouts[@]}" trl-cpo
step training-flex 240 "${training[@]}" --shape llama-1b --attention flex_attention --warmup 6 \
    --contenders "${layouts[@]:1}"

step scaling 300 "$python" -m bench.scaling --device cuda --commit "$commit" --out "$out/scaling.json"

exit "$failed"
