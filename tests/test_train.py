"""train.py run for real, on tiny networks and drawn shapes."""

import csv
import functools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train
from pointrend_triton import build_model
from pointrend_triton.checkpoint import CheckpointError, save_checkpoint
from pointrend_triton.config import ConfigError, TrainConfig, load_config

ROOT = Path(__file__).parents[1]
TINY = {
    "model": {
        **{"depth": 18, "num_classes": 8},
        **{"base_channels": 8, "fpn_channels": 8, "head_channels": 8},
        "point_head": {"channels": 8, "num_points": 32, "subdivision_num_points": 64},
    },
    "data": {
        **{"dataset": "shapes", "shapes_size": [64, 64], "crop_size": [64, 64], "scale": [64, 64]},
        **{"test_scale": None, "shapes_train_images": 10, "shapes_eval_images": 3, "workers": 0},
    },
    "train": {
        **{"iterations": 8, "batch_size": 2, "warmup_iterations": 2, "log_every": 1},
        **{"eval_every": 4, "checkpoint_every": 3, "pictures": 1, "device": "cpu"},
    },
}
# what may differ between two runs of the same trajectory
CLOCKS = {"images_per_second", "data_wait", "peak_memory_gb"}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


def run(tiny, run_dir, *overrides):
    train.main([str(tiny), f"run_dir={run_dir}", *overrides])
    return rows(run_dir)


def weights(run_dir, name="last.pth"):
    return torch.load(run_dir / name, weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.001),
        (100, 0.005493874),
        (199, 0.009932933),
        (1000, 0.009888555),
        (40000, 0.005405279),
        (79999, 0.000100383),
    ],
)
def test_schedule_of_the_published_runs(iteration, expected):
    # computed from mmcv 1.x's LrUpdaterHook for 80 000 iterations, to nine decimals
    assert train.learning_rate(iteration, TrainConfig()) == pytest.approx(expected, abs=5e-10)


def test_a_run_writes_what_it_promises(tiny, tmp_path):
    run_dir = tmp_path / "run"
    written = run(tiny, run_dir)
    assert [int(row["iteration"]) for row in written if row["loss"]] == list(range(1, 9))
    assert [row["iteration"] for row in written if row["miou"]] == ["4", "8"]
    assert all(float(row["loss_point"]) > 0 for row in written if row["loss"])
    assert load_config(run_dir / "config.yaml").model.base_channels == 8
    saved = torch.load(run_dir / "last.pth", weights_only=True)
    assert saved["meta"]["iteration"] == 8
    assert saved["meta"]["best"] == max(float(row["miou"]) for row in written if row["miou"])
    model = build_model(run_dir / "config.yaml")
    model.load_state_dict(saved["state_dict"])
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert (run_dir / "best.pth").exists()
    leftovers = {p.name for p in run_dir.iterdir()} - {
        *("config.yaml", "environment.json", "metrics.csv", "last.pth", "best.pth", "last-1.pth"),
        *("report.md", "curves.png"),
        *(p.name for p in run_dir.glob("events.*")),
    }
    assert not leftovers


def test_tensorboard_compares_runs_by_their_settings(tiny, tmp_path):
    run(tiny, tmp_path / "run", "iterations=1", "eval_every=1")
    run(tiny, tmp_path / "run", "iterations=1", "resume=auto")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = events.Tags()["scalars"]
    assert {"miou_best", "miou", "boundary_iou", "loss"} <= set(tags)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["train.lr"].number_value == 0.01
    assert start.hparams["data.crop_size"].string_value == "[64, 64]"
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    shown = HParamsPluginData.FromString(content).experiment.metric_infos
    assert {metric.name.tag for metric in shown} <= set(tags)


def test_the_best_score_goes_on_where_a_run_is_resumed(tmp_path):
    train.Record(tmp_path, start=0).write(1, {"miou": 60.0, "boundary_iou": 1.0})
    record = train.Record(tmp_path, start=1)
    record.write(2, {"miou": 50.0, "boundary_iou": 1.0})
    record.board.close()
    best = EventAccumulator(str(tmp_path)).Reload().Scalars("miou_best")
    assert [(event.step, event.value) for event in best] == [(1, 60.0), (2, 60.0)]


def test_an_accumulated_batch_says_what_batchnorm_sees(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "whole", "iterations=1")
    assert "BatchNorm" not in capsys.readouterr().out
    run(tiny, tmp_path / "parts", "iterations=1", "accumulate=2")
    assert "BatchNorm sees 1 of the 2 crops at a time" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_and_another_does_not(tiny, tmp_path):
    first, again = run(tiny, tmp_path / "a"), run(tiny, tmp_path / "b", "workers=1")
    assert first == again
    assert run(tiny, tmp_path / "c", "seed=1") != first


