#!/usr/bin/env bash
# Everything that needs a GPU, in calls of less than six minutes.
#
#     bash benchmarks/gpu_check.sh right OUT            # is it right? from the root of a clone
#     bash benchmarks/gpu_check.sh worth OUT            # what is it worth?
#     bash benchmarks/gpu_check.sh "camvid points" OUT  # any parts
#
# "right" is "compile smoke tests", "worth" is "compile again tune bench memcheck"; other parts are
# end_to_end, train_step, camvid, headless, points, shapes, data, racecheck and initcheck. identity
# is part of every call. docs/benchmarks.md says what to call in which order.
#
# Every command has a limit, at which it is interrupted as by Ctrl-C and soon after killed; what it
# leaves of its time goes to those after it. A command that fails does not stop the others; the exit
# status tells.
#
# Leaves in OUT, while it runs: log.txt; failed.txt (names of tests); triton_cache.tar.xz of
# "compile"; tuned.json (which configurations were chosen); results.json and speedups.png of
# "bench"; files.tar.gz (the files of all parts, JUnit files too).
#
# In the environment:
#   TUNED           the tuned.json of an earlier call on such a GPU, to start with
#   AGAIN           of "again": the failed.txt of an earlier call
#   CACHE           a triton_cache.tar.xz, to start with
#   MODELS          of "end_to_end": names, by default those with ResNet-50
#   CAMVID          the folder of CamVid (default: data/camvid)
#   CAMVID_MINUTES  of training (default: 2)
#   NAME_LIMIT      seconds, in place of one below: BENCH_LIMIT=60
#   POINTREND_COMMIT  the commit, where the code is a copy without git
#   PYTHON; DEVICE=cpu and QUICK=1, which try the script itself
set -uo pipefail

usage="usage: bash benchmarks/gpu_check.sh 'right', 'worth' or a list of parts, OUT"
parts=${1:?$usage}
out=${2:?$usage}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
camvid=${CAMVID:-data/camvid}
minutes=${CAMVID_MINUTES:-2}

# they run in this order, each by the function of its name
known="identity compile smoke tests again tune bench memcheck end_to_end train_step camvid headless
    points shapes data racecheck initcheck"
case $parts in
    right) parts="compile smoke tests" ;;
    worth) parts="compile again tune bench memcheck" ;;
esac
for name in $parts; do
    [[ " ${known//$'\n'/ } " == *" $name "* ]] ||
        { echo "there is no part $name; there are right, worth," $known >&2 && exit 1; }
done
runs() { [[ " identity $parts " == *" $1 "* ]]; }

# seconds of each command, the last five of them to end in; for a call they add up to less than 360
declare -A limits=(
    [cache]=8 [tuned]=8 [identity]=15
    [compile]=60 [pack]=6 [smoke]=35 [kernels]=80 [library]=40 [gpu]=40 [slow]=60
    [again]=20 [tune]=35 [bench]=14 [results]=6 [ready]=12 [memcheck]=60
    [end_to_end]=215 [train_step]=50
    [trial]=40 [camvid]=$((minutes * 75 + 15)) [evaluation]=15 [curves]=12 [points]=50
    [shapes]=120 [data]=120
    [racecheck]=150 [initcheck]=100
)
slower=$([ "$device" = cuda ] && echo 1 || echo 10)

work=$(mktemp -d)
files=$work/files
mkdir "$files"
log=$out/log.txt
: >"$log"
[ -z "${AGAIN:-}" ] || cp "$AGAIN" "$work/again.txt" || exit 1 # it may be the one in OUT
: >"$out/failed.txt"
export POINTREND_CACHE=$work/tuned PYTHONUNBUFFERED=1 MPLCONFIGDIR=$work/matplotlib
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.cache/triton}
failed=0
due=0 # when the command at hand must have ended

say() { echo "$1" | tee -a "$log"; }

# run TITLE LIMIT COMMAND...: into the log; what was not used of earlier limits is added
run() {
    local title=$1 own=${2^^}_LIMIT start=$SECONDS limit status
    due=$((due + ${!own:-${limits[$2]} * slower}))
    limit=$((due - start))
    shift 2
    printf '\n==== %s, at most %s s: %s\n' "$title" "$limit" "$*" >>"$log"
    # as Ctrl-C: commands then say, or write, how far they came
    timeout --signal=INT --kill-after=5 $((limit > 5 ? limit - 5 : 1)) "$@" >>"$log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=$((failed + 1))
    say "$title: status $status, $((SECONDS - start)) s"
    keep
}

# put FILE NAME: into OUT, whole or not at all
put() { cp "$1" "$out/new" && mv "$out/new" "$out/$2"; }

