"""train.py and evaluate.py in two processes over gloo, as torchrun starts them."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import evaluate
import train
from pointrend_triton.distributed import World

ROOT = Path(__file__).parents[1]
TINY = {
    "model": {
        **{"depth": 18, "num_classes": 8, "base_channels": 8, "fpn_channels": 8},
        # points are drawn for each rank
        **{"head_channels": 8, "point_head": None},
    },
    "data": {
        **{"dataset": "shapes", "shapes_size": [64, 64], "crop_size": [64, 64], "scale": [64, 64]},
        **{"test_scale": None, "shapes_train_images": 10, "shapes_eval_images": 5, "workers": 1},
    },
    "train": {
        **{"iterations": 12, "batch_size": 4, "warmup_iterations": 2, "log_every": 1},
        **{"eval_every": 12, "checkpoint_every": 4, "pictures": 1, "device": "cpu"},
    },
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def torchrun():
    """torchrun(*arguments): two processes of a script, as a process group of their own."""
    started = []

    def start(*arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        where = ["--master_addr=127.0.0.1", f"--master_port={port}"]
        process = subprocess.Popen(
            [*launcher, *where, *map(str, arguments)],
            **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rows(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_train_stop_and_resume_as_one(tiny, tmp_path, torchrun):
    train.main([str(tiny), f"run_dir={tmp_path / 'one'}"])
    run_dir = tmp_path / "two"
    process = torchrun("train.py", tiny, f"run_dir={run_dir}")
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.csv").exists() or len(rows(run_dir)) < 1:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    # to all at once, and from torchrun to the ranks once more
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (run_dir / "last.pth").exists(), output
    stopped = torch.load(run_dir / "last.pth", weights_only=True)["meta"]["iteration"]
    assert 1 <= stopped < 12
    assert output.count(f"SIGTERM after iteration {stopped}; resume=auto goes on") == 1, output

    process = torchrun("train.py", tiny, f"run_dir={run_dir}", "resume=auto")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert (
        output.count(f"on 2 x cpu, 10 training and 5 evaluation images, iterations {stopped}") == 1
    )
    one, two = rows(tmp_path / "one"), rows(run_dir)
    assert [row["iteration"] for row in two] == [row["iteration"] for row in one]
    for ours, expected in zip(two, one, strict=True):
        for name in ("loss", "loss_coarse", "lr", "miou", "boundary_iou"):
            if expected[name]:
                assert float(ours[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
    weights = [
        torch.load(d / "last.pth", weights_only=True)["state_dict"]
        for d in (tmp_path / "one", run_dir)
    ]
    for name, expected in weights[0].items():
        difference = (weights[1][name] - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max().clamp(min=1e-2), name
    files = [
        {p.name for p in d.iterdir() if "tfevents" not in p.name}
        for d in (tmp_path / "one", run_dir)
    ]
    assert files[0] == files[1]
    events = list(run_dir.glob("*tfevents*"))
    assert len(events) == 2, "one from each start, of rank 0"


@pytest.fixture
def checkpoint(tiny, tmp_path):
    torch.manual_seed(0)
    model = train.build_model(tiny)
    torch.nn.init.normal_(model.coarse_head.conv_seg.weight, std=2)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_an_evaluation_is_shared_out(tiny, checkpoint, monkeypatch):
    seen = []
    original = evaluate.evaluate_dataset

    def watched(*arguments, world, **options):
        seen.append(world)
        return original(*arguments, world=world, **options)

    monkeypatch.setattr(evaluate, "evaluate_dataset", watched)
    assert evaluate.main([str(tiny), str(checkpoint), "--device", "cpu"]) == 0
    assert seen == [World(0, 1, torch.device("cpu"))]


@pytest.mark.slow
def test_an_evaluation_by_two_processes_counts_as_one(tiny, checkpoint, tmp_path, torchrun):
    arguments = [str(tiny), str(checkpoint), "--device", "cpu", "--json"]
    saved = ["--save", str(tmp_path / "saved")]
    process = torchrun("evaluate.py", *arguments, tmp_path / "two.json", *saved)
    assert evaluate.main([*arguments, str(tmp_path / "one.json")]) == 0
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert one["results"] == two["results"] and one["results"]["coarse"]["images"] == 5
    assert output.count("5 images of shapes val, single scale") == 1
    assert len(list((tmp_path / "saved" / "color").iterdir())) == 5
