"""The script for a machine with a GPU, with a Python that only notes what it is asked to run."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from test_benchmarks import OPS

from benchmarks import watch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
# of train.py, what the script reads of it
TRAINS = """
for word; do case "$word" in run_dir=*) mkdir -p "${word#*=}"; cd "${word#*=}"
touch config.yaml report.md best.pth events.out.tfevents.1
printf 'iteration,images_per_second\\n20,100\\n40,80\\n' > metrics.csv;; esac; done
"""
LOUD = 'echo "ran $*"\n'
# what each call of the documentation runs, in this order
ORDER = {
    "right": [
        *(
            "identity",
            "benchmarks.compiled",
            "triton_cache pack",
            "benchmarks.smoke",
            "-m pytest .*kernels.xml",
        ),
        *("-m pytest .*library.xml", "-m pytest .*gpu.xml", "-m pytest .*slow.xml"),
    ],
    "worth": [
        *("identity", "benchmarks.compiled", "triton_cache pack", "-m pytest .*again.xml"),
        *("tune --dtype bf16 fp32", *(f"bench_{op}" for op in OPS), "record", "plot"),
        *("^ran -m benchmarks.sanitize", "compute-sanitizer --tool memcheck"),
    ],
}


@pytest.fixture
def gpu_check(tmp_path):
    """Runs the script on what passes for a machine with a GPU."""
    if sys.platform != "linux":
        pytest.skip("the script is for Linux")
    (tmp_path / "bin").mkdir()

    def program(path, text):
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)

    def run(parts, fake=LOUD, **variables):
        program(tmp_path / "bin" / "python", fake)
        program(tmp_path / "bin" / "compute-sanitizer", 'echo "ran compute-sanitizer $*"\n')
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        known = {"PYTHON": str(tmp_path / "bin" / "python"), "PATH": path, "TMPDIR": str(tmp_path)}
        return subprocess.run(
            ["bash", SCRIPT, parts, tmp_path / "out"],
            env={**os.environ, **known, "TRITON_CACHE_DIR": str(tmp_path / "triton"), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def log_of(tmp_path):
    return (tmp_path / "out" / "log.txt").read_text()


def ran(tmp_path):
    lines = [line for line in log_of(tmp_path).splitlines() if line.startswith("ran ")]
    return [line for line in lines if not line.startswith("ran -c")]


def packed(tmp_path):
    with tarfile.open(tmp_path / "out" / "files.tar.gz") as archive:
        return archive.getnames()


def assert_comes_back(folder):
    """What a machine gives back: at most eight files, of simple names."""
    names = [path.name for path in folder.iterdir()]
    assert len(names) <= 8 and all(re.fullmatch("[A-Za-z0-9._-]+", name) for name in names), names


def documented():
    """The calls that the documentation advises, and the seconds that it gives for each."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| \d \| `.*?gpu_check\.sh (\w+|\".*?\") OUT` \| (\d+) \|", text, re.M)
    return {parts.strip('"'): int(seconds) for parts, seconds in rows}


@pytest.mark.slow
def test_calls_stay_below_six_minutes(gpu_check, tmp_path):
    """By the limits alone, with everything that a call can be given."""
    calls = documented()
    assert {"right", "worth"} < calls.keys() and len(calls) >= 5
    listed = tmp_path / "listed.txt"
    listed.write_text("tests/test_library.py::test_a\n")
    given = {"CACHE": "cache", "TUNED": "tuned.json", "AGAIN": str(listed)}
    covered = set()
    for parts, seconds in calls.items():
        done = gpu_check(parts, LOUD + TRAINS, **given)
        assert done.returncode == 0, done.stdout + done.stderr
        (total,) = re.findall(r"the limits add up to (\d+) s", done.stdout)
        assert int(total) == seconds < 360, parts
        covered.update(parts.split())
    known = re.search(r'known="(.*?)"', SCRIPT.read_text(), re.S)[1].split()
    two = "identity compile smoke tests again tune bench memcheck"
    assert f"{' '.join(known)} ".startswith(f"{two} ")
    assert covered == {"right", "worth", *known} - {*two.split()}


