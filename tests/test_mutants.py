"""The faults that `benchmarks.mutants` puts into kernels, and what it says of how a run ends."""

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import faults, mutants

ROOT = Path(__file__).resolve().parent.parent
FAULT = faults.FAULTS[0]


def ended(status, out="", err=""):
    return subprocess.CompletedProcess([], status, out, err)


def test_every_fault_applies():
    texts = Counter()
    for fault in faults.FAULTS:
        text = fault.applied(ROOT)  # an error says which does not
        compile(text, fault.path, "exec")
        texts[fault.path, text] += 1
        assert fault.old != fault.new
        assert fault.kind in faults.KINDS
        assert (ROOT / fault.tests[0]).is_file()
    assert max(texts.values()) == 1, "a fault is there twice"


def test_every_kernel_has_several():
    pytest.importorskip("triton", reason="kernels are registered where they are defined")
    from pointrend_triton.kernels import augment, launch, refine  # noqa: F401

    count = Counter(fault.kernel for fault in faults.FAULTS)
    assert set(count) == {*launch.KERNELS, "grid"}
    assert min(count.values()) >= 4
    assert {fault.kind for fault in faults.FAULTS} == set(faults.KINDS)


def test_what_cannot_be_put_in_is_an_error():
    for old in ("nowhere", "coordinate"):
        with pytest.raises(ValueError, match=f"position has . times: {old}"):
            faults.Fault("grid", "grid", "position", "mask", old, "x", "", ()).applied(ROOT)


@pytest.mark.parametrize(
    ("end", "test", "problem"),
    [
        (ended(1, "F\nFAILED tests/a.py::test_b[c d-1] - assert 1 == 2\n"),
         "tests/a.py::test_b[c d-1]", None),
        (ended(1, "ERROR tests/a.py::test_b - Failed: 3 values stored behind\n"),
         "tests/a.py::test_b", None),
        (ended(0, "3 passed\n"), None, "survives"),
        (ended(2, "ERROR tests/a.py - ImportError\n1 error\n"), None, "no name: status 2, 1 error"),
        (ended(-11, "..", "Segmentation fault\n"), None, "no name: status -11, Segmentation fault"),
        (ended(5, ""), None, "no name: status 5, no output"),
        (subprocess.TimeoutExpired("pytest", 60), None, "no end within 60 s"),
    ],
)  # fmt: skip
def test_only_a_named_test_counts(end, test, problem, monkeypatch):
    def pytest_in(tests, folder):
        assert (folder / FAULT.path).read_text() == FAULT.applied(ROOT)
        assert (folder / tests[0]).is_file()
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(mutants, "_pytest", pytest_in)
    row = mutants.run(FAULT)
    assert (row.test, row.problem) == (test, problem)


def test_the_status_and_the_file_tell(monkeypatch, tmp_path, capsys):
    def run(fault):
        problem = "survives" if fault is FAULT else None
        return mutants.Row(fault.kernel, fault.kind, "", "", "", "", "", "a.py::b", problem=problem)

    monkeypatch.setattr(mutants, "run", run)
    assert mutants.main(["--only", "select.", "--jobs", "2"]) == 0
    assert "** survives" not in capsys.readouterr().out
    assert mutants.main(["--only", FAULT.kernel, "--out", str(tmp_path / "out.json")]) == 1
    assert "** survives" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    assert {"versions", "commit", "date", "command", "cpu"} <= set(content)
    assert len(content["rows"]) == sum(fault.kernel == FAULT.kernel for fault in faults.FAULTS)
    with pytest.raises(SystemExit):
        mutants.main(["--only", "nose"])


@pytest.mark.slow
def test_a_fault_is_found():
    pytest.importorskip("triton", reason="the interpreter runs the kernels")
    row = mutants.run(FAULT)
    assert row.test.startswith("tests/kernels/test_point_sample.py::test_") and not row.problem


def test_the_committed_result_is_of_these_faults():
    content = json.loads((ROOT / "benchmarks" / "results" / "mutants.json").read_text())
    rows = content["rows"]
    assert all(row["test"] and not row["problem"] for row in rows)
    assert all(row["seconds"] < content["limit_seconds"] for row in rows)
    ours = [(f.kernel, f"{f.file}:{f.function}", f.old, f.new) for f in faults.FAULTS]
    assert [
        tuple(row[name] for name in ("kernel", "function", "old", "new")) for row in rows
    ] == ours
