#!/usr/bin/env bash
# Everything that needs a CUDA device, in parts that each fit five minutes and need no network.
#
#   benchmarks/gpu_check.sh build    OUTDIR               compile the package for this machine's Python (needs nvcc)
#   benchmarks/gpu_check.sh prebuilt OUTDIR [WHEEL_DIR]   install a wheel that was built elsewhere (dist)
#   benchmarks/gpu_check.sh tests    OUTDIR               the tests marked cuda, on up to 8 processes
#   benchmarks/gpu_check.sh sanitize OUTDIR [TOOL...]     memcheck, racecheck, synccheck, initcheck, side by side
#   benchmarks/gpu_check.sh bench    OUTDIR [--quick]     bandwidth, whole runs, halting; without --quick also the full
#                                                         benchmarks, which go on where the part was stopped before
#   benchmarks/gpu_check.sh all      OUTDIR [--quick]     the above, with a build unless a package is there
#
# A wheel for another machine needs nvcc and the other machine's version of Python, but no GPU:
#
#   python3.12 -m pip wheel . --no-deps -w dist -C cmake.define.ADAPTCOMP_CUDA=ON
#
# The machine with the GPU needs a python3 (or $PYTHON) with torch, numpy, pytest, pytest-xdist and hypothesis; for `build` also
# pybind11, scikit-build-core, cmake, ninja and nvcc. Each part can be called alone: the package stays in $SITE
# (build/gpu_check/site) for the parts that follow, and a part that finds none there installs or builds one. OUTDIR gets at most
# eight files, of which summary.txt says what passed. The exit status is 0 if all did, on a device. STAGE_SECONDS limits each
# command (250).
set -uo pipefail

usage() {
  sed -n 's/^#   //p' "${BASH_SOURCE[0]}" | head -n 7 >&2
  exit 2
}
[ $# -ge 2 ] || usage
part=$1
case $part in build | prebuilt | tests | sanitize | bench | all) ;; *) usage ;; esac
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
shift 2
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
limit=${STAGE_SECONDS:-250}
site=${SITE:-$repo/build/gpu_check/site}
wheels=${WHEEL_DIR:-$repo/dist}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

say() { echo "$*" | tee -a "$out/summary.txt"; }

# stage NAME LOG COMMAND...: runs the command, appends its output to OUTDIR/LOG and its outcome to the summary.
stage() {
  local name=$1 log=$out/$2 begin=$SECONDS status
  shift 2
  echo "== $name: $*" >>"$log"
  # Interrupted, not killed: what has been measured and tested is then still written.
  timeout --signal=INT --kill-after=30 "$limit" "$@" >>"$log" 2>&1
  status=$?
  if [ $status -eq 0 ]; then
    say "ok      $name ($((SECONDS - begin)) s)"
  else
    failed=1
    [ $status -eq 124 ] && name="$name, after the $limit s that it has"
    say "FAILED  $name, status $status ($((SECONDS - begin)) s): $(basename "$log")"
    tail -n 30 "$log"
  fi
  return $status
}

fresh_site() { rm -rf "$site" && mkdir -p "$site"; }

install_wheel() {
  fresh_site && stage "install a wheel of $wheels" package.log "$python" -m pip install adaptcomp_ext --target "$site" \
    --no-index --find-links "$wheels" --no-deps --disable-pip-version-check
}

build_package() {
  fresh_site && stage build package.log "$python" -m pip install "$repo" --target "$site" --no-build-isolation --no-deps \
    --no-index --disable-pip-version-check -v -C build-dir="$repo/build/gpu_check/cmake" -C cmake.define.ADAPTCOMP_CUDA=ON
}

# The package in $site, from wherever it comes; then what it is, and the device.
have_package() {
  if [ -d "$site/adaptcomp_ext" ]; then
    :
  elif compgen -G "$wheels/adaptcomp_ext-*.whl" >/dev/null; then
    install_wheel || return 1
  else
    build_package || return 1
  fi
  check_package
}

check_package() {
  cat >"$work/check_package.py" <<'PY'
import sys

import torch

import adaptcomp_ext as ac

info = ac.build_info()
print(info, torch.__version__, torch.version.cuda, ac.__file__, sep="\n")
assert ac.__file__.startswith(sys.argv[1]), f"not the package of {sys.argv[1]}"
assert info["cuda"], "adaptcomp_ext was built without CUDA"
PY
  stage "import" package.log "$python" "$work/check_package.py" "$site" || return 1
  if ! diff -rq -x __pycache__ -x '*.so' -x '*.pyd' "$repo/adaptcomp_ext" "$site/adaptcomp_ext" >>"$out/package.log"; then
    failed=1
    say "FAILED  the package in $site was made from another state of the sources than these tests: package.log"
  fi
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
  if [ -n "$device" ]; then
    say "device  $device"
  else
    failed=1
    say "FAILED  no CUDA device: whatever needs one is skipped"
  fi
}

