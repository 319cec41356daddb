"""The tuning command, without a GPU: CUDA and the clock are played by `fake_gpu`."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu, run

from pointrend_triton import tune
from pointrend_triton.kernels import launch, store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    gpu = FakeGpu(monkeypatch, tmp_path)
    gpu.ran = []
    add, other = gpu.kernel("toy.add"), gpu.kernel("other.add")

    def small(device, dtype):
        gpu.ran.append(("small", device.type, dtype))
        run(add, 100)

    def large(device, dtype):
        gpu.ran.append(("large", device.type, dtype))
        run(add, 100_000)
        run(other)

    monkeypatch.setattr(tune, "WORKLOADS", {"small": small, "large": large})
    return gpu


def on_gpu(gpu):
    return [(name, dtype) for name, device, dtype in gpu.ran if device == "cuda"]


def test_everything_is_tuned_and_stored(gpu, capsys):
    assert tune.main([]) == 0
    types = (torch.bfloat16, torch.float16, torch.float32)
    assert on_gpu(gpu) == [(name, dtype) for name in ("small", "large") for dtype in types]
    assert gpu.benched == 9  # three keys, each once
    assert {kernel: len(entries) for kernel, entries in store.table(0).items()} == {
        "toy.add": 2,
        "other.add": 1,
    }
    out = capsys.readouterr().out
    assert "toy.add\n  float32 float32 SCALE=2 size=256\n" in out
    assert "1.0000 ms   3.00x  BLOCK=128, num_ctas=1" in out
    assert f"stored in {store.path_for(0)}" in out
    assert "shipped" not in out


def test_it_tunes_again_what_is_stored(gpu):
    tune.main([])
    gpu.times = {64: 0.5, 128: 1.0, 256: 2.0}
    tune.main([])
    assert gpu.benched == 18
    gpu.forget()
    run(launch.KERNELS["toy.add"], 100)
    assert gpu.function.blocks[-1] == 64


def test_only_some(gpu):
    assert tune.main(["--only", "other", "--dtype", "fp16"]) == 0
    assert on_gpu(gpu) == [("large", torch.float16)]  # the other workload does not use it
    assert gpu.benched == 3
    assert set(store.table(0)) == {"other.add"}


def test_show(gpu, capsys):
    assert tune.main(["--show"]) == 0
    assert capsys.readouterr().out == "nothing is stored\n"
    tune.main(["--dtype", "bf16"])
    tuned = capsys.readouterr().out
    benched = gpu.benched
    gpu.forget()
    assert tune.main(["--show"]) == 0
    shown = capsys.readouterr().out
    assert shown in tuned
    assert "BLOCK=128" in shown
    assert tune.main(["--show", "--only", "other"]) == 0
    assert "toy" not in capsys.readouterr().out
    assert gpu.benched == benched


def test_ship(gpu, capsys):
    assert tune.main(["--ship"]) == 0
    path = store.shipped_path(0)
    assert f"shipped in {path}" in capsys.readouterr().out
    store.path_for(0).unlink()
    gpu.forget()
    assert set(store.table(0)) == {"toy.add", "other.add"}


def test_a_table_of_such_a_gpu_is_adopted(gpu, tmp_path, capsys, monkeypatch):
    """Of another state of the kernels too: what they still have counts."""
    file = tmp_path / "tuned.json"
    monkeypatch.setattr(store, "source_hash", lambda: "before")
    tune.main([])
    store.path_for(0).rename(file)
    before = store.table(0)
    monkeypatch.setattr(store, "source_hash", lambda: "after")
    gpu.forget()
    benched = gpu.benched
    assert tune.main(["--adopt", str(file)]) == 0
    assert f"stored in {store.path_for(0)}" in capsys.readouterr().out
    assert store.table(0) == before and set(before) == {"toy.add", "other.add"}
    run(launch.KERNELS["toy.add"], 100)
    assert gpu.benched == benched and gpu.function.blocks[-1] == 128


def test_a_table_of_another_gpu_is_refused(gpu, tmp_path, capsys):
    file = tmp_path / "tuned.json"
    tune.main([])
    store.path_for(0).rename(file)
    gpu.name = "Fake GPU 4000"
    assert "was tuned on Fake GPU 3000, and this GPU is Fake GPU 4000" in refused(file, capsys)
    for content in (None, "{}", '{"gpu": "Fake GPU 4000", "kernels": {}}'):
        file.unlink()
        if content is not None:
            file.write_text(content)
        assert f"{file} holds no table of tuned kernels" in refused(file, capsys)
        file.touch()
    assert not store.path_for(0).exists()


def refused(file, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(["--adopt", str(file)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_interrupted(gpu, monkeypatch, capsys):
    def interrupted(device, dtype):
        run(launch.KERNELS["other.add"])
        if device.type == "cuda":
            raise KeyboardInterrupt

    monkeypatch.setitem(tune.WORKLOADS, "large", interrupted)
    assert tune.main(["--ship"]) == 130
    captured = capsys.readouterr()
    assert "toy.add" in captured.out
    assert "other.add" in captured.out
    assert "shipped" not in captured.out
    assert "what was found so far is stored" in captured.err
    gpu.forget()
    assert set(store.table(0)) == {"toy.add", "other.add"}


def test_a_workload_that_fails_does_not_stop_the_others(gpu, monkeypatch, capsys):
    def failing(device, dtype):
        run(launch.KERNELS["other.add"])
        if device.type == "cuda":
            raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr(tune, "WORKLOADS", {"failing": failing, **tune.WORKLOADS})
    assert tune.main(["--dtype", "bf16"]) == 1
    assert "failing, bf16: too little memory" in capsys.readouterr().err
    assert len(store.table(0)) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "nose"], "no kernel is called nose; there are other.add, toy.add"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_wrong_arguments(gpu, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert on_gpu(gpu) == []


def test_the_interpreter_is_not_timed(gpu, monkeypatch, capsys):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(SystemExit) as stop:
        tune.main([])
    assert stop.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--show"], ["--ship"]])
def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys, arguments):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tuning times kernels on a CUDA GPU, and this process sees none" in captured.err
    assert gpu.ran == []


@pytest.mark.slow
def test_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "pointrend_triton.tune"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "this process sees none" in ran.stderr


def test_every_kernel_has_a_workload():
    for path in (ROOT / "pointrend_triton" / "kernels").glob("*.py"):
        importlib.import_module(f"pointrend_triton.kernels.{path.stem}")
    ours = {
        name
        for name, kernel in launch.KERNELS.items()
        if kernel.function.fn.__module__.startswith("pointrend_triton.")
    }
    assert ours
    assert set(tune.users_of_kernels()) == ours
