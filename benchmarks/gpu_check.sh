#!/usr/bin/env bash
# Everything that needs a GPU: tests, memory and race checks, tuning, all benchmarks, a training.
#
#     bash benchmarks/gpu_check.sh OUT      # from the root of a clone
#     PARTS="tune bench" BENCH_LIMIT=45 bash benchmarks/gpu_check.sh OUT
#     PARTS="camvid points" CAMVID_MINUTES=3 bash benchmarks/gpu_check.sh OUT
#
# PARTS are of "tests sanitize tune bench train_step end_to_end data camvid points", by default all;
# they run in this order. docs/benchmarks.md says what each takes, and how to divide them into calls
# of about ten minutes. A part that fails does not stop the others; the exit status tells.
#
# Leaves in OUT: log.txt; tuned.json (which configurations were chosen); files.tar.gz (the files of
# all parts, packed again after each, so that a call that is cut off leaves what was there); of
# "bench" results.json, results.csv and speedups.png.
#
# In the environment:
#   TUNED           the tuned.json of an earlier call, to start with
#   MODELS          of "end_to_end": names, by default all four models
#   CAMVID          the folder of CamVid (default: data/camvid)
#   CAMVID_MINUTES  of training, with and without point head each (default: 3)
#   CAMVID_HEADS    of "with without" (default: both)
#   *_LIMIT         seconds that a command of the part may take: TEST_LIMIT, SANITIZE_LIMIT, ...
#   POINTREND_COMMIT  the commit, where the code is a copy without git
#   PYTHON; DEVICE=cpu and QUICK=1, which try the script itself
set -uo pipefail

out=${1:?usage: bash benchmarks/gpu_check.sh OUT}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
parts=${PARTS:-tests sanitize tune bench train_step end_to_end data camvid points}
camvid=${CAMVID:-data/camvid}
minutes=${CAMVID_MINUTES:-3}
bench_limit=${BENCH_LIMIT:-30}

for name in $parts; do
    case " tests sanitize tune bench train_step end_to_end data camvid points " in
        *" $name "*) ;;
        *) echo "PARTS: there is no part $name" >&2 && exit 1 ;;
    esac
done

work=$(mktemp -d)
files=$work/files
mkdir -p "$files"
trap 'rm -rf "$work"' EXIT
export POINTREND_CACHE=$work/tuned PYTHONUNBUFFERED=1 MPLCONFIGDIR=$work/matplotlib
log=$out/log.txt
: >"$log"
failed=0

runs() { [[ " $parts " == *" $1 "* ]]; }

# part TITLE SECONDS COMMAND...: runs it into the log, with a limit
part() {
    local title=$1 limit=$2 start=$SECONDS status
    shift 2
    printf '\n==== %s: %s\n' "$title" "$*" >>"$log"
    # as Ctrl-C: commands then say, or write, how far they came
    timeout --signal=INT --kill-after=20 "$limit" "$@" >>"$log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    printf '%s: status %s, %s s\n' "$title" "$status" $((SECONDS - start)) | tee -a "$log"
}

say() { echo "$1" | tee -a "$log"; }

