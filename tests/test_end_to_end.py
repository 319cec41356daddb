"""The benchmark of whole predictions: what it plans, measures, judges, and compares with."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import end_to_end, end_to_end_report, inputs, mmseg_side, peer
from benchmarks.end_to_end import PROTOCOLS, WATERFALL, Row
from pointrend_triton import Predictor
from pointrend_triton.checkpoint import CheckpointError
from pointrend_triton.config import load_config
from pointrend_triton.models.pointrend import PointRend

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MEASURED = {"ms_median": 2.0, "ms_p10": 1.9, "ms_p90": 2.2, "ms_p99": 3.0, "calls": 9}
MEASURED |= {"images_per_second": 500.0, "agreement": 0.999}
# speaks as mmseg_side.py does, and labels everything 3
OTHER_SIDE = """
import json, sys
import numpy as np
config, weights, images, height, width, threads, labels = sys.argv[1:]
assert config == "theirs" and np.load(images).shape == (1, 3, 32, 64)
print(json.dumps({"mmsegmentation": "1.2.2"}), flush=True)
for line in sys.stdin:
    np.save(labels, np.full((int(height), int(width)), 3, np.uint8))
    print(json.dumps(50.0), flush=True)
"""


def tiny(name="cityscapes_r50"):
    return end_to_end.make_model(name, None, quick=True)


def run(tmp_path, *options):
    status = end_to_end.main(["--device", "cpu", "--out", str(tmp_path), *options])
    path = tmp_path / "end_to_end.json"
    return status, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.slow
def test_quick(tmp_path, capsys):
    status, result = run(tmp_path, "--quick", "--models", "cityscapes_r50", "ade20k_r101")
    assert status == 0
    assert {"device", "commit", "date", "versions", "command", "threads"} <= result.keys()
    assert [(row["model"], row["variant"]) for row in result["rows"]] == [
        *(("cityscapes_r50", name) for name in ("fp32", "bf16", "channels-last", "BN folded")),
        ("cityscapes_r50", "no point head"),
        *(("ade20k_r101", name) for name in ("fp32", "BN folded", "no point head")),
    ]
    for row in result["rows"]:
        assert row["error"] is None and row["device_ms"] is None and row["peak_memory_mib"] is None
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"] <= row["ms_p99"]
        assert row["images_per_second"] == pytest.approx(1e3 / row["ms_median"])
        assert row["calls"] >= end_to_end.ROUNDS
        assert row["agreement"] == 1 if row["variant"] == "fp32" else 0.7 < row["agreement"] < 1
    assert all(verdict["met"] is None for verdict in result["verdicts"])
    assert any(reason.startswith("CUDA graph: ") for reason in result["left_out"])
    assert (tmp_path / "end_to_end.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "not judged here" in printed and "published for a V100 and fp32, other" in printed


def test_the_plan_for_a_gpu():
    groups, left_out = end_to_end.plan("cityscapes_r50", CUDA, quick=False)
    alone, batched = groups
    assert not left_out
    assert [row.variant for row in alone[:8]] == list(WATERFALL)
    for row, before, added in zip(alone[1:8], alone, list(WATERFALL.values())[1:], strict=False):
        assert row.settings == before.settings | added != before.settings
    last = alone[7].settings
    assert alone[8].settings == last | {"refine": False}
    assert alone[9].settings == last | {"refine": False, "backend": "reference"}
    assert [row.batch for row in batched] == [8, 8, 8]
    assert [row.variant for row in batched] == ["fp32", "CUDA graph", "no point head"]
    large, left_out = end_to_end.plan("ade20k_r101", CUDA, quick=False)
    assert [row.variant for row in large[0][:3]] == ["fp32", "CUDA graph", "no point head"]
    assert "kernels of ResNet-101: see ResNet-50" in left_out


def test_settings_reach_the_predictor(monkeypatch):
    seen = []

    class Spy(Predictor):
        def __init__(self, model, **options):
            seen.append((dict(options), torch.backends.cudnn.allow_tf32))
            graphs = options.pop("graphs", False)
            super().__init__(model, **options | {"compile": False})
            self.graphs = graphs

    monkeypatch.setattr(end_to_end, "Predictor", Spy)
    settings = end_to_end.plan("cityscapes_r50", CUDA, quick=False)[0][0][7].settings
    images = inputs.images((1, 3, 32, 64), CPU)
    row = Row("cityscapes_r50", "CUDA graph", 1, settings)
    with end_to_end.as_set(settings):
        variant = end_to_end.prepare(row, tiny(), images, (30, 60), CPU)
    options, tf32 = seen[0]
    named = dict.fromkeys(("fold", "channels_last", "compile", "graphs"), True)
    assert options == {"dtype": torch.bfloat16, **named} and tf32
    assert variant.run(images).shape == (1, 30, 60)


def test_agreement_is_with_plain_fp32(monkeypatch):
    """And a variant that fails, at once or later, does not stop the others."""
    original, calls = end_to_end.Predictor.__call__, []

    def half_wrong(self, images, size, **options):
        labels = original(self, images, size, **options)
        if self.dtype == torch.bfloat16:
            calls.append(self)
            if len(calls) > 100:
                raise ArithmeticError("tired")
            labels[..., ::2] = 255
        return labels

    monkeypatch.setattr(end_to_end.Predictor, "__call__", half_wrong)
    rows = end_to_end.plan("cityscapes_r50", CPU, quick=True)[0][0]
    fp32, bf16 = rows[:2]
    wrong = replace(bf16, settings={**bf16.settings, "graphs": True, "backend": "none"})
    timer = end_to_end.Timer(CPU, end_to_end.EFFORTS["quick"])
    protocol = replace(PROTOCOLS["cityscapes_r50"], image_size=(32, 64), size=(32, 64))
    done = end_to_end.measure([fp32, bf16, wrong], tiny(), protocol, 0, timer)
    assert done[0].agreement == 1 and done[0].error is None
    assert 0.3 < done[1].agreement < 0.5
    assert "none" in done[2].error and done[2].ms_median is None
    calls[:] = [None] * 95
    assert "tired" in end_to_end.measure([fp32, bf16], tiny(), protocol, 0, timer)[1].error


def test_a_plain_run_that_fails_is_an_error_of_its_group(monkeypatch):
    def too_large(*_, **__):
        raise MemoryError("too large")

    monkeypatch.setattr(end_to_end.Predictor, "__call__", too_large)
    rows = end_to_end.plan("cityscapes_r50", CPU, quick=True)[0][0]
    timer = end_to_end.Timer(CPU, end_to_end.EFFORTS["quick"])
    protocol = replace(PROTOCOLS["cityscapes_r50"], image_size=(32, 64), size=(32, 64))
    done = end_to_end.measure(rows, tiny(), protocol, 0, timer)
    assert [row.variant for row in done] == [row.variant for row in rows]
    assert {row.error for row in done} == {"plain fp32: MemoryError: too large"}


def test_memory_is_that_of_a_later_call(monkeypatch):
    """Of what is alive, 100 MiB are of others; the first call tries algorithms."""
    held, alive, peak = 400, 100, 900

    def hold(mib):
        nonlocal held, peak
        held = max(held, mib)
        peak = max(peak, held)

    def give_back():
        nonlocal held
        held = alive

    def forget_peak():
        nonlocal peak
        peak = held

    class Spy(Predictor):
        def __call__(self, images, size, **options):
            nonlocal alive
            hold(alive + (30 if alive > 100 else 5000))
            alive = 120
            return super().__call__(images, size, **options)

    for name, answer in {
        "empty_cache": give_back,
        "reset_peak_memory_stats": lambda device: forget_peak(),
        "memory_reserved": lambda device: held * 2**20,
        "max_memory_reserved": lambda device: peak * 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(end_to_end, "Predictor", Spy)
    row = end_to_end.plan("cityscapes_r50", CPU, quick=True)[0][0][0]
    images = inputs.images((1, 3, 32, 64), CPU)
    assert end_to_end.prepare(row, tiny(), images, (30, 60), CUDA).row.peak_memory_mib == 50


def measured(variant, device_ms, **changed):
    settings = {"refine": "no" not in variant, "graphs": True}
    settings["backend"] = "reference" if "dense" in variant else "auto"
    fields = {"settings": settings, "device_ms": device_ms, **MEASURED, **changed}
    return Row(**{"model": "cityscapes_r50", "variant": variant, "batch": 1, **fields})


def test_verdicts():
    rows = [
        measured("fp32", 40.0),
        measured("CUDA graph", 1.02),
        measured("no point head", 1.0),
        measured("no point head, dense decode", 2.0),
    ]
    protocol = PROTOCOLS["cityscapes_r50"]
    speed, fused, dense = end_to_end.verdicts(rows, protocol, judged=True)
    assert (speed.value, speed.goal, speed.met, speed.published_v100) == (500.0, 250, True, 8.48)
    assert fused.value == pytest.approx(2) and fused.goal == 3 and fused.met is True
    assert dense.value == pytest.approx(-49) and dense.goal is None and dense.met is None
    slow = replace(rows[1], device_ms=1.04, images_per_second=249.0)
    found = end_to_end.verdicts([rows[0], slow, rows[2]], protocol, judged=True)
    assert [verdict.met for verdict in found] == [False, False]
    elsewhere = end_to_end.verdicts(rows, protocol, judged=False)
    assert [verdict.met for verdict in elsewhere] == [None, None, None]
    failed = [rows[0], replace(rows[1], error="no")]
    assert [verdict.met for verdict in end_to_end.verdicts(failed, protocol, judged=True)] == [None]
    kernels = measured("kernels", 1.5, settings=rows[1].settings | {"graphs": False})
    unlike = end_to_end.verdicts([rows[0], kernels, *rows[2:]], protocol, judged=True)
    assert [verdict.what for verdict in unlike] == ["cityscapes_r50, kernels, images per second"]
    text = end_to_end_report.sentences([asdict(verdict) for verdict in found])
    assert "goal on an H200 250: missed" in text and "V100" in text


def test_failures_are_in_table_and_picture():
    rows = [asdict(measured("fp32", None)), asdict(measured("bf16", 1.0, error="out of memory"))]
    text = end_to_end_report.table(rows, ["tf32: a CPU has none"])
    assert "failed: cityscapes_r50 bf16, batch 1: out of memory" in text
    assert "left out: tf32" in text and "99.900%" in text
    head = {"device": "a machine", "versions": {"torch": "2"}}
    head["protocols"] = {"cityscapes_r50": asdict(PROTOCOLS["cityscapes_r50"])}
    assert end_to_end_report.draw(head, rows).startswith(b"\x89PNG")
    assert end_to_end_report.draw(head, rows[1:]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--models", "r50"], "r50: choose of cityscapes_r50"),
        (["--models", "camvid_r50", "--checkpoint", "a.pth"], "camvid_r50: choose of cityscapes"),
        (["--checkpoint", "a.pth"], "name it by --models"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_wrong_options(options, reason, capsys):
    with pytest.raises(SystemExit):
        end_to_end.parse_arguments(options)
    assert reason in capsys.readouterr().err


def test_no_checkpoint(tmp_path, capsys):
    options = ["--models", "ade20k_r50", "--checkpoint", str(tmp_path / "none.pth")]
    assert run(tmp_path, *options) == (1, None)
    assert "none.pth" in capsys.readouterr().err


def test_a_checkpoint_of_another_network(tmp_path):
    path = tmp_path / "a.pth"
    for name, changed, reason in (
        ("ade20k_r50", {}, "a.pth has num_classes 150, cityscapes_r50 has 19"),
        ("cityscapes_r50", {"depth": 18}, "a.pth has depth 18, cityscapes_r50 has 50"),
    ):
        small = {**end_to_end.TINY, "depth": 50, **changed}
        model = PointRend(replace(load_config(name).model, **small))
        torch.save({"state_dict": model.state_dict()}, path)
        with pytest.raises(CheckpointError, match=reason):
            end_to_end.make_model("cityscapes_r50", path, quick=False)


def test_an_interrupt_leaves_the_groups_before(tmp_path, monkeypatch):
    groups = [[measured("fp32", None)], [measured("fp32", None, batch=8)]]
    calls = []

    def measure(rows, *_):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(end_to_end, "plan", lambda *_: (groups, []))
    monkeypatch.setattr(end_to_end, "measure", measure)
    status, result = run(tmp_path, "--quick", "--models", "cityscapes_r50")
    assert status == 130 and calls == groups
    assert [row["batch"] for row in result["rows"]] == [1] and len(result["verdicts"]) == 1


def test_random_networks_label_with_regions():
    """The same each time, and the point head changes some labels."""
    config = load_config("ade20k_r50").model
    config = replace(config, **end_to_end.TINY)
    models = [inputs.network(config) for _ in range(2)]
    images = inputs.images((1, 3, 64, 96), CPU)
    refined = [Predictor(model)(images) for model in models]
    assert torch.equal(*refined) and refined[0].unique().numel() > 20
    coarse = Predictor(models[0])(images, refine=False)
    assert 0.05 < (coarse != refined[0]).float().mean() < 0.9
    assert (coarse[:, :, 1:] != coarse[:, :, :-1]).float().mean() < 0.2


def other_side(monkeypatch, tmp_path, script):
    path = tmp_path / "side.py"
    path.write_text(script)
    monkeypatch.setattr(peer, "SIDE", path)
    model = tiny()
    monkeypatch.setattr(peer.inputs, "network", lambda config: model)


def test_beside_another_program(tmp_path, monkeypatch):
    other_side(monkeypatch, tmp_path, OTHER_SIDE)
    monkeypatch.setattr(peer, "OURS", {"ours": {}, "broken": {"fold": "no", "steps": 1}})
    case = ("cityscapes_r50", "theirs", (32, 64), (40, 80), 3)
    theirs, ours, broken = peer.compare_one(sys.executable, *case, compiled=True)
    assert theirs.versions == {"mmsegmentation": "1.2.2"} and theirs.speedup == 1
    assert theirs.ms_median == 50 and theirs.calls == ours.calls == 3
    assert ours.speedup == pytest.approx(50 / ours.ms_median)
    expected = Predictor(tiny())(inputs.images((1, 3, 32, 64), CPU), (40, 80))
    assert ours.agreement == pytest.approx(np.mean(expected.numpy() == 3))
    assert "steps" in broken.error
    assert "times as fast" in peer.table([theirs, ours, broken])


def test_a_case_that_fails_leaves_those_before(tmp_path, monkeypatch, capsys):
    other_side(monkeypatch, tmp_path, OTHER_SIDE)
    monkeypatch.setattr(peer, "OURS", {"ours": {}})
    case = ("cityscapes_r50", "theirs", (32, 64), (40, 80), 1)
    wrong = ("cityscapes_r50", "not theirs", *case[2:])
    monkeypatch.setattr(peer, "QUICK_CASES", (case, wrong))
    status, result = run(tmp_path, "--models", "--quick", "--peer", sys.executable)
    assert status == 1 and "AssertionError" in capsys.readouterr().err
    assert [row["variant"] for row in result["peer"]] == ["mmsegmentation", "ours"]


def test_turns_go_both_ways():
    order = []
    runs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    times = peer.take_turns(runs, 2)
    assert "".join(order) == "baabba" and times == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("raise SystemExit(7)", "exit status 7"),
        ("print('{}', flush=True)", "exit status 0"),
    ],
)
def test_a_peer_that_does_not_answer(tmp_path, monkeypatch, capsys, script, reason):
    other_side(monkeypatch, tmp_path, script)
    assert run(tmp_path, "--models", "--quick", "--peer", sys.executable) == (1, None)
    assert reason in capsys.readouterr().err


def test_no_such_python(tmp_path, capsys):
    assert run(tmp_path, "--models", "--quick", "--peer", "/no/python")[0] == 1
    assert "--peer /no/python: No such file" in capsys.readouterr().err


def test_absent_operators_complain_only_when_called():
    module = mmseg_side.AbsentOperators("mmcv._ext")
    with pytest.raises(NotImplementedError, match="roi_align is not installed"):
        module.roi_align()
    assert not hasattr(module, "__path__")