def test_stopping_and_resuming_changes_nothing(tiny, tmp_path, monkeypatch, capsys):
    straight = run(tiny, tmp_path / "straight")
    original, signals = train.learning_rate, [signal.SIGTERM]

    def stop_during_iteration_5(iteration, config):
        if iteration == 4 and signals:
            os.kill(os.getpid(), signals.pop())
        return original(iteration, config)

    monkeypatch.setattr(train, "learning_rate", stop_during_iteration_5)
    status = train.main([str(tiny), f"run_dir={tmp_path / 'stopped'}"])
    assert status == 128 + signal.SIGTERM
    assert "SIGTERM after iteration 5" in capsys.readouterr().out
    assert rows(tmp_path / "stopped") == [row for row in straight if int(row["iteration"]) <= 5]
    monkeypatch.undo()
    assert run(tiny, tmp_path / "stopped", "resume=auto") == straight
    for name, tensor in weights(tmp_path / "straight").items():
        assert torch.equal(tensor, weights(tmp_path / "stopped")[name]), name


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint(tiny, tmp_path):
    straight, killed = run(tiny, tmp_path / "straight", "iterations=60"), tmp_path / "killed"
    command = [sys.executable, "train.py", str(tiny), f"run_dir={killed}", "iterations=60"]
    # as many threads as here: their number decides the order of sums
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    at_death = torch.load(killed / "last.pth", weights_only=True)["meta"]["iteration"]
    assert 3 <= at_death < 60 and (at_death % 3 == 0 or at_death % 4 == 0)
    assert run(tiny, killed, "iterations=60", "resume=auto") == straight


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path):
    record = train.Record(tmp_path, start=0)
    for iteration in (1, 2, 3):
        record.write(iteration, {"loss": 0.5})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2")  # what a kill leaves of "25,0.01,..."
    train.Record(tmp_path, start=2)
    assert [row["iteration"] for row in rows(tmp_path)] == ["1", "2"]
    train.Record(tmp_path, start=0)
    assert rows(tmp_path) == []


def test_the_optimiser_follows_the_schedule(tiny, tmp_path):
    # the warm-up starts at a learning rate of zero: the first step moves nothing
    run(tiny, tmp_path / "run", "iterations=1", "warmup_ratio=0.0")
    torch.manual_seed(0)
    before = dict(build_model(tiny).named_parameters())
    after = weights(tmp_path / "run")
    assert all(torch.equal(parameter, after[name]) for name, parameter in before.items())


def test_best_is_the_checkpoint_of_the_highest_miou(tiny, tmp_path, monkeypatch):
    scores = iter([50.0, 60.0, 55.0, 60.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"miou": next(scores), "boundary_iou": 0.0})
    run(tiny, tmp_path / "run", "eval_every=2")
    best = torch.load(tmp_path / "run" / "best.pth", weights_only=True)["meta"]
    assert (best["iteration"], best["best"]) == (4, 60.0)


def test_a_run_is_not_written_over(tiny, tmp_path):
    run(tiny, tmp_path / "run", "iterations=1")
    with pytest.raises(FileExistsError, match="resume=auto"):
        run(tiny, tmp_path / "run", "iterations=1")


def test_resuming_into_another_run_is_refused(tiny, tmp_path):
    for name in ("a", "b"):
        run(tiny, tmp_path / name, "iterations=1")
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(tiny, tmp_path / "b", "iterations=1", f"resume={tmp_path / 'a' / 'last.pth'}")


