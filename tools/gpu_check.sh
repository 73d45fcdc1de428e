#!/usr/bin/env bash
# Check and measure the code on a GPU, in at most six minutes. Prints a summary at the end.
#
#     tools/gpu_check.sh [--tiny]
#
# --tiny: small sizes; also works without a GPU. Environment variables:
#   IMAGES          folder with train/ and test/; without it the parts `epoch` and `rows` are skipped
#   OUT             folder of the results (default results/gpu/<name of the GPU>)
#   PYTHON          the Python to use (default python3)
#   PARTS           the parts to run (default "tests steps runs epoch students rows")
#   SECONDS_<PART>  time limit of a part in seconds
#   MODES           methods, separated by commas (default all)
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
tiny=${1:-}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
out=${OUT:-results/gpu/$(echo "${gpu:-cpu}" | tr ' /' '__')}
parts=${PARTS:-tests steps runs epoch students rows}
mkdir -p "$out"
# a part stops by itself at its limit; `timeout` kills it if it still runs 20 seconds later
check() {
    local limit=$1
    shift
    timeout --kill-after 10 $((limit + 20)) "$python" tools/gpu_check.py "$@" --out "$out" $tiny
}
has_part() { [[ " $parts " == *" $1 "* ]]; }

{ nvidia-smi; "$python" -V; "$python" -m pip list 2>/dev/null | grep -i -E '^(torch|torchvision|numpy|timm|pytest) '; } \
    >"$out/versions.txt" 2>&1
if has_part tests; then
    timeout "${SECONDS_TESTS:-100}" "$python" -m pytest -q -n "${TEST_JOBS:-6}" tests/test_cuda.py >"$out/tests.log" 2>&1
    tail -n 40 "$out/tests.log"
fi
if has_part steps; then
    limit=${SECONDS_STEPS:-130}
    check "$limit" steps --seconds "$limit" ${MODES:+--modes "$MODES"} ${STEPS:+--steps "$STEPS"} ${PAIRS:+--pairs "$PAIRS"} >"$out/steps.log" 2>&1
    tail -n 3 "$out/steps.log"
fi
if has_part runs; then
    check "${SECONDS_RUNS:-60}" runs --seconds "${SECONDS_RUNS:-60}" --jobs "${JOBS:-12}" ${MODES:+--modes "$MODES"} >"$out/runs.log" 2>&1
    tail -n 30 "$out/runs.log"
fi
if has_part epoch && [ -n "${IMAGES:-}" ]; then
    check "${SECONDS_EPOCH:-70}" epoch --img_root "$IMAGES" >"$out/epoch.log" 2>&1
    tail -n 12 "$out/epoch.log"
fi
if has_part students; then
    check "${SECONDS_STUDENTS:-40}" students --seconds "${SECONDS_STUDENTS:-40}" >"$out/students.log" 2>&1
    tail -n 3 "$out/students.log"
fi
if has_part rows && [ -n "${IMAGES:-}" ]; then
    check "${SECONDS_ROWS:-60}" rows --seconds "${SECONDS_ROWS:-60}" --img_root "$IMAGES" ${MODES:+--modes "$MODES"} >"$out/rows.log" 2>&1
    tail -n 3 "$out/rows.log"
fi
check 60 summary