@pytest.mark.parametrize("call", ORDER)
def test_order(call, gpu_check, tmp_path):
    listed = tmp_path / "listed.txt"
    listed.write_text("tests/test_library.py::test_a[x-y z]\ntests/gone.py::test_b\n")
    done = gpu_check(call, AGAIN=str(listed))
    assert done.returncode == 0, done.stdout
    commands = ran(tmp_path)
    assert len(commands) == len(ORDER[call])
    for wanted in ORDER[call]:
        assert sum(bool(re.search(wanted, command)) for command in commands) == 1, wanted
    # benches may come in any order
    order = [[bool(re.search(w, c)) for c in commands].index(True) for w in ORDER[call]]
    steady = [n for n, w in zip(order, ORDER[call], strict=True) if not w.startswith("bench_")]
    assert steady == sorted(steady)
    text = "\n".join(commands)
    if call == "right":
        assert f"-n {len(os.sched_getaffinity(0))}" in text
        kernels, library, *marked = (c for c in commands if "-m pytest" in c)
        assert "--ignore=tests/kernels/test_resources.py" in kernels
        assert all("tests/test_predictor.py" in command for command in marked)
        assert not any("tests/test_config.py" in command for command in marked)
    else:
        assert text.count("--no-compiled") == len(OPS)
        (again,) = (c for c in commands if "--again" in c)
        assert again.endswith(" tests/test_library.py")
    assert_comes_back(tmp_path / "out")


def test_every_bench_is_run():
    assert {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} == {
        f"bench_{op}" for op in OPS
    }


def test_unused_time_goes_to_the_next(gpu_check, tmp_path):
    done = gpu_check("smoke tests", IDENTITY_LIMIT="100", SMOKE_LIMIT="7")
    assert done.returncode == 0
    first, second, third = map(int, re.findall("at most (.*) s:", log_of(tmp_path))[:3])
    assert first == 100 and 105 <= second <= 107 and second < third


def test_it_goes_on_after_a_failure(gpu_check, tmp_path):
    done = gpu_check("bench", 'echo "ran $*"\ncase "$*" in *bench_select*) exit 3;; esac\n')
    assert done.returncode == 1 and "1 command(s) failed" in done.stdout
    assert "bench select: status 3" in log_of(tmp_path)
    assert len(ran(tmp_path)) == 1 + len(OPS) + 2


@pytest.mark.parametrize(("parts", "reason"), [
    ("bench end_to_ends", "there is no part end_to_ends; there are right, worth, identity"),
    ("", "usage"),
])  # fmt: skip
def test_parts_that_are_not(parts, reason, gpu_check, tmp_path):
    done = gpu_check(parts)
    assert done.returncode == 1 and reason in done.stderr
    assert not (tmp_path / "out" / "log.txt").exists()


def test_nothing_to_run_again(gpu_check, tmp_path):
    """AGAIN may be the list in OUT, which a call begins anew."""
    assert "AGAIN names no tests" in gpu_check("again").stdout
    old = tmp_path / "out" / "failed.txt"
    old.write_text("tests/test_points.py::test_a\n")
    gpu_check("again", AGAIN=str(old))
    assert ran(tmp_path)[-1].endswith(" tests/test_points.py")
    assert old.read_text() == ""
    assert gpu_check("again", AGAIN=str(tmp_path / "none.txt")).returncode == 1


def test_it_trains_for_the_minutes(gpu_check, tmp_path):
    """100 images a second at first, then 80: 16 of them an iteration, four minutes."""
    done = gpu_check("camvid headless points", LOUD + TRAINS, CAMVID_MINUTES="4")
    assert done.returncode == 0, done.stdout
    assert "camvid: 1200 iterations" in log_of(tmp_path)
    commands = ran(tmp_path)
    for words, count in (
        *(("train.iterations=1200", 2), ("model.point_head=null", 1), ("evaluate.py", 6)),
        *(("train.warmup_iterations=61", 2), ("--both", 3), ("benchmarks.points camvid_r50", 1)),
        ("train.iterations=100 ", 1),
    ):
        assert sum(words in command for command in commands) == count, words
    names = packed(tmp_path)
    assert "./camvid_r50_without/metrics.csv" in names
    assert not any(name.endswith(".pth") or "events" in name for name in names)


def test_points_need_a_network(gpu_check, tmp_path):
    assert "points: left out, camvid has trained nothing" in gpu_check("points").stdout


def test_the_sanitizer_finds_everything_compiled(gpu_check, tmp_path):
    """Once, plainly, before the first of them."""
    gpu_check("racecheck initcheck")
    assert [line.split(" --device")[0].split(" --error")[0] for line in ran(tmp_path)[1:]] == [
        "ran -m benchmarks.sanitize",
        "ran compute-sanitizer --tool racecheck",
        "ran compute-sanitizer --tool initcheck",
    ]


