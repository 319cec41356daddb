#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests, memory and race checks, all benchmarks.
#
#     bash benchmarks/gpu_check.sh OUT      # from the root of a clone
#
# Leaves in OUT: log.txt, results.json, results.csv, speedups.png, tuned.json (which configurations
# were chosen). A part that fails does not stop the others; the exit status tells how many did.
# In the environment: PYTHON, DEVICE=cpu and QUICK=1 (tries the script itself), POINTREND_COMMIT (the
# commit, where the code is a copy without git), PARTS (of "tests sanitize tune bench"; without
# "tune", what is timed is tuned on first use), and the seconds TEST_LIMIT, SANITIZE_LIMIT, TUNE_LIMIT
# and BENCH_LIMIT.
set -uo pipefail

out=${1:?usage: bash benchmarks/gpu_check.sh OUT}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
parts=${PARTS:-tests sanitize bench}
# seconds: two, two and seven of them, so that the whole stays under eight minutes
test_limit=${TEST_LIMIT:-80}
sanitize_limit=${SANITIZE_LIMIT:-40}
tune_limit=${TUNE_LIMIT:-240}
bench_limit=${BENCH_LIMIT:-30}
benches=(refine point_head training_branch point_sample select uncertainty decode)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export POINTREND_CACHE=$work/tuned PYTHONUNBUFFERED=1 MPLCONFIGDIR=$work/matplotlib
log=$out/log.txt
: >"$log"
failed=0

# part TITLE SECONDS COMMAND...: runs it into the log, with a limit
part() {
    local title=$1 limit=$2 start=$SECONDS status
    shift 2
    printf '\n==== %s: %s\n' "$title" "$*" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    printf '%s: status %s, %s s\n' "$title" "$status" $((SECONDS - start)) | tee -a "$log"
}

if [ "$device" = cuda ]; then
    part "GPU" 20 nvidia-smi
fi

if [[ $parts == *tests* ]]; then
    # compiled kernels are many: side by side where pytest can
    workers=()
    if [ "$device" = cuda ] && "$python" -c 'import xdist' 2>/dev/null; then
        workers=(-n 8)
    fi
    # not tuned: tuning has its turn in the benchmarks
    tests=(env POINTREND_AUTOTUNE=0 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}")
    part "tests of kernels" "$test_limit" "${tests[@]}" tests/kernels ${QUICK:+-k store}
    part "tests marked gpu" "$test_limit" "${tests[@]}" -m gpu --ignore=tests/kernels tests
fi

if [[ $parts == *sanitize* ]]; then
    sanitize=("$python" -m benchmarks.sanitize --device "$device")
    if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            part "$tool" "$sanitize_limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
                --print-limit 20 "${sanitize[@]}"
        done
    else
        echo "memcheck, racecheck: left out, no compute-sanitizer for $device here" | tee -a "$log"
        part "every operation once" "$sanitize_limit" "${sanitize[@]}"
    fi
fi

if [[ $parts == *tune* ]]; then
    part "tune" "$tune_limit" "$python" -m pointrend_triton.tune --dtype bf16
fi

if [[ $parts == *bench* ]]; then
    for bench in "${benches[@]}"; do
        # after two thirds of its time a bench begins nothing new, then it prints its table
        part "bench $bench" "$bench_limit" "$python" -m "benchmarks.bench_$bench" \
            --device "$device" --out "$work/results" --seconds $((bench_limit * 2 / 3)) \
            ${QUICK:+--quick}
    done
    part "results" 60 "$python" -m benchmarks.record "$work/results" --out "$out/results"
    part "plot" 60 "$python" -m benchmarks.plot "$out/results.json" --out "$out/speedups.png"
fi
# one GPU and one state of the kernels: one table
cp "$POINTREND_CACHE"/*.json "$out/tuned.json" 2>/dev/null ||
    echo "tuned.json: nothing was tuned" | tee -a "$log"

echo "$failed part(s) failed; all output is in $log"
exit $((failed > 0))
