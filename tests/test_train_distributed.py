"""train.py and evaluate.py in two processes over gloo, as torchrun starts them."""

import contextlib
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import evaluate
import train
from benchmarks import survival
from pointrend_triton.checkpoint import read_checkpoint
from pointrend_triton.config import load_config
from pointrend_triton.data import train_loader
from pointrend_triton.distributed import World

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def torchrun():
    with torchruns() as start:
        yield start


@contextlib.contextmanager
def torchruns():
    """torchrun(*arguments): two processes of a script, as a process group of their own."""
    started = []

    def start(*arguments, per_node=2, where=()):
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={per_node}"]
        where = where or ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        process = subprocess.Popen(
            [*launcher, *where, *map(str, arguments)],
            **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        started.append(process)
        return process

    try:
        yield start
    finally:
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
    assert seen == [ALONE]


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


# ---------------------------------------------------------------- nodes, failures, kills, compiling


@pytest.fixture(scope="module")
def with_points(tmp_path_factory):
    """A configuration whose ranks draw points of their own."""
    path = tmp_path_factory.mktemp("with_points") / "tiny.yaml"
    head = {"channels": 8, "num_points": 32, "subdivision_num_points": 64}
    short = {"iterations": 8, "eval_every": 8}
    config = TINY | {
        "model": TINY["model"] | {"point_head": head},
        "train": TINY["train"] | short,
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def straight(with_points):
    """A run of two processes that nothing happens to."""
    run_dir = with_points.parent / "straight"
    with torchruns() as start:
        process = start("train.py", with_points, f"run_dir={run_dir}")
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return run_dir


@pytest.mark.slow
def test_two_nodes_are_two_processes(with_points, straight, tmp_path, torchrun):
    run_dir = tmp_path / "run"
    meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--nnodes=2"]
    nodes = [
        torchrun("train.py", with_points, f"run_dir={run_dir}", per_node=1, where=meet)
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("on 2 x cpu" in output for output in outputs) == 1
    assert survival.compare(straight, run_dir) == []


KILLED = """
import os, signal, sys, train

original = train.learning_rate

def killed(iteration, settings):
    if iteration == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(iteration, settings)

train.learning_rate = killed
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_nothing_is_lost(with_points, straight, tmp_path, torchrun):
    (tmp_path / "killed.py").write_text(KILLED)
    run_dir = tmp_path / "run"
    process = torchrun(tmp_path / "killed.py", with_points, f"run_dir={run_dir}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in output, output
    assert read_checkpoint(run_dir / "last.pth")["meta"]["iteration"] == 4
    process = torchrun("train.py", with_points, f"run_dir={run_dir}", "resume=auto")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert survival.compare(straight, run_dir) == []


@pytest.mark.slow
def test_a_damaged_picture_that_one_rank_reads_ends_all(with_points, tmp_path, torchrun):
    for kind in ("images", "labels"):
        for split, count in (("train", 12), ("val", 1)):
            (tmp_path / kind / split).mkdir(parents=True)
            for i in range(count):
                picture = np.full((64, 64, 3) if kind == "images" else (64, 64), i, np.uint8)
                assert cv2.imwrite(str(tmp_path / kind / split / f"{i}.png"), picture % 2)
    (tmp_path / "classes.csv").write_text("index,name\n" + "".join(f"{i},c{i}\n" for i in range(8)))
    run_dir = tmp_path / "run"
    changes = ["data.dataset=folder", f"data.root={tmp_path}", "checkpoint_every=1"]
    data = load_config(with_points, changes).data
    order = train_loader(train.build_dataset(data, "train"), data, 4, 0, 0, 3, ALONE.device)
    *_, (_, _, files) = order
    damaged = Path(files[3])  # of the third batch, in the second rank's part
    damaged.write_bytes(damaged.read_bytes()[:-30])
    process = torchrun("train.py", with_points, f"run_dir={run_dir}", *changes)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    first = next(line for line in output.splitlines() if re.search(r"[Ee]rror|Traceback", line))
    assert str(damaged) in first, output
    assert read_checkpoint(run_dir / "last.pth")["meta"]["iteration"] == 2


# without code generation, which takes a minute; what breaks the graph breaks here too
COMPILED = """
import functools, os, pathlib, sys, torch, train

torch.compile = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
train.main(sys.argv[1:])
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
pathlib.Path(__file__).with_name("graphs" + os.environ["RANK"]).write_text(str(graphs))
"""


@pytest.mark.slow
def test_a_compiled_step_of_two_ranks_is_one_graph(with_points, straight, tmp_path, torchrun):
    (tmp_path / "compiled.py").write_text(COMPILED)
    run_dir = tmp_path / "run"
    process = torchrun(
        *(tmp_path / "compiled.py", with_points, f"run_dir={run_dir}", "compile=true"),
        *("checkpoint_every=3", "eval_every=3", "iterations=8"),
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert [(tmp_path / f"graphs{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    for ours, expected in zip(losses(run_dir), losses(straight), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)


def losses(run_dir):
    return [float(row["loss"]) for row in rows(run_dir) if row["loss"]]