run_tests() {
  local across=() processes
  processes=$(nproc)
  "$python" -c 'import xdist' 2>/dev/null && across=(-n $((processes < 8 ? processes : 8)))
  rm -f "$out/tests.xml"
  stage tests tests.log "${pytest[@]}" "${across[@]}" -m cuda --junitxml="$out/tests.xml"
  cat >"$work/count_tests.py" <<'PY'
import sys
import xml.etree.ElementTree as tree

try:
    suite = tree.parse(sys.argv[1]).getroot().find("testsuite")
except (OSError, tree.ParseError):
    sys.exit("no results: the tests were stopped before tests.xml was written")
total, skipped, failed, errors = (int(suite.get(key)) for key in ("tests", "skipped", "failures", "errors"))
passed = total - skipped - failed - errors
print(f"{passed} tests passed on the device, {failed} failed, {errors} with an error, {skipped} skipped")
sys.exit(not passed or failed or errors)
PY
  local counts
  if counts=$("$python" "$work/count_tests.py" "$out/tests.xml" 2>&1); then
    say "        $counts"
  else
    failed=1
    say "FAILED  $(tail -n 1 <<<"$counts")"
  fi
}

# All tools at once: each spends most of its time on the host.
run_sanitizers() {
  local sanitizer toolkit tool
  sanitizer=$(command -v compute-sanitizer || true)
  for toolkit in "${CUDA_HOME:-/usr/local/cuda}" "$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /x/x)")")")"; do
    [ -z "$sanitizer" ] && [ -x "$toolkit/bin/compute-sanitizer" ] && sanitizer=$toolkit/bin/compute-sanitizer
  done
  if [ -z "$sanitizer" ]; then
    failed=1
    say "FAILED  sanitize: no compute-sanitizer on the PATH, in CUDA_HOME or beside nvcc"
    return
  fi
  [ $# -gt 0 ] || set -- memcheck racecheck synccheck initcheck
  for tool in "$@"; do
    # Without torch's allocator in between every tensor is its own allocation, and an access beyond one is seen.
    (
      out=$work/$tool
      mkdir -p "$out"
      stage "$tool" sanitize.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --target-processes all \
        --error-exitcode 86 "${pytest[@]}" -x -m "sanitizer and cuda" >/dev/null
    ) &
  done
  wait
  for tool in "$@"; do
    cat "$work/$tool/sanitize.log" >>"$out/sanitize.log"
    tee -a "$out/summary.txt" <"$work/$tool/summary.txt"
    grep -q ^FAILED "$work/$tool/summary.txt" && failed=1
    if [ -n "$device" ] && ! grep -qE '[0-9]+ passed' "$work/$tool/sanitize.log"; then
      failed=1
      say "FAILED  $tool: no test ran"
    fi
  done
}

run_benchmarks() {
  if [ -z "$device" ]; then
    say "        bench: skipped"
    return
  fi
  stage "bench: bandwidth, whole descents and recurrences, halting" bench.log "$python" "$repo/benchmarks/bench_gpu.py" --out "$out/bench.json"
  grep -E ' = ' "$out/bench.log" | sed 's/   (.*//; s/^/        /' | tee -a "$out/summary.txt"
  [ "${1:-}" = --quick ] && return
  for family in halting energy route recurrence; do
    stage "bench $family" bench.log "$python" "$repo/benchmarks/bench_$family.py" --device cuda --resume --out "$out/bench"
  done
}

# A tree without the package's sources: from the repository's root Python would import those, which have no compiled module.
prepare() {
  cp "$repo/pyproject.toml" "$work/"
  cp -r "$repo/tests" "$work/tests"
  cd "$work" || exit 2
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  # Nothing of the experiments runs on a device.
  pytest=("$python" -m pytest -p no:cacheprovider -q -rfE --ignore=tests/experiments)
}

say "== $part, $(date -u '+%Y-%m-%d %H:%M:%S') UTC"
device=
case $part in
  build) build_package && prepare && check_package ;;
  prebuilt)
    [ $# -eq 0 ] || wheels=$(cd "$1" && pwd) || exit 2
    install_wheel && prepare && check_package
    ;;
  *)
    prepare
    if have_package; then
      [ "$part" = tests ] && run_tests
      [ "$part" = sanitize ] && run_sanitizers "$@"
      [ "$part" = bench ] && run_benchmarks "$@"
      [ "$part" = all ] && { run_tests; run_sanitizers; run_benchmarks "$@"; }
    else
      say "FAILED  $part: no package to run it on"
      failed=1
    fi
    ;;
esac
exit $failed
