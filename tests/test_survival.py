"""Nothing of a training run is lost: killed, without space, with damaged files, it is resumed."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train
from benchmarks import survival
from pointrend_triton.checkpoint import CheckpointError, read_checkpoint
from pointrend_triton.config import load_config
from pointrend_triton.run import StopRequest, is_scored
from pointrend_triton.snapshot import drafts, tidy

ROOT = Path(__file__).parents[1]
QUICK = ("iterations=8", "eval_every=4", "checkpoint_every=3", "workers=0", "eval_images=1")


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(survival.TINY))
    return path


@pytest.fixture(autouse=True)
def settings_end_with_the_test():
    yield
    torch.use_deterministic_algorithms(False)


def run(tiny, run_dir, *overrides):
    return train.main([str(tiny), f"run_dir={run_dir}", *QUICK, *overrides])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(survival.TINY))
    run(folder / "tiny.yaml", folder / "run")
    return folder / "run"


# ---------------------------------------------------------------- kills


@pytest.mark.slow
def test_five_kills_change_nothing(tmp_path):
    kills, _, differences = survival.survive(tmp_path, kills=5)
    assert differences == []
    assert [kill.aim for kill in kills] == [*survival.AIMS, *survival.AIMS[:2]]


def test_every_difference_is_seen(tmp_path, straight):
    other = tmp_path / "other"
    shutil.copytree(straight, other)
    assert survival.compare(straight, other) == []
    (other / "next.pth").touch()
    rows = (straight / "metrics.csv").read_text()
    (other / "metrics.csv").write_text(rows.replace("\n3,", "\n4,"))
    content = read_checkpoint(other / "best.pth")
    name = next(iter(content["state_dict"]))
    content["state_dict"][name].view(-1)[0] += 1e-6
    content["optimizer"]["param_groups"][0]["lr"] = 1.0
    torch.save(content, other / "best.pth")
    assert [line.split(" is ")[0] for line in survival.compare(straight, other)] == [
        "other has next.pth, or lacks it",
        "other/metrics.csv[2].iteration",
        f"other/best.pth.state_dict.{name} differs",
        "other/best.pth.optimizer.param_groups[0].lr",
    ]


def die_at(step, *arguments, **options):
    """Saves, and is gone at once before the step-th opening, renaming, linking or removing."""
    seen = []

    def count(event, _):
        if event in ("open", "os.rename", "os.link", "os.remove"):
            seen.append(event)
            if len(seen) == step:
                os._exit(9)

    sys.addaudithook(count)
    train.save(*arguments, **options)
    os._exit(0)


@pytest.mark.parametrize("is_best", [False, True])
def test_no_moment_of_a_write_is_fatal(tmp_path, tiny, is_best):
    config = load_config(tiny, [f"run_dir={tmp_path}", "keep_checkpoints=3"])
    model = train.build_model(config)
    optimizer = train.make_optimizer(model, config.train)
    fork = multiprocessing.get_context("fork")
    old, found = [], set()
    for iteration in (1, 2, 3):
        train.save(tmp_path, model, optimizer, config, iteration, 0.0)
    for step in range(1, 100):
        saving = (step, tmp_path, model, optimizer, config, 3 + step, 0.0)
        process = fork.Process(target=die_at, args=saving, kwargs={"is_best": is_best})
        process.start()
        process.join()
        iterations = {
            path.name: read_checkpoint(path)["meta"]["iteration"]
            for path in tmp_path.glob("[lb]*.pth")
        }
        assert {"last.pth", "last-1.pth", "last-2.pth"} <= iterations.keys()
        assert iterations["last.pth"] in (*old[-1:], 3, 3 + step)
        found.add(iterations["last.pth"] == 3 + step)
        old.append(iterations["last.pth"])
        tidy(tmp_path)
        assert not drafts(tmp_path) and not list(tmp_path.glob(".*"))
        if process.exitcode == 0:
            break
    assert found == {False, True} and step > 6, "several moments, most of them before the last"


@pytest.mark.parametrize("cut_short", [4, 8])
def test_an_evaluation_that_was_cut_short_is_made_again(
    tiny, tmp_path, monkeypatch, straight, cut_short
):
    original = train.evaluate_dataset

    def dies(model, dataset, *arguments, **options):
        if read_checkpoint(tmp_path / "run" / "last.pth")["meta"]["iteration"] == cut_short:
            raise InterruptedError
        return original(model, dataset, *arguments, **options)

    monkeypatch.setattr(train, "evaluate_dataset", dies)
    with pytest.raises(InterruptedError):
        run(tiny, tmp_path / "run")
    monkeypatch.undo()
    assert not is_scored(tmp_path / "run", cut_short)
    run(tiny, tmp_path / "run", "resume=auto")
    assert survival.compare(straight, tmp_path / "run") == []


@pytest.mark.parametrize("before", ["best.pth", "row"])
def test_an_evaluation_is_over_when_its_row_is_written(
    tiny, tmp_path, monkeypatch, straight, before
):
    save, write = train.save, train.Record.write

    def dying_save(*arguments, **options):
        if before == "best.pth" and options.get("is_best"):
            raise InterruptedError
        save(*arguments, **options)

    def dying_write(record, iteration, values):
        if before == "row" and "miou" in values:
            raise InterruptedError
        write(record, iteration, values)

    monkeypatch.setattr(train, "save", dying_save)
    monkeypatch.setattr(train.Record, "write", dying_write)
    with pytest.raises(InterruptedError):
        run(tiny, tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run" / "best.pth").exists() == (before == "row")
    run(tiny, tmp_path / "run", "resume=auto")
    assert survival.compare(straight, tmp_path / "run") == []


def test_a_report_that_was_cut_short_is_made_again(tiny, tmp_path, straight):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "report.md").unlink()
    (tmp_path / "run" / "curves.png").rename(tmp_path / "run" / ".curves.png.77")
    run(tiny, tmp_path / "run", "resume=auto")
    assert survival.compare(straight, tmp_path / "run") == []


def test_what_a_killed_run_left_half_written_is_removed(tiny, tmp_path):
    run_dir = tmp_path / "run"
    run(tiny, run_dir, "iterations=1")
    left = ["next.pth", ".next.pth.7.tmp", ".last-12.pth.7.tmp", ".best.pth.7.tmp", "next.yaml"]
    for name in (*left, ".report.md.7", "notes.tmp", ".mine"):
        (run_dir / name).touch()
    run(tiny, run_dir, "iterations=1", "resume=auto")
    names = {path.name for path in run_dir.iterdir()}
    assert names.isdisjoint([*left, ".report.md.7"]) and {"notes.tmp", ".mine"} <= names


# ---------------------------------------------------------------- disks


def test_a_full_disk_leaves_the_last_checkpoint_good(tiny, tmp_path, straight):
    run_dir = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = train.save

    def on_a_full_disk(run_dir, model, optimizer, config, iteration, *arguments, **options):
        limit = 500_000 if iteration == 6 else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            original(run_dir, model, optimizer, config, iteration, *arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", on_a_full_disk)
        message = r"next.pth cannot be written: .*File too large; .*last.pth is as it was"
        with pytest.raises(CheckpointError, match=message):
            run(tiny, run_dir)
    assert read_checkpoint(run_dir / "last.pth")["meta"]["iteration"] == 4
    assert not drafts(run_dir)
    run(tiny, run_dir, "resume=auto")
    assert survival.compare(straight, run_dir) == []


def test_a_full_disk_is_named_by_the_log_too(tmp_path):
    record = train.Record(tmp_path, start=0)
    record.write(1, {"loss": 0.5})
    record.board.close()  # it writes whenever it likes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.csv").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
        with pytest.raises(OSError, match="metrics.csv cannot be written: File too large"):
            record.write(2, {"loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.csv").stat().st_size > size, "a row was cut short"
    train.Record(tmp_path, start=2).write(2, {"loss": 0.25})
    assert [row["loss"] for row in survival.whole_rows(tmp_path / "metrics.csv")] == ["0.5", "0.25"]


def test_a_damaged_checkpoint_names_the_one_before(tiny, tmp_path, straight):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    last, before = run_dir / "last.pth", run_dir / "last-1.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"last.pth is truncated .*resume={before} goes on"):
        run(tiny, run_dir, "resume=auto")
    run(tiny, run_dir, f"resume={before}")
    assert survival.compare(straight, run_dir) == []


def test_skipped_steps_are_remembered(tiny, tmp_path, monkeypatch):
    original = train.guarded_step

    def overflow_in_the_first(optimizer, model):
        monkeypatch.setattr(train, "guarded_step", original)
        next(model.parameters()).grad[0] = float("inf")
        return original(optimizer, model)

    monkeypatch.setattr(train, "guarded_step", overflow_in_the_first)
    monkeypatch.setattr(train, "evaluate_dataset", lambda *_, **__: sys.exit(3))
    with pytest.raises(SystemExit):
        run(tiny, tmp_path / "run")
    monkeypatch.undo()
    run(tiny, tmp_path / "run", "resume=auto")
    rows = survival.whole_rows(tmp_path / "run" / "metrics.csv")
    assert [row["skipped"] for row in rows if row["loss"]] == ["1"] * 8


def test_best_of_a_run_that_goes_on_in_another_folder(tiny, tmp_path, straight):
    run(tiny, tmp_path / "new", f"resume={straight / 'last-1.pth'}")
    best = read_checkpoint(tmp_path / "new" / "best.pth")["meta"]
    assert best["best"] == float(survival.whole_rows(straight / "metrics.csv")[-1]["miou"]), (
        "of the one evaluation there"
    )


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("torchrun", [True, False])
def test_torchrun_passes_a_signal_on_that_came_before(monkeypatch, torchrun):
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    if torchrun:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.name == "SIGINT"
    stop.release()
    assert handlers == [
        signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    ]


@pytest.mark.parametrize("last", [4, 8])
def test_a_stop_where_an_evaluation_is_due(tiny, tmp_path, monkeypatch, straight, last):
    original, signals = train.learning_rate, [signal.SIGTERM]

    def stopped(iteration, settings):
        if iteration == last - 1 and signals:
            os.kill(os.getpid(), signals.pop())
        return original(iteration, settings)

    monkeypatch.setattr(train, "learning_rate", stopped)
    assert run(tiny, tmp_path / "run") == 128 + signal.SIGTERM
    assert not is_scored(tmp_path / "run", last)
    assert run(tiny, tmp_path / "run", "resume=auto") == 0
    assert survival.compare(straight, tmp_path / "run") == []


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError, EOFError])
def test_workers_that_die_of_the_signal_in_the_midst_of_a_batch(error):
    def dying():
        yield 0
        raise error("a worker is gone")

    stop = StopRequest()
    feed = stop.until(dying(), lambda count: iter([count]))
    assert next(feed) == 0
    stop(signal.SIGTERM, None)
    assert next(feed) == 1, "made without workers"
    stop.release()
    unasked = StopRequest()
    unasked.release()
    with pytest.raises(error):
        list(unasked.until(dying(), lambda count: iter([count])))


# ---------------------------------------------------------------- determinism


def test_deterministic_runs_are_equal(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    joined, seen = train.joined, []

    def watched(device):
        enabled = torch.are_deterministic_algorithms_enabled()
        seen.append(
            (enabled, torch.backends.cudnn.benchmark, os.environ["CUBLAS_WORKSPACE_CONFIG"])
        )
        return joined(device)

    with monkeypatch.context() as patch:
        patch.setattr(train, "joined", watched)
        for name in ("a", "b"):
            run(tiny, tmp_path / name, "deterministic=true")
    assert seen == [(True, False, ":4096:8")] * 2, "before anything can start CUDA"
    assert survival.compare(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("faster", [[], ["amp=true", "channels_last=true"]])
def test_deterministic_runs_on_a_gpu_are_equal(tiny, tmp_path, faster):
    settings = ["deterministic=true", "device=cuda", "iterations=10", *faster]
    for name in ("a", "b"):  # in processes of their own: cuBLAS reads its setting when it starts
        command = [sys.executable, "train.py", str(tiny), f"run_dir={tmp_path / name}", *QUICK]
        subprocess.run([*command, *settings], cwd=ROOT, check=True)
    assert survival.compare(tmp_path / "a", tmp_path / "b") == []
