"""The benchmarks: every one runs, counts and compares rightly, and says what it ran on."""

import csv
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from benchmarks import (
    floors,
    harness,
    identity,
    inputs,
    operations,
    plot,
    record,
    row_gather,
    sanitize,
    smoke,
    stock,
    triton_cache,
)
from benchmarks.harness import Rates, Row
from pointrend_triton import ops, reference

CPU = torch.device("cpu")
OPS = (
    *("point_sample", "uncertainty", "select", "point_head", "decode", "refine"),
    *("training_branch", "augment"),
)
RATES = Rates(1000.0, {"fp32": 10.0, "bf16": 100.0}, 5000.0)
ROW = Row("op", "case", {"N": 1}, "bf16", "forward", "eager", "nchw")


def bench(op):
    return importlib.import_module(f"benchmarks.bench_{op}")


@pytest.fixture
def without_kernels(monkeypatch):
    """The interpreter would take minutes; one test below is enough of it."""
    monkeypatch.setattr(harness, "triton_runs", lambda device: False)


@pytest.mark.slow
def test_every_bench_runs(tmp_path, without_kernels, capsys):
    for op in OPS:
        assert bench(op).main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0, op
        run = json.loads((tmp_path / f"{op}.json").read_text())
        for name in ("device", "cpu", "driver", "commit", "date", "command", "rates", "left_out"):
            assert name in run
        assert {"torch", "triton", "cuda"} <= run["versions"].keys()
        assert f"bench_{op} --quick" in run["command"]
        rows = run["rows"]
        assert all(row.keys() == {f.name for f in fields(Row)} for row in rows)
        assert {row["case"] for row in rows} == {case.name for case in bench(op).CASES}
        for row in rows:
            assert row["error"] is None and row["median_us"] > 0 and row["repetitions"] >= 2
            assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
            assert row["launches"] is None and row["peak_mib"] is None and row["flushed"] is None
            # 16 bits: eager rounds coordinates and may so choose other points
            if row["variant"] in ("eager", "reference") and row["dtype"] == "fp32":
                assert row["difference"] < 1e-4, row
        variants = {row["variant"] for row in rows}
        assert {"eager", "reference"} <= variants and "ours" not in variants
        lines = list(csv.DictReader((tmp_path / f"{op}.csv").open()))
        assert len(lines) == len(rows) and lines[0]["torch"] == torch.__version__
    assert "difference" in capsys.readouterr().out

    record.main([str(tmp_path), "--out", str(tmp_path / "all" / "results")])
    merged = tmp_path / "all" / "results.json"
    runs = record.read([merged])
    assert len(runs) == len(OPS)
    lines = list(csv.DictReader(merged.with_suffix(".csv").open()))
    assert len(lines) == sum(len(run["rows"]) for run in runs)
    plot.main([str(merged), "--out", str(tmp_path / "speedups.png")])
    assert (tmp_path / "speedups.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):  # nothing was replayed from a graph here
        plot.main([str(merged), "--out", str(tmp_path / "graph.png"), "--launched", "graph"])
    assert not (tmp_path / "graph.png").exists()


def test_kernels_beside_stock(tmp_path):
    """Where the interpreter runs them, the kernels are compared and their time is set apart."""
    if not harness.triton_runs(CPU):
        pytest.skip("needs Triton's interpreter")
    arguments = ["--only", "train_labels", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert bench("point_sample").main(arguments) == 0
    (run,) = record.read([tmp_path / "point_sample.json"])
    ours = [row for row in run["rows"] if row["variant"] == "ours"]
    assert [row["launched"] for row in ours] == ["interpreter"]
    assert ours[0]["difference"] == 0 and ours[0]["speedup"] is None


def test_cases_are_named_once_and_shrink():
    for op in OPS:
        names = [case.name for case in bench(op).CASES]
        assert len(names) == len(set(names))
        for case in bench(op).CASES:
            assert inputs.scaled(case.sizes, "full") == case.sizes
    shrunk = inputs.scaled({"N": 100, "C": 150, "H": 256, "W": 1, "P": 8196}, "cpu")
    assert shrunk == {"N": 4, "C": 150, "H": 64, "W": 1, "P": 512}


def test_wrong_arguments_name_the_choices(capsys):
    for arguments, words in (
        (["--only", "cityscape"], "no such case; choose of .*cityscapes_coarse.*ade20k_refined"),
        (["--device", "moon"], "--device 'moon' is no device here"),
        (["--dtype", "int4"], "int4"),
    ):
        with pytest.raises(SystemExit) as stop:
            bench("decode").main(arguments)
        assert stop.value.code == 2
        error = " ".join(capsys.readouterr().err.split())
        assert re.search(words, error), error


def test_statistics():
    got = harness.statistics([float(value) for value in range(11)])
    assert got == {"median_us": 5, "p10_us": 1, "p90_us": 9, "repetitions": 11}


def test_repetitions_fill_the_time():
    effort = harness.Effort(1.0, least=3, most=20)
    assert [effort.repetitions(each) for each in (10, 0.1, 0)] == [3, 10, 20]


def test_floor_takes_the_longer_bound():
    # 1 MB at 1000 GB/s is 1 us; 1 GFLOP at 100 TFLOP/s is 10 us, at 10 TFLOP/s 100 us
    assert harness.floor(floors.Work(1e6), "bf16", RATES) == (1, "memory")
    assert harness.floor(floors.Work(1e6, 1e9), "bf16", RATES) == (10, "arithmetic")
    assert harness.floor(floors.Work(1e6, 1e9), "bool", RATES) == (100, "arithmetic")


def test_derived_columns():
    work = floors.Work(1e6, 1e9, l2_bytes=1e7)
    row = harness.derived(replace(ROW, median_us=40.0), work, RATES)
    assert (row.gb_per_s, row.tflop_per_s) == (25, 25)
    assert (row.floor_us, row.percent_of_floor, row.bound) == (10, 25, "arithmetic")
    assert row.l2_us == 2
    assert harness.derived(replace(ROW, error="no"), work, RATES).floor_us is None


def test_best_layout_and_speedup():
    rows = [
        replace(ROW, median_us=30.0),
        replace(ROW, median_us=20.0, layout="channels_last"),
        replace(ROW, median_us=5.0, variant="ours"),
        replace(ROW, median_us=4.0, variant="ours", launched="graph"),
        replace(ROW, error="no", variant="compiled"),
    ]
    found = harness.compared(rows)
    assert [row.best for row in found] == [False, True, True, True, False]
    # a graph is not compared with launches from Python
    assert [row.speedup for row in found] == [20 / 30, 1, 4, None, None]


def test_difference():
    exact = torch.tensor([1.0, -4.0])
    assert harness.difference(exact, exact) == 0
    assert harness.difference(exact + torch.tensor([0.0, 1.0]), exact) == 0.25
    assert harness.difference((exact, None, exact + 2), (exact, exact)) == 0.5
    # a quarter of the labels, whatever their type
    labels = torch.tensor([0, 1, 2, 3])
    assert harness.difference(torch.tensor([0, 1, 2, 9]), labels.to(torch.uint8)) == 0.25
    off = harness.difference(torch.tensor([float("nan"), 1]), exact)
    assert off != off


def test_a_failing_variant_leaves_the_others(tmp_path, monkeypatch, capsys):
    def fail(x, s):
        raise RuntimeError("no such\nkernel")

    case = replace(bench("decode").CASES[0], stock=fail, dtypes=("fp32",))
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(harness, "triton_runs", lambda device: False)
    assert harness.main("decode", [case], arguments) == 1
    (run,) = record.read([tmp_path / "decode.json"])
    errors = {row["variant"]: row["error"] for row in run["rows"]}
    assert errors == {"eager": "RuntimeError: no such kernel", "reference": None}
    assert "failed: cityscapes_coarse fp32 forward eager" in capsys.readouterr().out


def test_time_limit_lists_what_it_left_out(tmp_path, without_kernels, capsys):
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--seconds", "-1"]
    assert bench("select").main(arguments) == 0
    (run,) = record.read([tmp_path / "select.json"])
    assert run["rows"] == [] and len(run["left_out"]) == len(bench("select").CASES)
    assert "left out, the time was up: cityscapes_step1 fp32" in capsys.readouterr().out


def test_compiled_is_measured_where_eager_was_faster(monkeypatch):
    monkeypatch.setattr(harness, "COMPILER", "eager")  # traces, but does not generate code
    (case,) = (case for case in bench("point_sample").CASES if case.name == "train_features")
    timer = harness.Timer(CPU, harness.EFFORTS["quick"])
    before = [replace(ROW, case=case.name, dtype="fp32", layout="channels_last", best=True)]
    rows = harness.measure(
        "point_sample", case, "fp32", timer, RATES, level="quick", compiled=True, before=before
    )
    assert [row.direction for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert (row.variant, row.layout, row.error) == ("compiled", "channels_last", None)
        assert row.difference < 1e-5


def test_backward_is_of_the_same_gradient():
    """Backward alone gives the gradients of forward and backward together."""
    (case,) = (case for case in bench("point_head").CASES if case.name == "train_cityscapes")
    sizes = inputs.scaled(case.sizes, "quick")
    made = case.make(sizes, torch.float32, CPU)
    x = harness._laid_out(made, case, torch.channels_last)
    alone, both = (
        harness.runner(case, direction, case.stock, x, sizes)()
        for direction in ("backward", "both")
    )
    assert len(alone) == len(x["weights"]) * 2 + 2
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    assert x["fine"].is_contiguous(memory_format=torch.channels_last)
    assert made["fine"].is_contiguous() and not made["fine"].requires_grad


def test_stock_is_the_reference_in_fp32():
    logits = inputs.logits((2, 19, 9, 7), torch.float32, CPU)
    draws = inputs.draws(2, 20, CPU)
    expected = reference.select_uncertain_points(logits, 20, draws=tuple(draws))
    assert torch.equal(stock.select_uncertain_points(logits, 20, draws), expected)
    masks = logits[:, :1] > 0
    torch.testing.assert_close(
        stock.point_sample(masks, draws[0][:1]), ops.point_sample(masks, draws[0][:1])
    )


def test_row_gather_adds_the_four_cells_around_a_point():
    maps = (
        torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    )
    # between four cells: their mean is the bilinear sample
    coords = torch.tensor([[[0.2, 0.25], [0.8, 0.5]], [[0.4, 0.75], [0.6, 0.5]]])
    rows = row_gather.taps(coords, 4, 5)
    sums = row_gather.gather(maps, rows)
    expected = ops.point_sample(maps, coords).transpose(1, 2).reshape(4, 3)
    torch.testing.assert_close(sums / 4, expected)


@pytest.mark.skipif(row_gather.triton is None, reason="needs Triton")
def test_row_gather_kernel():
    maps, rows = torch.randn(2, 3, 4, 5), torch.randint(40, (11, 4), dtype=torch.int32)
    maps = maps.contiguous(memory_format=torch.channels_last)
    sums = row_gather.gather(maps, rows)
    cells = maps.permute(0, 2, 3, 1).reshape(-1, 3)
    if torch.cuda.is_available():
        launched = row_gather.launch(cells.cuda(), rows.cuda()).cpu()
    else:  # in the interpreter
        launched = row_gather.launch(cells, rows)
    torch.testing.assert_close(launched, sums)


def test_floors():
    # few points touch four cells each, many touch all
    assert floors.touched(10**6, 10) == pytest.approx(40, rel=1e-4)
    assert floors.touched(100, 10**6) == pytest.approx(100)
    # 19 classes of 2 bytes in and at twice the sides out, and a score of 4 bytes
    step = floors.upsample(1, 19, 256 * 512, 2, logits=True, labels=False)
    assert step.bytes == 256 * 512 * (19 * 2 + 4 * (19 * 2 + 4))
    sizes = {"N": 1, "F": 256, "C": 19, "D": 256, "L": 3, "H": 9, "W": 9, "fh": 9, "fw": 9}
    head = floors.head(sizes, 8196, 2)
    # 275 inputs of every layer
    assert head["forward"].flops == 2 * 8196 * 275 * (3 * 256 + 19)
    assert head["both"].flops == 3 * head["forward"].flops


def test_without_the_compiled_variant(tmp_path, without_kernels, monkeypatch):
    monkeypatch.setattr(harness, "COMPILER", "eager")
    (case,) = (case for case in bench("decode").CASES if case.name == "cityscapes_coarse")
    small = replace(case, sizes=inputs.scaled(case.sizes, "quick"), dtypes=("fp32",))
    for option, variants in ((["--no-compiled"], set()), ([], {"compiled"})):
        arguments = ["--device", "cpu", "--out", str(tmp_path), *option]
        monkeypatch.setattr(harness, "measure_rates", lambda timer, quick: RATES)
        assert harness.main("decode", [small], arguments) == 0
        (run,) = record.read([tmp_path / "decode.json"])
        assert {row["variant"] for row in run["rows"]} == {"eager", "reference"} | variants


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    arguments = ["--only", "train_features", "--dtype", "bf16", "--out", str(tmp_path)]
    assert bench("point_sample").main([*arguments, "--device", "cuda", "--quick"]) == 0
    (run,) = record.read([tmp_path / "point_sample.json"])
    modes = {(row["launched"], row["flushed"]) for row in run["rows"]}
    assert modes == {(launched, f) for launched in ("eager", "graph") for f in (True, False)}
    for row in run["rows"]:
        assert row["launches"] >= 1 and row["peak_mib"] > 0
        assert row["direction"] in harness.DIRECTIONS


@pytest.mark.slow
def test_sanitize_runs_every_operation(monkeypatch, capsys):
    called = set()
    names = ("point_sample", "select_uncertain_points", "topk_on_grid", "upsample_uncertainty")
    names += ("point_head", "decode", "refine", "augment")
    for name in names:
        original = getattr(ops, name)

        def spy(*args, original=original, name=name, **kwargs):
            called.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    assert sanitize.main(["--device", "cpu"]) == 0
    assert called == set(names)


SMALL = [(2, 3, 4)]


def test_smoke_names_what_differs(monkeypatch, capsys):
    """The reference in place of the kernels, with faults in two operations."""
    names = ("topk_on_grid", "decode", "upsample_uncertainty", "point_sample of labels and masks")
    monkeypatch.setattr(smoke, "OPERATIONS", {name: operations.OPERATIONS[name] for name in names})
    monkeypatch.setattr(smoke, "MAPS", SMALL)
    assert smoke.main(["--device", "cpu"]) == 0
    assert "all as the twin" in capsys.readouterr().out

    def faulty(name, fault):
        original = getattr(ops, name)

        def changed(*args, **kwargs):
            result = original(*args, **kwargs)
            return result if ops.backend.current() == "reference" else fault(result)

        monkeypatch.setattr(ops, name, changed)

    def fail(result):
        raise RuntimeError("no such kernel")

    faulty("decode", lambda labels: 1 - labels)
    faulty("upsample_uncertainty", lambda result: (result[0], result[1] * 1.01, None))
    faulty("topk_on_grid", fail)
    with ops.backend("auto"):
        found = list(smoke.compared(torch.float32, CPU))
    assert len(found) == 6  # in both layouts
    for words in (
        "topk_on_grid, torch.float32, maps 2 x 3 x 4: RuntimeError: no such kernel",
        "decode, torch.float32, maps 2 x 3 x 4, channels-last, result 0, [2, 3, 4]: 24 of 24 ",
        "upsample_uncertainty, torch.float32, maps 2 x 3 x 4, result 1, [2, 2, 6, 8]: ",
    ):
        assert any(line.startswith(words) for line in found), words


@pytest.mark.slow
def test_kernels_are_as_the_twin(monkeypatch):
    if not harness.triton_runs(CPU):
        pytest.skip("needs Triton's interpreter")
    names = ("topk_on_grid", "decode", "point_sample of labels and masks")
    monkeypatch.setattr(smoke, "OPERATIONS", {name: operations.OPERATIONS[name] for name in names})
    monkeypatch.setattr(smoke, "MAPS", SMALL)
    with ops.backend("triton"):
        assert list(smoke.compared(torch.float16, CPU)) == []


def test_no_scores_are_close_where_a_choice_ends():
    """Or smoke would call the other choice a difference."""
    for dtype, size in itertools.product((torch.float32, torch.bfloat16), operations.MAPS):
        x = operations.each_tensor(
            operations.drawn(dtype, *size), lambda t: t.double() if t.is_floating_point() else t
        )
        far = 1e-5 * x["coarse"].abs().max()
        candidates = reference.point_sample(x["coarse"], x["draws"][0])
        scores = reference.score(candidates)[:, 0].sort(descending=True).values
        assert (scores[:, 51] - scores[:, 52] > far).all()
        if dtype == torch.float32:  # 16 bits tie, and are not compared
            maps = x["coarse"], x["coarse"], x["fine"], x["weights"], x["biases"]
            chosen = []

            def select(scores, k, chosen=chosen):
                chosen.append(scores.flatten(1).sort(descending=True).values)
                return reference.topk_on_grid(scores, k)

            refined, *others = maps
            for _ in range(2):
                refined, _ = reference.refine_step(
                    refined, *others, num_points=40, coarse_each_layer=True, select=select
                )
            assert all((row[:, 39] - row[:, 40] > far).all() for row in chosen)


def test_tritons_cache_is_carried(tmp_path):
    """To another folder, without what only people read."""
    here, there, archive = tmp_path / "here", tmp_path / "there", tmp_path / "cache.tar.xz"
    (here / "key").mkdir(parents=True)
    for name in ("k.cubin", "k.json", "k.ptx", "launcher.so"):
        (here / "key" / name).write_text(name)
    group = {name: str(here / "key" / name) for name in ("k.cubin", "k.json", "k.ptx")}
    (here / "key" / "__grp__k.json").write_text(json.dumps({"child_paths": group}))
    assert triton_cache.pack(here, archive) == 1
    assert triton_cache.unpack(archive, there) == 1
    assert sorted(path.name for path in (there / "key").iterdir()) == [
        *("__grp__k.json", "k.cubin", "k.json", "launcher.so"),
    ]
    moved = json.loads((there / "key" / "__grp__k.json").read_text())["child_paths"]
    assert moved == {name: str(there / "key" / name) for name in group}
    assert not (tmp_path / "cache.tar.xz.new").exists()


COMPILES = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def kernel(x):
    tl.store(x, tl.load(x) + 1)

triton.knobs.compilation.listener = lambda *, cache_hit, **_: print(cache_hit)
source = ASTSource(kernel, {"x": "*fp32"}, {})
assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@pytest.mark.slow
def test_triton_takes_what_was_carried(tmp_path):
    """A kernel from another folder, in a program that lies elsewhere."""
    pytest.importorskip("triton", reason="needs Triton")
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "program.py").write_text(COMPILES)
        cache = tmp_path / name / "cache"
        if name == "there":
            triton_cache.pack(tmp_path / "here" / "cache", tmp_path / "cache.tar.xz")
            triton_cache.unpack(tmp_path / "cache.tar.xz", cache)
        environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
        command = [sys.executable, tmp_path / name / "program.py"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.strip())
    assert found == ["False", "True"]


def test_identity(capsys):
    assert identity.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name in ("date", "commit", "torch", "triton", "cv2", "pytest", "compute-sanitizer"):
        assert re.search(f"^{name}: .", out, re.M), name
    assert identity.version("no_such_package") is None
    assert identity.version("numpy")[0].isdigit()