def test_a_run_goes_on_from_its_own_config(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "run", "iterations=1")
    assert train.main([str(tmp_path / "run" / "config.yaml"), "resume=auto"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_checkpoint_without_a_run_is_not_resumed(tiny, tmp_path):
    for meta in ({}, {"config": {}}, []):
        save_checkpoint(tmp_path / "other.pth", {"meta": meta, "optimizer": {}, "rng": {}})
        with pytest.raises(CheckpointError, match=r"other.pth is not a training checkpoint"):
            run(tiny, tmp_path / "run", f"resume={tmp_path / 'other.pth'}")


def test_resuming_names_what_changed(tiny, tmp_path):
    run(tiny, tmp_path / "run", "iterations=1")
    with pytest.raises(CheckpointError, match=r"train.lr: 0.01 then, 0.02 now"):
        run(tiny, tmp_path / "run", "iterations=1", "resume=auto", "lr=0.02")


def test_a_finished_run_has_nothing_to_resume(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "run", "iterations=1")
    before = (tmp_path / "run" / "last.pth").stat().st_mtime_ns
    run(tiny, tmp_path / "run", "iterations=1", "resume=auto")
    assert "nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.pth").stat().st_mtime_ns == before


DIVERGING = ("lr=1e20", "warmup_iterations=0", "checkpoint_every=100", "eval_every=100")


def test_gradients_that_are_not_finite_stop_the_run(tiny, tmp_path):
    # one log line over all iterations: the first bad one is found, not the last
    with pytest.raises(
        FloatingPointError,
        match=r"not finite at iteration [2-4] .*shapes:train:\d+, shapes:.*max_skipped 2",
    ):
        run(tiny, tmp_path / "run", *DIVERGING, "max_skipped=2", "log_every=100")
    assert not (tmp_path / "run" / "last.pth").exists()


def test_what_is_not_finite_is_never_saved(tiny, tmp_path):
    run(tiny, tmp_path / "run", "iterations=4")
    good = (tmp_path / "run" / "last.pth").read_bytes()
    broken = build_model(tiny)
    broken.backbone.stem[1].running_var[0] = math.nan
    config = load_config(tiny, [f"run_dir={tmp_path / 'run'}"])
    optimizer = train.make_optimizer(broken, config.train)
    with pytest.raises(FloatingPointError, match=r"backbone.stem.1.running_var is not finite"):
        train.save(tmp_path / "run", broken, optimizer, config, 5, 0.0)
    assert (tmp_path / "run" / "last.pth").read_bytes() == good


def test_a_step_whose_gradients_are_not_finite_is_skipped(tiny, tmp_path, monkeypatch, capsys):
    original, calls = train.backward, []

    def overflow_in_the_first_and_third(loss_of, *args):
        out = original(loss_of, *args)
        calls.append(None)
        if len(calls) in (1, 3):
            next(loss_of.parameters()).grad[0] = math.inf
        return out

    seen = []
    step = train.guarded_step

    def watched(optimizer, model):
        before = [p.detach().clone() for p in model.parameters()]
        flag = step(optimizer, model)
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        seen.append((bool(flag), moved))
        return flag

    monkeypatch.setattr(train, "backward", overflow_in_the_first_and_third)
    monkeypatch.setattr(train, "guarded_step", watched)
    written = run(tiny, tmp_path / "run", "iterations=4")
    assert seen == [(True, False), (False, True), (True, False), (False, True)]
    assert [row["skipped"] for row in written if row["skipped"]] == ["1", "1", "2", "2"]
    assert "at iteration 3 (the batch's files: shapes:train:" in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_older_checkpoints_are_kept(tiny, tmp_path):
    run(tiny, tmp_path / "run", "keep_checkpoints=3", "eval_every=8", "checkpoint_every=2")
    at = {
        path.name: torch.load(path, weights_only=True)["meta"]["iteration"]
        for path in (tmp_path / "run").glob("*.pth")
    }
    assert at == {"last.pth": 8, "last-1.pth": 6, "last-2.pth": 4, "best.pth": 8}


def test_accumulated_parts_are_the_whole_batch(tiny, tmp_path, monkeypatch):
    """With frozen statistics: the mean of the parts' gradients is that of the batch."""
    frozen = functools.partialmethod(torch.nn.Module.train, False)
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: self.eval())
    monkeypatch.setattr(torch.nn.BatchNorm2d, "eval", frozen)
    overrides = ("iterations=1", "warmup_iterations=0", "batch_size=4", "model.point_head=null")
    run(tiny, tmp_path / "whole", *overrides)
    run(tiny, tmp_path / "parts", *overrides, "accumulate=2")
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, msg=name)


def test_batches_divide(tiny, tmp_path):
    with pytest.raises(ConfigError, match="train.batch_size 2 must be divisible by .* 3"):
        run(tiny, tmp_path / "run", "accumulate=3")