# what there is so far, into OUT; checkpoints and TensorBoard's pictures are too large
keep() {
    (
        flock 9
        # one GPU and one state of the kernels: one table
        for table in "$POINTREND_CACHE"/*.json; do
            [ ! -e "$table" ] || put "$table" tuned.json
        done
        if [ -n "$(ls -A "$files")" ]; then
            tar -czf "$work/files.tar.gz" -C "$files" --exclude='*.pth' --exclude='events.*' . &&
                put "$work/files.tar.gz" files.tar.gz
        fi
    ) 9>"$work/lock"
}

# the call may be cut off in the middle of a command, and then this ends too
while sleep 5 && kill -0 $$; do keep; done >/dev/null 2>&1 &
keeper=$!
trap 'kill "$keeper" 2>/dev/null; rm -rf "$work"' EXIT

identity() {
    run identity identity "$python" -m benchmarks.identity --device "$device"
}

compile() {
    run compile compile "$python" -m benchmarks.compiled --out "$files/compiled.json" \
        ${QUICK:+--quick}
    run "Triton's cache" pack "$python" -m benchmarks.triton_cache pack "$out/triton_cache.tar.xz"
}

smoke() {
    run smoke smoke "$python" -m benchmarks.smoke --device "$device"
}

# pytests TITLE LIMIT ARGUMENTS...: not tuned, as tuning has its turn
pytests() {
    local title=$1 limit=$2 workers=()
    shift 2
    if "$python" -c 'import xdist' 2>/dev/null; then
        workers=(-n "$(nproc)")
    fi
    run "$title" "$limit" env POINTREND_AUTOTUNE=0 "$python" -m pytest -v --tb=short \
        --durations=15 -p no:cacheprovider -p benchmarks.watch "${workers[@]}" \
        --failed "$out/failed.txt" --junitxml="$files/junit_$limit.xml" "$@"
}

tests() {
    # the compile table needs no GPU
    pytests "tests of kernels" kernels tests/kernels --ignore=tests/kernels/test_resources.py \
        --ignore=tests/kernels/test_compiled.py ${QUICK:+-k store}
    pytests "tests of the operators" library tests/test_library.py ${QUICK:+-k callable}
    local others # each file costs its imports, in every worker
    mapfile -t others < <(grep -rl 'mark\.gpu' tests --include='test_*.py' |
        grep -v -e '^tests/kernels/' -e '^tests/test_library.py' | sort)
    pytests "tests marked gpu, not slow" gpu -m "gpu and not slow" "${others[@]}"
    pytests "tests marked gpu, slow" slow -m "gpu and slow" "${others[@]}"
}

again() {
    local paths=() path
    while read -r path; do
        [ ! -e "$path" ] || paths+=("$path")
    done < <(cut -d: -f1 "$work/again.txt" 2>/dev/null | sort -u)
    if [ "${#paths[@]}" -eq 0 ]; then
        say "again: left out, AGAIN names no tests that failed"
        return
    fi
    pytests again again --again "$work/again.txt" "${paths[@]}"
}

tune() {
    if [ "$device" != cuda ]; then
        say "tune: left out, nothing can be timed without a GPU"
        return
    fi
    run tune tune "$python" -m pointrend_triton.tune --dtype bf16 fp32
}

bench() {
    # after two thirds of its time a bench begins nothing new, then it prints its table
    local op seconds=$((${BENCH_LIMIT:-18} * 2 / 3))
    for op in refine point_head select uncertainty decode point_sample training_branch augment; do
        run "bench $op" bench "$python" -m "benchmarks.bench_$op" --device "$device" --no-compiled \
            --out "$files/results" --seconds "$seconds" ${QUICK:+--quick}
    done
    run results results "$python" -m benchmarks.record "$files/results" --out "$files/results"
    [ ! -e "$files/results.json" ] || put "$files/results.json" results.json
    run plot results "$python" -m benchmarks.plot "$files/results.json" --out "$out/speedups.png"
}

# under compute-sanitizer TOOL, what was compiled before
sanitized() {
    local sanitize=("$python" -m benchmarks.sanitize --device "$device")
    [ -n "${ready:-}" ] || run "every operation once" ready "${sanitize[@]}"
    ready=yes
    if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
        run "$1" "$1" compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
            "${sanitize[@]}"
    else
        say "$1: left out, no compute-sanitizer for $device here"
    fi
}

memcheck() { sanitized memcheck; }

racecheck() { sanitized racecheck; }

initcheck() { sanitized initcheck; }

end_to_end() {
    # shellcheck disable=SC2086  # a list of names
    run end_to_end end_to_end "$python" -m benchmarks.end_to_end --device "$device" \
        --out "$files" --models ${MODELS:-cityscapes_r50 ade20k_r50} ${QUICK:+--quick}
}

train_step() {
    local config
    for config in cityscapes_r50 ade20k_r50; do
        run "train_step $config" train_step "$python" -m benchmarks.train_step --config "$config" \
            --device "$device" --out "$files/train_step_$config" ${QUICK:+--quick}
    done
}

# the configuration and what is changed in it
camvid_config=(camvid_r50 data.root="$camvid" train.device="$device" amp=true channels_last=true
    data.cache="$work/cache" log_every=20)
if [ -n "${QUICK:-}" ]; then
    camvid_config+=(model.depth=18 base_channels=8 fpn_channels=16 head_channels=8
        "data.crop_size=[64,64]" data.workers=1 train.batch_size=2 train.eval_images=2 log_every=1)
fi

# how many iterations fit into CAMVID_MINUTES, by the speed at the end of a short trial
iterations() {
    awk -F, -v minutes="$minutes" -v batch=16 '
        NR == 1 { for (i = 1; i <= NF; i++) if ($i == "images_per_second") column = i; next }
        $column { speed = $column }
        END { count = int(minutes * 60 * speed / batch / 100) * 100; print count ? count : 100 }
    ' "$work/trial/metrics.csv"
}

# trained WITH_OR_WITHOUT COMPARED CHANGED...: trains, and scores both drives of the test set
trained() {
    local title="camvid, $1 point head" folder=$files/camvid_r50_$1 compared=$2 only name
    shift 2
    if [ -z "${count:-}" ]; then
        count=4
        if [ -z "${QUICK:-}" ]; then
            run "camvid, trial" trial "$python" train.py "${camvid_config[@]}" \
                run_dir="$work/trial" train.iterations=100 train.warmup_iterations=10 \
                train.eval_every=1000
            count=$(iterations) || count=1000
            say "camvid: $count iterations"
        fi
    fi
    run "$title" camvid "$python" train.py "${camvid_config[@]}" "$@" run_dir="$folder" \
        train.iterations="$count" train.warmup_iterations=$((count / 20 + 1)) \
        train.eval_every=$((count / 8 + 1)) train.checkpoint_every=$((count / 4 + 1))
    for only in '*' '0001TP*' 'Seq05VD*'; do
        name=test_${only%\*}
        # shellcheck disable=SC2086  # an option or none
        run "$title, ${name%_}" evaluation "$python" evaluate.py "$folder/config.yaml" \
            "$folder/best.pth" $compared --split test --only "$only" --device "$device" \
            --json "$folder/${name%_}.json" ${QUICK:+--limit 2}
    done
    run "$title, curves" curves "$python" -m pointrend_triton.training_report "$folder" \
        --out "$folder/learning_curve.png"
}

camvid() { trained with --both; }

headless() { trained without "" model.point_head=null; }

# scored CONFIG CHECKPOINT ARGUMENTS...: by how many points are refined
scored() {
    local title="points $1" dtype
    dtype=$([ "$device" = cuda ] && echo bf16 || echo fp32)
    run "$title" points "$python" -m benchmarks.points "$@" --device "$device" --dtype "$dtype" \
        --out "$files" ${QUICK:+--limit 2 --points 0 64}
}

points() {
    local checkpoint=$files/camvid_r50_with/best.pth
    if [ -e "$checkpoint" ]; then
        scored camvid_r50 "$checkpoint" data.root="$camvid" --split test
    else
        say "points: left out, camvid has trained nothing in this call"
    fi
}

shapes() {
    run shapes shapes "$python" train.py shapes_r18 run_dir="$files/shapes" train.device="$device" \
        ${QUICK:+train.iterations=2 train.warmup_iterations=1 base_channels=8 shapes_eval_images=4}
    scored shapes_r18 "$files/shapes/best.pth"
}

data() {
    run data data "$python" -m benchmarks.data --camvid "$camvid" --json "$files/data.json" \
        --seconds ${QUICK:+0.}5 ${QUICK:+--dataset shapes --workers 1}
}

if [ -n "${CACHE:-}" ]; then
    run "Triton's cache" cache "$python" -m benchmarks.triton_cache unpack "$CACHE"
fi
if [ -n "${TUNED:-}" ]; then
    run "tuned before" tuned "$python" -m pointrend_triton.tune --adopt "$TUNED"
fi
for name in $known; do
    if runs "$name"; then "$name"; fi
done

kill "$keeper"
keep
[ -e "$out/tuned.json" ] || say "tuned.json: nothing was tuned"
say "$failed command(s) failed; the limits add up to $due s; all output is in $log"
exit $((failed > 0))