# one GPU and one state of the kernels: one table
keep_tuned() { cp "$POINTREND_CACHE"/*.json "$out/tuned.json" 2>/dev/null; }

# what is there so far: the whole call may be cut off
pack() {
    keep_tuned
    if [ -n "$(ls -A "$files")" ]; then
        tar -czf "$work/files.tar.gz" -C "$files" . && mv "$work/files.tar.gz" "$out"
    fi
}

if [ "$device" = cuda ]; then
    part "GPU" 20 nvidia-smi
fi
if [ -n "${TUNED:-}" ]; then
    part "tuned before" 30 "$python" -c \
        "import shutil, sys; from pointrend_triton.kernels import store; p = store.path_for(0); p.parent.mkdir(exist_ok=True); shutil.copy(sys.argv[1], p)" \
        "$TUNED"
fi

if runs tests; then
    # compiled kernels are many: side by side where pytest can
    workers=()
    if [ "$device" = cuda ] && "$python" -c 'import xdist' 2>/dev/null; then
        workers=(-n 8)
    fi
    # not tuned: tuning has its turn in the benchmarks
    tests=(env POINTREND_AUTOTUNE=0 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}"
        --durations=15)
    part "tests of kernels" "${TEST_LIMIT:-150}" "${tests[@]}" tests/kernels ${QUICK:+-k store}
    for speed in "not slow" slow; do
        part "tests marked gpu, $speed" "${TEST_LIMIT:-150}" "${tests[@]}" -m "gpu and $speed" \
            --ignore=tests/kernels tests
    done
fi

if runs sanitize; then
    sanitize=("$python" -m benchmarks.sanitize --device "$device")
    if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck; do
            part "$tool" "${SANITIZE_LIMIT:-60}" compute-sanitizer --tool "$tool" \
                --error-exitcode 9 --print-limit 20 "${sanitize[@]}"
        done
    else
        say "memcheck, racecheck, initcheck: left out, no compute-sanitizer for $device here"
        part "every operation once" "${SANITIZE_LIMIT:-60}" "${sanitize[@]}"
    fi
fi

if runs tune; then
    part "tune" "${TUNE_LIMIT:-210}" "$python" -m pointrend_triton.tune --dtype bf16
    pack
fi

if runs bench; then
    for path in benchmarks/bench_*.py; do
        bench=$(basename "$path" .py)
        # after two thirds of its time a bench begins nothing new, then it prints its table
        part "bench ${bench#bench_}" "$bench_limit" "$python" -m "benchmarks.$bench" \
            --device "$device" --out "$files/results" --seconds $((bench_limit * 2 / 3)) \
            ${QUICK:+--quick}
        pack
    done
    part "results" 30 "$python" -m benchmarks.record "$files/results" --out "$out/results"
    part "plot" 30 "$python" -m benchmarks.plot "$out/results.json" --out "$out/speedups.png"
fi

if runs train_step; then
    for config in cityscapes_r50 ade20k_r50; do
        part "train_step $config" "${TRAIN_STEP_LIMIT:-210}" "$python" -m benchmarks.train_step \
            --config "$config" --device "$device" --out "$files/train_step_$config" ${QUICK:+--quick}
        pack
    done
fi

if runs end_to_end; then
    # shellcheck disable=SC2086  # a list of names
    part "end_to_end" "${END_TO_END_LIMIT:-480}" "$python" -m benchmarks.end_to_end \
        --device "$device" --out "$files" ${MODELS:+--models $MODELS} ${QUICK:+--quick}
    pack
fi

if runs data; then
    part "data" "${DATA_LIMIT:-240}" "$python" -m benchmarks.data --camvid "$camvid" \
        --seconds ${QUICK:+0.}5 --json "$files/data.json" ${QUICK:+--dataset shapes --workers 1}
    pack
fi

# the configuration and what is changed in it
camvid_config=(camvid_r50 data.root="$camvid" train.device="$device" amp=true channels_last=true
    data.cache="$work/cache" log_every=20)
if [ -n "${QUICK:-}" ]; then
    camvid_config+=(model.depth=18 base_channels=8 fpn_channels=16 head_channels=8
        "data.crop_size=[64,64]" data.workers=1 train.batch_size=2 log_every=1)
fi

# how many iterations fit into CAMVID_MINUTES, by the speed at the end of a short trial
iterations() {
    awk -F, -v minutes="$minutes" -v batch=16 '
        NR == 1 { for (i = 1; i <= NF; i++) if ($i == "images_per_second") column = i; next }
        $column { speed = $column }
        END { count = int(minutes * 60 * speed / batch / 100) * 100; print count ? count : 100 }
    ' "$work/trial/metrics.csv"
}

if runs camvid; then
    count=4
    if [ -z "${QUICK:-}" ]; then
        part "camvid, trial" 120 "$python" train.py "${camvid_config[@]}" run_dir="$work/trial" \
            train.iterations=100 train.warmup_iterations=10 train.eval_every=1000
        count=$(iterations) || count=1000
        say "camvid: $count iterations"
    fi
    for head in ${CAMVID_HEADS:-with without}; do
        run=$work/camvid_r50_$head
        changed=()
        compared=(--both)
        if [ "$head" = without ]; then
            changed=(model.point_head=null)
            compared=()
        fi
        # half as much time again for evaluations and a slower end
        part "camvid, $head point head" $((minutes * 90 + 60)) "$python" train.py \
            "${camvid_config[@]}" "${changed[@]}" run_dir="$run" train.iterations="$count" \
            train.warmup_iterations=$((count / 20 + 1)) \
            train.eval_every=$((count / 8 + 1)) train.checkpoint_every=$((count / 4 + 1))
        mkdir -p "$files/camvid_r50_$head"
        cp "$run"/{config.yaml,environment.json,metrics.csv,report.md} "$files/camvid_r50_$head"
        pack
        for only in '*' '0001TP*' 'Seq05VD*'; do
            name=test_${only%\*}
            part "camvid, $head point head, ${name%_}" 120 "$python" evaluate.py \
                "$run/config.yaml" "$run/best.pth" "${compared[@]}" \
                --split test --only "$only" --device "$device" ${QUICK:+--limit 2} \
                --json "$files/camvid_r50_$head/${name%_}.json"
        done
        part "camvid, $head point head, curves" 60 "$python" -m pointrend_triton.training_report \
            "$run" --out "$files/camvid_r50_$head/learning_curve.png"
        pack
    done
fi

if runs points; then
    dtype=$([ "$device" = cuda ] && echo bf16 || echo fp32)
    options=(--device "$device" --dtype "$dtype" --out "$files" ${QUICK:+--limit 2 --points 0 64})
    part "shapes" 180 "$python" train.py shapes_r18 run_dir="$work/shapes" train.device="$device" \
        ${QUICK:+train.iterations=2 train.warmup_iterations=1 base_channels=8 shapes_eval_images=4}
    part "points shapes_r18" "${POINTS_LIMIT:-120}" "$python" -m benchmarks.points \
        shapes_r18 "$work/shapes/best.pth" "${options[@]}"
    pack
    if [ -e "$work/camvid_r50_with/best.pth" ]; then
        part "points camvid_r50" "${POINTS_LIMIT:-120}" "$python" -m benchmarks.points \
            camvid_r50 "$work/camvid_r50_with/best.pth" data.root="$camvid" --split test \
            "${options[@]}"
    else
        say "points camvid_r50: left out, this call trained none"
    fi
fi

pack
keep_tuned || say "tuned.json: nothing was tuned"

say "$failed part(s) failed; all output is in $log"
exit $((failed > 0))
