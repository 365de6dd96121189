#!/usr/bin/env bash
# Install the wheel and the sdist in clean environments of every Python given, and use them outside
# the repository: `bash tests/packaging/matrix.sh [3.10 3.11 ...]` (`make matrix`). Builds into
# dist/. PIP_ARGS goes to every pip install; QUICK=1 leaves the quickstart out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(3.10 3.11 3.12 3.13)

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
first=$(command -v "python${versions[0]}")
"$first" -m venv "$place/build"
"$place/build/bin/python" -m pip install --quiet build
rm -rf dist
"$place/build/bin/python" -m build --outdir dist . >"$place/build.log" 2>&1 ||
  { cat "$place/build.log" >&2; exit 1; }
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)

status=0
for number in "${versions[@]}"; do
  if ! command -v "python$number" >/dev/null; then
    echo "python$number: not on this machine"
    status=1
    continue
  fi
  for file in dist/*.whl dist/*.tar.gz; do
    env="$place/$number"
    rm -rf "$env"
    mkdir "$place/empty"
    log="$place/$number.log"
    if (
      set -e
      "python$number" -m venv "$env"
      # shellcheck disable=SC2086
      "$env/bin/python" -m pip install --quiet --constraint constraints.txt ${PIP_ARGS:-} "$root/$file"
      "$env/bin/python" -m pip check
      cd "$place/empty"
      "$env/bin/python" -c "import widemargin.trainer as t; assert t.__version__ == '$version', t"
      "$env/bin/python" -c "import widemargin.kernels.linear_logprob, widemargin.trainer.trainer"
      [ "$("$env/bin/widemargin" --version)" = "widemargin $version" ]
      [ -n "${QUICK:-}" ] || "$env/bin/widemargin" quickstart --num_train_epochs=1
    ) >"$log" 2>&1; then
      echo "python$number, $(basename "$file"): works"
    else
      echo "python$number, $(basename "$file"): fails"
      tail -n 20 "$log"
      status=1
    fi
    rm -rf "$place/empty"
  done
done
exit $status
