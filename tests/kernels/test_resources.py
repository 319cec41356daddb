"""The kernels compile for real GPUs, with what those have; the table that says so finds faults."""

import csv
import json

import pytest
from processes import python

from benchmarks import resources

TESTS = """
import json, sys
import toy_workloads as toys
from benchmarks import resources

toys_only = ["fine", "dot", "spills", "shared", "nothing", "broken"]
rows = resources.table("toy_workloads", workloads=toys_only, dtypes=["bfloat16"], archs=[80, 90])
endless = resources.table(
    "toy_workloads", workloads=["endless"], dtypes=["float32"], archs=[80], limit=6
)
tasks = {
    function.__name__: list(resources.in_processes(function, [tuple(arguments)], 1, limit))
    for function, arguments, limit in (
        (toys.give, [7], 60), (toys.crash, [], 60), (toys.hang, [], 0.5), (toys.fail, [], 60)
    )
}
errors = []
for wrong in ({"workloads": ["fine"], "kernels": ["nose"]}, {"workloads": ["nose"]}):
    try:
        resources.table("toy_workloads", **wrong)
    except (ValueError, RuntimeError) as error:
        errors.append(str(error))
json.dump({"rows": rows + endless, "tasks": tasks, "errors": errors}, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
def test_what_a_gpu_runs_untuned_is_sound(tmp_path):
    """On the oldest that there is; `test_compiled` has sm_90."""
    ran = python(
        "-m", "benchmarks.resources", "--default", "--reuse", "--arch", 80,
        "--dtype", "bfloat16", "--workload", "ade20k", "cityscapes training deterministic",
        "masks", "dense", "rows", "--out", tmp_path / "table.json",
    )  # fmt: skip
    assert (tmp_path / "table.json").exists(), ran.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    rows = table["rows"]
    names = ("kernel", "key", "config", "arch", "problem")
    assert [[row[name] for name in names] for row in rows if row["problem"]] == []
    assert ran.returncode == 0
    assert set(table["versions"]) == {
        "date", "commit", "compiled_on", "torch", "triton", "ptxas", "ptxas_blackwell"
    }  # fmt: skip
    assert {row["arch"] for row in rows} == {80}
    assert {row["kernel"] for row in rows} >= {
        "point_sample.forward", "uncertainty.double", "select.short", "point_head.forward",
        "decode.resample",
    }  # fmt: skip
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["kernel"] for row in csv.DictReader(file)] == [row["kernel"] for row in rows]
    assert {row["tensor_cores"] for row in rows if "head.f" in row["kernel"]} == {"mma.sync"}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    out = tmp_path_factory.mktemp("toys") / "toys.json"
    ran = python("-c", TESTS, out)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(out.read_text())


@pytest.fixture
def row(toys):
    def find(name, arch=80, number=0):
        [found] = [
            row
            for row in toys["rows"]
            if (row["kernel"], row["arch"], row["number"]) == (f"toy.{name}", arch, number)
        ]
        return found

    return find


@pytest.mark.slow
def test_sound_kernels(row):
    fine = row("fine")
    assert fine["problem"] == ""
    assert 0 < fine["registers"] < 64
    assert fine["spilled_bytes"] == fine["tensor_core_instructions"] == 0
    assert 16 < fine["instructions"] < 500
    for arch, cores in ((80, "mma.sync"), (90, "wgmma")):
        dot = row("dot", arch)
        assert (dot["problem"], dot["tensor_cores"]) == ("", cores)
        assert dot["tensor_core_instructions"] > 0
        assert 0 < dot["shared_bytes"] < dot["shared_limit"]


@pytest.mark.slow
def test_faults_are_found(row):
    assert row("spills")["problem"] == f"spills {row('spills')['spilled_bytes']} bytes"
    assert row("spills")["registers"] <= 40
    assert row("shared")["problem"].endswith("bytes of shared memory of 166912")
    assert row("shared", number=1)["problem"] == ""
    assert row("nothing")["problem"] == "writes nothing: compiled to a trap"
    assert "arange's range must be a power of 2" in row("broken")["problem"]
    assert row("endless")["problem"] == "not compiled within 6 s"


@pytest.mark.slow
def test_tasks_in_processes(toys):
    results = {name: result for name, [(_, result)] in toys["tasks"].items()}
    assert results == {
        "give": 7,
        "crash": "the compiler's process died (exit status 3)",
        "hang": "not compiled within 0.5 s",
        "fail": "ValueError: the reason ... in two lines",
    }


@pytest.mark.slow
def test_wrong_names_name_what_there_is(toys):
    assert toys["errors"] == [
        "no kernel is called nose; there are toy.fine",
        "ValueError: no workload is called nose; there are "
        "fine, dot, spills, shared, nothing, broken, endless",
    ]


def test_an_unknown_architecture(capsys):
    with pytest.raises(SystemExit) as stop:
        resources.main(["--arch", "75"])
    assert stop.value.code == 2
    assert "invalid choice: 75" in capsys.readouterr().err


STORE = "st.global.b32 [%rd1], %r1;"


@pytest.mark.parametrize(
    "ptx, changes, wants_tensor_cores, expected",
    [
        (STORE, {}, False, ""),
        ("@%p1 red.global.add.u32 [%rd1], 1;", {}, False, ""),
        ("atom.global.add.u32 %r1, [%rd1], 1;", {}, False, ""),
        ("trap;", {}, False, "writes nothing: compiled to a trap"),
        ("// the last.store of many", {}, False, "writes nothing: compiled to a trap"),
        (STORE, {"spilled_bytes": 8}, False, "spills 8 bytes"),
        (STORE, {"shared_bytes": 101}, False, "needs 101 bytes of shared memory of 100"),
        (STORE, {"shared_bytes": 101, "left_out": True}, False, ""),
        (STORE, {}, True, "dots without tensor cores"),
        (STORE, {"tensor_core_instructions": 1}, True, ""),
    ],
)
def test_problem(ptx, changes, wants_tensor_cores, expected):
    row = {
        "left_out": False, "spilled_bytes": 0, "shared_bytes": 100, "shared_limit": 100,
        "tensor_core_instructions": 0, **changes,
    }  # fmt: skip
    assert resources.problem(row, ptx, wants_tensor_cores) == expected


@pytest.mark.parametrize(
    "operands, precision, expected",
    [("bf16", "", True), ("f16", "", True), ("f32", "", False), ("f32", "tf32", True)],
)
def test_which_dots_use_tensor_cores(operands, precision, expected):
    precision = f", inputPrecision = {precision}" if precision else ""
    tile = f"tensor<64x64x{operands}>"
    line = f"%9 = tt.dot %7, %8, %6{precision} : {tile} * {tile} -> tensor<64x64xf32> loc(#1)"
    assert resources.uses_tensor_cores(line) == expected
    assert not resources.uses_tensor_cores(line.replace("tt.dot", "tt.add"))
