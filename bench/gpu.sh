#!/usr/bin/env bash
# Test and benchmark the kernels on a GPU machine: bench/gpu.sh COMMIT OUTDIR
#
# Needs torch, triton, pytest and hypothesis in $PYTHON (default python3); no network, git or install. The package is
# found through a folder of links; wheels in .whl/, if any, are installed beside it (peers to compare with).
# Under nine minutes: each step has its own limit. OUTDIR gets at most eight files. Exit status 1: a step failed.
set -uo pipefail

if [ $# -ne 2 ]; then
    echo "usage: bench/gpu.sh COMMIT OUTDIR" >&2
    exit 2
fi
commit=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir "$site/widemargin"
for folder in kernels trainer configs; do
    ln -s "$PWD/$folder" "$site/widemargin/$folder"
done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1

shopt -s nullglob
wheels=(.whl/*.whl)
if [ ${#wheels[@]} -gt 0 ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "${wheels[@]}" || exit 2
fi

failed=0
step() { # NAME LIMIT_S COMMAND...
    local name=$1 limit=$2 status=0 start=$SECONDS
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    echo "$name: exit status $status after $((SECONDS - start)) s" | tee -a "$out/steps.log"
    tail -n 25 "$out/$name.log"
    [ "$status" -eq 0 ] || failed=1
}

: >"$out/steps.log"
step machine 30 "$python" -c '
import platform, torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(platform.python_version(), torch.__version__, triton.__version__)
print(torch.cuda.get_device_properties(0))'
if [ "$failed" -ne 0 ]; then
    exit 1
fi

tests=(tests/test_*linear_logprob*.py tests/test_*margin_loss*.py tests/test_*reference*.py
    tests/test_*kernel*.py tests/test_*triton*.py tests/test_*routing*.py)
# Most of the tests' time is Triton compiling: several processes where pytest-xdist is there.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
step tests 190 "$python" -m pytest -p no:cacheprovider "${parallel[@]}" -m "gpu or not slow" \
    "${tests[@]}"
step head 130 "$python" -m bench.head --device cuda --commit "$commit" --out "$out/head_cuda.json"
step head-extremes 120 "$python" -m bench.head --device cuda --commit "$commit" --repeats 5 \
    --case llama3-8b-shuffled llama3-8b-flat --out "$out/head_cuda_extremes.json"
exit "$failed"
