"""The benchmark of points against time: settings, figures against an evaluation, files, errors."""

import json

import cv2
import numpy as np
import pytest
import torch
import yaml

from benchmarks import points
from benchmarks.points import Setting
from pointrend_triton import Predictor, build_model
from pointrend_triton.config import load_config
from pointrend_triton.data import build_dataset
from pointrend_triton.inference import evaluate_dataset

TINY = {
    "model": {
        **{"depth": 18, "num_classes": 8},
        **{"base_channels": 8, "fpn_channels": 16, "head_channels": 8},
        "point_head": {"channels": 16, "num_points": 32, "subdivision_num_points": 100},
    },
    "data": {
        **{"dataset": "shapes", "shapes_size": [64, 48], "crop_size": [64, 64]},
        **{"scale": [64, 64], "test_scale": None, "shapes_eval_images": 3},
    },
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def model(tiny):
    model = build_model(load_config(tiny)).eval()
    # large, so that points change labels
    with torch.no_grad():
        model.point_head.fc_seg.weight.mul_(1000)
    return model


@pytest.fixture
def checkpoint(tmp_path, model):
    path = tmp_path / "tiny.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def test_settings_are_from_few_to_many_and_0_points_come_once():
    assert points.settings({2: [None, 0, 64, 8, 64], 1: [8, 0]}) == [
        Setting(0, 0),
        Setting(1, 8),
        Setting(2, 8),
        Setting(2, 64),
        Setting(2, None),
    ]


@pytest.mark.parametrize(
    ("configured", "cells", "expected"),
    [
        (512, 16384, [0, 128, 256, 512, 1024, 2048, 4096, 8192, None]),
        (100, 192, [0, 25, 50, None]),
        (0, 64, [0, 16, 32, None]),
        (8196, 4096, [0, None]),
    ],
)
def test_default_points(configured, cells, expected):
    assert points.default_points(configured, cells) == expected


def test_figures_are_those_of_an_evaluation_with_as_many_points(tiny, model):
    dataset = build_dataset(load_config(tiny).data, "val")
    chosen = points.settings({2: [0, 100, None], 1: [100]})
    # a coarse map of 16x12
    shares = {
        Setting(0, 0): [],
        Setting(1, 100): [100 / 768],
        Setting(2, 100): [100 / 768, 100 / 3072],
        Setting(2, None): [1, 1],
    }
    rows, network_ms = points.measure(Predictor(model), dataset, None, [0, 2], chosen)
    assert len({row.miou for row in rows}) == 4
    for setting, row in zip(chosen, rows, strict=True):
        model.point_head.config.subdivision_steps = setting.steps
        model.point_head.config.subdivision_num_points = setting.points or 3072
        metrics = evaluate_dataset(model, dataset, None, indices=[0, 2])
        scores = metrics.compute()
        assert (row.steps, row.points) == setting
        assert row.shares == pytest.approx(shares[setting])
        # folding BatchNorm rounds otherwise; a pixel may be another class
        assert row.miou == pytest.approx(scores["miou"], abs=0.05)
        assert row.boundary_iou == pytest.approx(scores["mean_boundary_iou"], abs=0.05)
        for width in (1, 3):
            assert row.band_miou[width] == pytest.approx(scores["band_miou"][width], abs=0.05)
        assert 0 < row.refine_ms < row.total_ms and network_ms < row.total_ms


def test_times_are_medians_that_leave_the_first_pass_out(tiny, model, monkeypatch):
    dataset = build_dataset(load_config(tiny).data, "val")
    predictor = Predictor(model)
    # the network takes 60, 20 and 10 ms, a refinement 1 ms and 1 ms for every 100 points
    network = iter([900.0, 60.0, 20.0, 10.0])

    def timed(device, function):
        if function.func == predictor.model.maps:
            return function(), next(network)
        return function(), 1 + function.keywords["num_points"] / 100

    monkeypatch.setattr(points, "timed", timed)
    chosen = points.settings({2: [0, 100]})
    rows, network_ms = points.measure(predictor, dataset, None, [0, 1, 2], chosen)
    assert network_ms == 20
    assert [(row.refine_ms, row.total_ms) for row in rows] == [(1, 21), (2, 22)]


def test_a_gpu_is_timed_by_a_replay_after_a_first_one(monkeypatch):
    """The clock counts replays, a millisecond each; capturing takes a second."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.time - self.time

    def replay():
        clock[0] += 1

    def capture(make):
        clock[0] += 1000
        run = make()
        return replay, (run, run())

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(points, "capture", capture)
    assert points.timed(torch.device("cuda"), lambda: "labels") == ("labels", 1)
    assert clock == [1002]


def test_the_command(tiny, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--points", "0", "100", "all", "--steps", "1", "2", "--out", str(out)]
    assert points.main([str(tiny), str(checkpoint), *options, "--limit", "2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["points_tiny.json", "points_tiny.png"]
    result = json.loads((out / "points_tiny.json").read_text())
    assert result["command"].startswith(f"python -m benchmarks.points {tiny}")
    assert result["versions"]["torch"] == torch.__version__
    assert (result["data"]["measured"], result["data"]["images"]) == (2, 3)
    assert result["configured"] == {"steps": 2, "points": 100}
    found = [(row["steps"], row["points"]) for row in result["rows"]]
    assert found == [(0, 0), (1, 100), (1, None), (2, 100), (2, None)]
    picture = cv2.imread(str(out / "points_tiny.png"))
    assert picture.shape[1] == 1600
    assert (picture[:20] == 255).all(2).mean() > 0.9, "a light background"
    blue = np.array([0xB2, 0x72, 0x00])
    assert (abs(picture.astype(int) - blue).max(2) < 8).sum() > 500, "a curve"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("the network alone: ")
    assert printed[3].split()[:3] == ["1", "100", "13.0%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "dev"], "points: shapes has no split 'dev'; it has "),
        (["--device", "nonsense"], "points: --device 'nonsense' is no device here: "),
        (["model.num_classes=9"], "has 8"),
        (["data.shapes_eval_images=0"], "shapes_eval_images"),
    ],
)
def test_errors_come_before_the_work(tiny, checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    if arguments == ["model.num_classes=9"]:
        model = build_model(load_config(tiny, arguments))
        torch.save({"state_dict": model.state_dict()}, checkpoint)
    command = [str(tiny), str(checkpoint), *arguments, "--out", str(out)]
    assert points.main(command) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_network_without_point_head(tiny, checkpoint, capsys):
    model = build_model(load_config(tiny, ["model.point_head=null"]))
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    assert points.main([str(tiny), str(checkpoint)]) == 1
    assert f"{checkpoint} has no point head" in capsys.readouterr().err


def test_a_number_of_points_is_a_whole_number_or_all(tiny, checkpoint, capsys):
    with pytest.raises(SystemExit):
        points.main([str(tiny), str(checkpoint), "--points", "-1"])
    with pytest.raises(SystemExit):
        points.main([str(tiny), str(checkpoint), "--points", "many"])
    assert "must be a whole number or 'all', not 'many'" in capsys.readouterr().err


def test_an_interrupt_writes_nothing(tiny, checkpoint, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(points, "measure", interrupted)
    out = tmp_path / "out"
    assert points.main([str(tiny), str(checkpoint), "--out", str(out)]) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(out.iterdir()) == []