@pytest.fixture
def two_classes(tmp_path):
    """A folder data set of noise with a bright square, 70x90, in splits train and val."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "two" / kind / split).mkdir(parents=True)
        for i in range(3):
            image = rng.integers(0, 100, (70, 90, 3), dtype=np.uint8)
            image[20:50, 30:60] += 120
            label = np.zeros((70, 90), np.uint8)
            label[20:50, 30:60] = 1
            assert cv2.imwrite(str(tmp_path / "two" / "images" / split / f"{i}.png"), image)
            assert cv2.imwrite(str(tmp_path / "two" / "labels" / split / f"{i}.png"), label)
    (tmp_path / "two" / "classes.csv").write_text("index,name\n0,ground\n1,square\n")
    return tmp_path / "two"


@pytest.mark.parametrize("head", ["model.point_head.channels=8", "model.point_head=null"])
def test_one_logit_with_and_without_point_head(tiny, tmp_path, two_classes, head):
    written = run(
        *(tiny, tmp_path / "run", "iterations=2", "eval_every=2", "eval_images=1", head),
        *("data.dataset=folder", f"data.root={two_classes}", "model.num_classes=1"),
    )
    assert float(written[0]["loss_coarse"]) > 0
    assert (written[0]["loss_point"] == "") == (head == "model.point_head=null")
    assert float(written[-1]["miou"]) > 0


def test_a_stop_during_an_evaluation_loses_nothing(tiny, tmp_path, monkeypatch):
    original = train.evaluate_dataset

    def stop_first(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(train, "evaluate_dataset", stop_first)
    status = train.main([str(tiny), f"run_dir={tmp_path / 'run'}", "checkpoint_every=100"])
    assert status == 128 + signal.SIGINT
    saved = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert saved["meta"]["iteration"] == 4


@pytest.mark.parametrize("signalled", [True, False])
def test_workers_that_died(tiny, tmp_path, monkeypatch, signalled):
    original = train.train_loader

    def dying(*args, **options):
        for number, batch in enumerate(original(*args, **options)):
            if number == 2:
                if signalled:
                    os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 1) is killed")
            yield batch

    monkeypatch.setattr(train, "train_loader", dying)
    command = [str(tiny), f"run_dir={tmp_path / 'run'}"]
    if not signalled:
        with pytest.raises(RuntimeError, match="worker"):
            train.main(command)
        return
    assert train.main(command) == 128 + signal.SIGTERM
    saved = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert saved["meta"]["iteration"] == 3, "the batch that was due is made without workers"


@pytest.mark.slow
def test_a_signal_to_the_whole_process_group_checkpoints(tiny, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", str(tiny), f"run_dir={run_dir}", "iterations=100000"]
    process = subprocess.Popen(
        [*command, "workers=2", "eval_every=100000"],
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (run_dir / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    at = torch.load(run_dir / "last.pth", weights_only=True)["meta"]["iteration"]
    assert f"SIGTERM after iteration {at}" in output


def test_a_compiled_model_trains(tiny, tmp_path, monkeypatch):
    # without code generation, which takes a minute; what could break the graph breaks here too
    compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    plain = run(tiny, tmp_path / "plain", "iterations=1")[0]
    torch._dynamo.reset()
    ours = run(tiny, tmp_path / "compiled", "iterations=1", "compile=true")[0]
    for name in ("loss_coarse", "loss_point", "acc_coarse"):
        assert float(ours[name]) == pytest.approx(float(plain[name]), rel=1e-5), name


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("train.lrr=1", ConfigError, "did you mean 'train.lr'"),
        ("model.num_classes=5", ValueError, "data set has 8 classes"),
        ("model.pretrained=nowhere/resnet18.pth", FileNotFoundError, "nowhere"),
        ("device=cuda:99", ValueError, "cuda:99"),
        ("amp=true compile=true", ValueError, "train.amp with train.compile needs a GPU"),
    ],
)
def test_errors_name_what_is_wrong(tiny, tmp_path, override, error, message):
    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("a CUDA GPU is present: this is about machines without one")
    with pytest.raises(error, match=message):
        run(tiny, tmp_path / "run", *override.split())
    assert not (tmp_path / "run").exists()


def test_the_published_configs_ask_for_a_backbone(tmp_path, monkeypatch):
    from pointrend_triton.data import build_dataset

    shapes = build_dataset(load_config(TINY).data, "train")
    monkeypatch.chdir(tmp_path)
    for depth, prefix in ((50, "2cccc1ad"), (101, "e67eebb6")):
        config = load_config(f"cityscapes_r{depth}", ["model.num_classes=8"])
        with pytest.raises(FileNotFoundError, match=f"https://.*resnet{depth}_v1c-{prefix}.pth"):
            train.make_model(config, shapes, resuming=False)


def test_a_backbone_file_is_loaded(tiny, tmp_path):
    donor = build_model({"model": {**TINY["model"], "num_classes": 3}})
    torch.save(donor.backbone.state_dict(), tmp_path / "backbone.pth")
    model = train.make_model(
        load_config(tiny, [f"pretrained={tmp_path / 'backbone.pth'}"]),
        train.build_dataset(load_config(tiny).data, "train"),
        resuming=False,
    )
    for name, tensor in donor.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor), name


def test_train_py_is_to_be_read_in_one_sitting():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 400


def test_help_names_the_commands():
    result = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "resume=auto" in result.stdout and "shapes_r18" in result.stdout
