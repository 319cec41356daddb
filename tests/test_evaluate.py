"""evaluate.py from its arguments to its files, with a tiny network on the drawn shapes."""

import json
import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

import evaluate
from pointrend_triton import build_model, inference, report
from pointrend_triton.config import load_config
from pointrend_triton.data import build_dataset
from pointrend_triton.metrics import SegmentationMetrics

HEAD = {"channels": 16, "subdivision_num_points": 256}
SIZES = {"depth": 18, "base_channels": 8, "fpn_channels": 16, "head_channels": 8}
DATA = ["data.shapes_size=[32,48]", "data.shapes_eval_images=5"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On maps this small, threads wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_checkpoint(path, num_classes=8, point_head=HEAD, **meta):
    torch.manual_seed(1)
    model = build_model({"model": {"num_classes": num_classes, "point_head": point_head, **SIZES}})
    # scores spread over the classes, which fresh weights would not give
    torch.nn.init.normal_(model.coarse_head.conv_seg.weight, std=2)
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "tiny.pth")


@pytest.fixture
def run(checkpoint, tmp_path):
    """Runs main on the checkpoint; gives its exit status and what it wrote as JSON."""

    def run(*options, config="shapes_r18", file=checkpoint):
        output = tmp_path / "out" / "scores.json"
        given = [config, str(file), *DATA, "--device", "cpu", "--json", str(output)]
        status = evaluate.main([*given, *options])
        return status, json.loads(output.read_text()) if output.exists() else None

    return run


def test_scores_are_those_of_the_model(run, checkpoint, capsys):
    status, record = run("--both")
    assert status == 0
    model = evaluate.from_checkpoint(checkpoint)
    model.point_head.config.subdivision_num_points = 512
    data = build_dataset(load_config("shapes_r18", DATA).data, "val")
    for method in ("coarse", "refined"):
        expected = SegmentationMetrics(8)
        for i in range(len(data)):
            image, label = data.load(i)
            x = inference.TestTransform(None)(image)[None]
            with torch.no_grad():
                logits = model.coarse(x) if method == "coarse" else model(x)
            logits = torch.nn.functional.interpolate(logits, size=(32, 48), mode="bilinear")
            expected.update(logits.argmax(1)[0], label)
        scores, got = expected.compute(), record["results"][method]
        assert got["images"] == 5
        for key in ("miou", "macc", "aacc", "mean_boundary_iou"):
            assert got[key] == pytest.approx(scores[key], rel=1e-12)
        assert got["band_miou"] == pytest.approx(
            {str(k): v for k, v in scores["band_miou"].items()}
        )
        confusion = expected.confusion
        assert [row["name"] for row in got["classes"]] == list(data.classes)
        assert [row["pixels"] for row in got["classes"]] == confusion.sum(1).tolist()
        assert [row["intersection"] for row in got["classes"]] == confusion.diagonal().tolist()
    results = record["results"]
    assert results["coarse"]["miou"] != results["refined"]["miou"]
    out = capsys.readouterr().out
    assert out.startswith("5 images of shapes val, single scale")
    gain = results["refined"]["miou"] - results["coarse"]["miou"]
    line = next(line for line in out.splitlines() if line.startswith("mIoU"))
    shown = [f"{results[m]['miou']:.2f}" for m in ("coarse", "refined")]
    assert line.split() == ["mIoU", *shown, f"{gain:+.2f}"]
    for name in data.classes:
        assert any(line.startswith(name) and len(line.split()) == 10 for line in out.splitlines())


def test_the_record_says_what_was_measured(run, checkpoint):
    status, record = run("--coarse", "--limit", "2", "--only", "shapes_val_*")
    assert status == 0
    assert list(record["results"]) == ["coarse"] and record["results"]["coarse"]["images"] == 2
    assert record["config"] == "shapes_r18" and record["overrides"] == DATA
    assert record["checkpoint"]["file"] == "tiny.pth" and len(record["checkpoint"]["sha256"]) == 64
    assert record["data"] == {"dataset": "shapes", "split": "val", "images": 5}
    assert record["protocol"]["multi_scale_flip"] is False and record["protocol"]["limit"] == 2
    assert record["model"]["depth"] == 18
    # the subdivision is the configuration's, not the default that the tensors suggest
    assert record["model"]["point_head"]["subdivision_num_points"] == 512
    assert record["versions"]["torch"] == torch.__version__
    assert {"date", "device"} <= set(record)


