#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call and without a network: build, tests, sanitizers, benchmarks.
#
#   benchmarks/gpu_check.sh OUTDIR
#
# Needs nvcc, cmake, ninja and a python3 (or $PYTHON) with torch, pybind11, scikit-build-core, pytest and hypothesis. Logs and
# results go to OUTDIR. Every stage that can run does; the exit status tells whether all of them passed.
# STAGE_SECONDS limits each stage (600).
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
limit=${STAGE_SECONDS:-600}
failed=0
: >"$out/summary.txt"

# stage NAME LOG COMMAND...: runs the command, appends its output to OUTDIR/LOG and its outcome to the summary.
stage() {
  local name=$1 log=$out/$2 begin=$SECONDS status
  shift 2
  echo "== $name: $*" >>"$log"
  timeout "$limit" "$@" >>"$log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    echo "ok      $name ($((SECONDS - begin)) s)" | tee -a "$out/summary.txt"
  else
    failed=1
    echo "FAILED  $name, status $status ($((SECONDS - begin)) s): $(basename "$log")" | tee -a "$out/summary.txt"
    tail -n 30 "$log"
  fi
  return $status
}

# A tree without the package's sources: from the repository's root Python would import those, which have no compiled module.
cp "$repo/pyproject.toml" "$work/"
[ -d "$repo/tests" ] && cp -r "$repo/tests" "$work/tests"

stage build build.log "$python" -m pip install "$repo" --target "$work/site" --no-build-isolation --no-deps --no-index \
  --disable-pip-version-check -v -C build-dir="$work/build" -C cmake.define.ADAPTCOMP_CUDA=ON
cd "$work" || exit 2
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

cat >"$work/check_import.py" <<'PY'
import sys

import adaptcomp_ext as ac
import torch

info = ac.build_info()
print(info, torch.cuda.get_device_name() if torch.cuda.is_available() else "no device", ac.__file__, sep="\n")
assert ac.__file__.startswith(sys.argv[1]), "not the package that was just built"
assert info["cuda"], "built without CUDA"
assert torch.cuda.is_available(), "torch sees no CUDA device"
PY
if ! stage import build.log "$python" "$work/check_import.py" "$work/site"; then
  echo "FAILED  tests, sanitizers and benchmarks: nothing to run them on" | tee -a "$out/summary.txt"
  exit 1
fi

tests=("$python" -m pytest -p no:cacheprovider -rA -q)
stage tests tests.log "${tests[@]}" -m cuda

sanitizer=$(command -v compute-sanitizer || true)
for toolkit in "${CUDA_HOME:-/usr/local/cuda}" "$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /x/x)")")")"; do
  [ -z "$sanitizer" ] && [ -x "$toolkit/bin/compute-sanitizer" ] && sanitizer=$toolkit/bin/compute-sanitizer
done
# Without torch's allocator in between every tensor is its own allocation, and an access beyond one is seen.
for tool in memcheck racecheck; do
  stage "$tool" sanitizer.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${sanitizer:-compute-sanitizer}" --tool "$tool" \
    --target-processes all --error-exitcode 86 "${tests[@]}" -x -m sanitizer
done

stage "bench halting" bench.log "$python" -m adaptcomp_ext.experiments.cli bench halting --device cuda --out "$out/bench"
stage "bench energy" bench.log "$python" -m adaptcomp_ext.experiments.cli bench energy --device cuda --out "$out/bench"
stage "bench route" bench.log "$python" -m adaptcomp_ext.experiments.cli bench route --device cuda --out "$out/bench"

exit $failed