def test_a_command_is_cut_off_and_says_how_far_it_came(gpu_check, tmp_path):
    fake = (
        'case "$*" in *tune*) mkdir "$POINTREND_CACHE"; echo "{}" > "$POINTREND_CACHE/gpu.json"\n'
        "trap 'echo so far; exit 130' INT; while :; do sleep 0.1; done;; esac\n"
    )
    done = gpu_check("tune", fake, IDENTITY_LIMIT="1", TUNE_LIMIT="1")
    assert done.returncode == 1
    assert "so far\ntune: status 124" in log_of(tmp_path)
    assert (tmp_path / "out" / "tuned.json").read_text() == "{}\n"


@pytest.mark.slow
def test_what_there_was_is_left_when_the_call_is_killed(gpu_check, tmp_path):
    """In the middle of a bench, which has written a file some seconds before."""
    fake = (
        'case "$*" in *bench_*) while [ "$1" != --out ]; do shift; done\n'
        'mkdir -p "$2"; touch "$2/$$.json";; esac\n'
        'case "$*" in *bench_select*) ;; *--seconds*) [ $(ls "$2" | wc -l) -lt 3 ] || {\n'
        "sleep 8; kill -9 $(cut -d' ' -f4 /proc/$PPID/stat); };; esac\n"
    )
    start = time.monotonic()
    done = gpu_check("bench", fake)
    assert done.returncode == -signal.SIGKILL
    assert 7 < time.monotonic() - start < 30
    assert sum(name.endswith(".json") for name in packed(tmp_path)) == 3
    assert_comes_back(tmp_path / "out")


def test_a_table_that_is_refused_is_said(gpu_check, tmp_path):
    fake = 'case "$*" in *adopt*) echo "tuned on another"; exit 2;; esac\n'
    done = gpu_check("identity", fake, TUNED="tuned.json")
    assert done.returncode == 1 and "tuned before: status 2" in done.stdout
    assert "tune --adopt tuned.json\ntuned on another" in log_of(tmp_path)


TESTS = """
import time, pytest
@pytest.mark.parametrize("n", range(3))
def test_it(n):
    assert n != 1, "one is " + "wrong"
@pytest.fixture
def broken():
    yield
    raise ValueError
def test_teardown(broken): pass
def test_slow():
    time.sleep(SECONDS)
"""


def watched(folder, *options):
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.watch", "-c", os.devnull, "--rootdir", folder, *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_failures_are_written_as_they_come(tmp_path):
    """What a run leaves is there when it is killed, and the list is enough to run them again."""
    tests = TESTS.replace("SECONDS", str(watch.EVERY + 0.5))
    (tmp_path / "test_a.py").write_text(tests + "def test_endless():\n    time.sleep(60)\n")
    junit, failed = tmp_path / "junit.xml", tmp_path / "failed.txt"
    options = ["--failed", failed, f"--junitxml={junit}", "test_a.py"]
    run = watched(tmp_path, *options)
    end = time.monotonic() + 40
    while not junit.exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGKILL)
    out = run.communicate()[0]
    assert out.count("one is wrong") == 1 and "test_a.py::test_it[2] PASSED" in out
    names = ["test_a.py::test_it[1]", "test_a.py::test_teardown"]
    assert failed.read_text().split() == names
    cases = ET.parse(junit).getroot().iter("testcase")
    assert {case.get("name") for case in cases if len(case)} == {"test_it[1]", "test_teardown"}

    run = watched(tmp_path, "--again", failed, "test_a.py")
    out = run.communicate(timeout=60)[0]
    assert "1 failed, 1 passed, 4 deselected, 1 error" in out
    assert out.count("E   AssertionError: one is wrong") == 1


def test_a_worker_without_its_gpu_ends(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    lost = {"gpu": False}
    monkeypatch.setattr(watch, "gpu_is_lost", lambda: lost["gpu"])

    class Report:
        failed = True

    worker = watch.Worker()
    worker.pytest_runtest_logreport(Report)
    worker.pytest_runtest_logfinish()
    assert ended == []
    lost["gpu"] = True
    worker.pytest_runtest_logfinish()
    assert ended == [], "no test has failed since"
    worker.pytest_runtest_logreport(Report)
    worker.pytest_runtest_logfinish()
    assert ended == [1]