def test_twelve_passes_differ_from_one(run):
    single, multiple = (run("--limit", "1", *options)[1] for options in ([], ["--ms-flip"]))
    assert single["results"]["refined"]["classes"] != multiple["results"]["refined"]["classes"]
    assert multiple["protocol"]["multi_scale_flip"] is True


def test_options_between_overrides(run):
    _, record = run("--split", "test", "data.shapes_eval_images=3", "--limit", "9")
    assert record["data"] == {"dataset": "shapes", "split": "test", "images": 3}
    assert record["results"]["refined"]["images"] == 3


def test_speed(run, capsys):
    _, record = run("--both", "--speed", "--limit", "2", "data.shapes_size=[32,32]")
    for result in record["results"].values():
        assert (result["speed"]["images"], result["speed"]["skipped"]) == (2, 5)
        assert result["speed"]["images_per_second"] > 0
    out = capsys.readouterr().out
    assert "images/s" in out and "peak MiB" in out


def test_saved_maps_and_pictures(run, tmp_path):
    folder, pictures = tmp_path / "maps", tmp_path / "pictures"
    options = ["--save", str(folder), "--pictures", str(pictures), "--picture-count", "2"]
    run("--only", "*_0000[0-3]", *options)
    stems = [f"shapes_val_0000{i}" for i in range(4)]
    assert sorted(p.stem for p in (folder / "submission").iterdir()) == stems
    assert sorted(p.stem for p in pictures.iterdir()) == [stems[0], stems[2]]
    data = build_dataset(load_config("shapes_r18", DATA).data, "val")
    for stem in stems:
        classes = cv2.imread(str(folder / "submission" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        colors = cv2.imread(str(folder / "color" / f"{stem}.png"))[..., ::-1]
        assert classes.shape == (32, 48) and (data.palette[classes] == colors).all()


def test_saved_maps_of_both_methods_do_not_meet(run, tmp_path):
    run("--both", "--limit", "1", "--save", str(tmp_path / "maps"))
    name = "submission/shapes_val_00000.png"
    maps = [(tmp_path / "maps" / m / name).read_bytes() for m in ("coarse", "refined")]
    assert maps[0] != maps[1]


def test_submissions_are_in_the_servers_encoding(run, tmp_path, monkeypatch):
    data_type = type(build_dataset(load_config("shapes_r18", DATA).data, "val"))
    monkeypatch.setattr(data_type, "encode", lambda self, label: label + 100)
    run("--limit", "1", "--save", str(tmp_path))
    submitted = cv2.imread(str(tmp_path / "submission/shapes_val_00000.png"), 0)
    assert submitted.min() >= 100


@pytest.fixture
def folder_data(tmp_path):
    """A data set of two classes in the plain layout, with one picture."""
    rng = np.random.default_rng(0)
    for kind, array in {
        "images": rng.integers(0, 256, (30, 40, 3)),
        "labels": rng.integers(0, 2, (30, 40)),
    }.items():
        (tmp_path / kind / "val").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / kind / "val" / "a.png"), array.astype(np.uint8))
    (tmp_path / "classes.csv").write_text("index,name\n0,ground\n1,thing\n")
    return [f"data.root={tmp_path}", "data.dataset=folder"]


def test_one_logit_is_measured_over_two_classes(run, folder_data, tmp_path):
    file = write_checkpoint(tmp_path / "binary.pth", num_classes=1)
    status, record = run(*folder_data, file=file)
    assert status == 0
    classes = record["results"]["refined"]["classes"]
    assert [row["name"] for row in classes] == ["ground", "thing"]
    assert sum(row["pixels"] for row in classes) == 30 * 40


def test_without_a_point_head(run, tmp_path, capsys):
    file = write_checkpoint(tmp_path / "fpn.pth", point_head=None)
    status, record = run("--limit", "1", file=file)
    assert status == 0 and list(record["results"]) == ["coarse"]
    assert run("--both", file=file)[0] == 1
    assert "fpn.pth has no point head" in capsys.readouterr().err


def test_other_class_names_are_noted(run, tmp_path, capsys):
    file = write_checkpoint(tmp_path / "named.pth", CLASSES=tuple("abcdefgh"))
    assert run("--limit", "1", file=file)[0] == 0
    assert "names its classes otherwise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.depht=50"], "model.depht"),
        (["data.dataset=ade20k"], "data.root"),
        (["--split", "nowhere"], "nowhere"),
        (["--only", "frankfurt_*"], "'frankfurt_*' matches none of 5 images"),
        (["--device", "toaster"], "--device 'toaster'"),
    ],
)
def test_errors_are_one_line(run, options, message, capsys):
    status, record = run(*options)
    err = capsys.readouterr().err
    assert status == 1 and record is None
    assert message in err and err.startswith("evaluate.py: ") and err.count("\n") == 1


def test_files_that_do_not_fit(run, folder_data, tmp_path, checkpoint, capsys):
    assert run(*folder_data)[0] == 1
    assert "predicts 8 classes, the data set folder has 2" in capsys.readouterr().err
    assert run(file=tmp_path / "absent.pth")[0] == 1
    assert "absent.pth" in capsys.readouterr().err
    assert run(config="absent.yaml")[0] == 1
    assert "absent.yaml" in capsys.readouterr().err
    assert evaluate.main(["shapes_r18", str(checkpoint), *DATA, "--json", str(tmp_path)]) == 1
    assert "must name a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--limit", "0"], ["--limit", "x"], ["--coarse", "--both"], ["--picture-count", "-1"]],
)
def test_arguments_that_make_no_sense(run, options, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err


def test_an_interrupt_leaves_nothing_half_written(run, tmp_path, monkeypatch, capsys):
    predict, calls = inference._predict, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(inference, "_predict", interrupted)
    status, record = run("--save", str(tmp_path / "maps"))
    assert status == 130 and record is None
    assert "interrupted" in capsys.readouterr().err
    written = sorted(p.name for p in (tmp_path / "maps").rglob("*") if p.is_file())
    assert written == sorted([f"shapes_val_0000{i}.png" for i in (0, 1)] * 2)


def test_from_the_command_line(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    out = capsys.readouterr().out
    assert "--ms-flip" in out and "python evaluate.py cityscapes_r50" in out
    script = [sys.executable, evaluate.__file__, "nothing", "x.pth"]
    wrong = subprocess.run(script, capture_output=True, text=True)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr


def test_tables_align_and_mark_absent_classes():
    metrics = SegmentationMetrics(3)
    metrics.update(np.zeros((4, 4), int), np.array([[0, 0, 1, 1]] * 4))
    text = report.tables(["a", "a long name", "absent"], {"refined": metrics.compute()}, {})
    first, second = (block.splitlines() for block in text.split("\n\n"))
    assert len({len(line) for line in first[1:]}) == 1 and len({len(line) for line in second}) == 1
    assert len(first[0]) == len(first[1])
    # of the border: 6 pixels found, of 8 true and 12 predicted ones
    assert first[3].split() == ["a", "50.00", "100.00", "42.86"]
    assert first[5].split() == ["absent", "-", "-", "-"]
    assert second[2].split() == ["mIoU", "25.00"]


def test_json_has_null_for_what_is_undefined():
    record = {"a": math.nan, "b": np.int64(3), "c": [np.float64(0.5)], 1: np.array([1.0, np.nan])}
    text = report.to_json(record)
    assert json.loads(text) == {"a": None, "b": 3, "c": [0.5], "1": [1.0, None]}
