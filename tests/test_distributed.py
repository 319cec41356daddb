"""Several ranks against one process: on the CPU, over gloo."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from pointrend_triton import inference, ops
from pointrend_triton.config import ModelConfig, PointHeadConfig
from pointrend_triton.distributed import (
    SyncBatchNorm2d,
    World,
    agree,
    gather,
    joined,
    mean,
    sync_batchnorm,
)
from pointrend_triton.metrics import SegmentationMetrics
from pointrend_triton.models import PointRend
from pointrend_triton.models.losses import cross_entropy

# ranks start as copies of a process that has all this imported
multiprocessing.set_forkserver_preload([__name__])
ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def ranks(tmp_path):
    """ranks(function, size, *arguments): what function(world, *arguments) gives on every rank."""

    def run(function, size, *arguments):
        work = (size, free_port(), tmp_path, function, arguments)
        context = start_processes(in_rank, work, size, join=False, start_method="forkserver")
        deadline = time.monotonic() + 60
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < deadline, "the ranks wait for each other"
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(size)]

    return run


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_rank(rank, size, port, folder, function, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    where = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    with joined("cpu") as world:
        assert world == World(rank, size, torch.device("cpu"))
        torch.save(function(world, *arguments), folder / f"{rank}.pt")
    assert not dist.is_initialized()


def assert_close(ours, expected, tolerance):
    """Every tensor within `tolerance` of its largest element."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


# ---------------------------------------------------------------- a training step


def small(**fields):
    """fp64, so that what is left of a difference is not rounding."""
    torch.manual_seed(0)
    sizes = {"depth": 18, "base_channels": 8, "fpn_channels": 8, "head_channels": 8}
    head = PointHeadConfig(channels=8, num_points=16, subdivision_num_points=30)
    model = PointRend(ModelConfig(num_classes=5, point_head=head, **sizes, **fields)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "seg.weight" in name:
            nn.init.normal_(parameter)
    return model


def batch():
    """Images, labels of which only the first two are partly ignored, and the draws of points."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 37, 50, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 5, (4, 37, 50), generator=draw)
    labels[:2, :25] = 255
    draws = torch.rand(4, 48, 2, generator=draw), torch.rand(4, 4, 2, generator=draw)
    return images, labels, draws


def losses(model, step, where):
    """The losses `step` gives for a part of the batch, with that part's points."""
    images, labels, draws = batch()
    points = tuple(draw[where] for draw in draws)
    model.point_head.select = lambda coarse: ops.select_uncertain_points(coarse, 16, draws=points)
    return step(images[where], labels[where])


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def step_of_a_rank(world, average):
    model = small(loss_average=average)
    names = list(model.state_dict())
    sync_batchnorm(model, world)
    assert list(model.state_dict()) == names
    step = DistributedDataParallel(model, broadcast_buffers=False)
    out = losses(model, step, slice(2 * world.rank, 2 * world.rank + 2))
    out["loss"].backward()
    return mean(out["loss"]), gradients(model), dict(model.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize("average", ["all", "valid"])
def test_a_step_of_two_ranks_is_one_on_the_joined_batch(ranks, average):
    model = small(loss_average=average)
    loss = losses(model, model, slice(None))["loss"]
    loss.backward()
    for own_loss, own_gradients, buffers in ranks(step_of_a_rank, 2, average):
        torch.testing.assert_close(own_loss, loss.detach(), rtol=1e-6, atol=0)
        assert_close(own_gradients, gradients(model), 1e-5)
        assert_close(buffers, dict(model.named_buffers()), 1e-9)


@pytest.mark.parametrize("parts", [1, 2])
def test_accumulated_parts_are_the_joined_batch(parts):
    """Under loss_average "all", with BatchNorm's statistics fixed: they see one part at a time."""
    models = [small(), small()]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    joint, accumulated = models
    losses(joint, joint, slice(None))["loss"].backward()
    for part in range(parts):
        where = slice(part * 4 // parts, (part + 1) * 4 // parts)
        (losses(accumulated, accumulated, where)["loss"] / parts).backward()
    assert_close(gradients(accumulated), gradients(joint), 1e-6)


# ---------------------------------------------------------------- BatchNorm


def maps(rank):
    """Input and the gradient of its output; every rank has other sizes."""
    draw = torch.Generator().manual_seed(rank)
    shape = (rank + 1, 3, 4 + rank, 5)
    # far from zero, where a careless variance loses its digits
    input = 50 + torch.randn(shape, generator=draw).requires_grad_()
    input.retain_grad()
    return input, torch.randn(shape, generator=draw)


def norm():
    torch.manual_seed(0)
    module = nn.BatchNorm2d(3, eps=1e-3, momentum=0.19)
    nn.init.uniform_(module.weight)
    nn.init.uniform_(module.bias)
    return module


def norm_of_a_rank(world):
    module = norm()
    model = nn.Sequential(module)
    sync_batchnorm(model, world)
    assert type(model[0]) is SyncBatchNorm2d
    (input, grad), other = maps(world.rank), maps(world.rank + world.size)[0]
    output = model(input)
    output.backward(grad)
    model(other)
    fixed = model.eval()(input)
    found = [value.detach() for value in (output, input.grad, fixed)]
    return found, [p.grad for p in module.parameters()], module.state_dict()


def flat(tensors):
    """Maps [n,C,h,w] of many sizes -> one [1,C,1,all]."""
    return torch.cat([t.transpose(0, 1).flatten(1) for t in tensors], 1)[None, :, None]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_batchnorm_of_ranks_is_that_of_the_joined_maps(ranks, size):
    module = norm()
    results = ranks(norm_of_a_rank, size)
    inputs, grads = zip(*(maps(rank) for rank in range(size)), strict=True)
    joint = flat(inputs).detach().requires_grad_()
    output = module(joint)
    output.backward(flat(grads))
    module(flat([maps(rank)[0] for rank in range(size, 2 * size)]))
    fixed = module.eval()(joint)
    found, parameter_grads, states = zip(*results, strict=True)
    for ours, expected in zip(zip(*found, strict=True), (output, joint.grad, fixed), strict=True):
        torch.testing.assert_close(flat(ours), expected.detach(), rtol=1e-5, atol=1e-5)
    for own, parameter in zip(zip(*parameter_grads, strict=True), module.parameters(), strict=True):
        torch.testing.assert_close(sum(own), parameter.grad, rtol=1e-5, atol=1e-5)
    for state in states:
        assert state["num_batches_tracked"] == 2
        torch.testing.assert_close(state, module.state_dict(), rtol=1e-6, atol=0)


def test_a_world_of_one_keeps_its_batchnorm():
    model = nn.Sequential(nn.BatchNorm2d(3))
    sync_batchnorm(model, ALONE)
    assert type(model[0]) is nn.BatchNorm2d


# ---------------------------------------------------------------- losses


def scores():
    """Logits and labels of three ranks: all of the second's are ignored, most of the third's."""
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 5, (3, 6, 7), generator=draw)
    labels[1], labels[2, 1:] = 255, 255
    return torch.randn(3, 5, 6, 7, generator=draw), labels


def loss_of_a_rank(world, average):
    logits, labels = (t[world.rank, None] for t in scores())
    logits.requires_grad_()
    loss = cross_entropy(logits, labels, average)
    loss.backward()
    nothing = cross_entropy(logits, torch.full_like(labels, 255), average)
    return loss.detach(), logits.grad, nothing.detach()


@pytest.mark.slow
@pytest.mark.parametrize("average", ["all", "valid"])
def test_the_mean_over_ranks_is_the_loss_of_the_joined_batch(ranks, average):
    logits, labels = scores()
    logits.requires_grad_()
    expected = cross_entropy(logits, labels, average)
    expected.backward()
    loss, grad, nothing = zip(*ranks(loss_of_a_rank, 3, average), strict=True)
    torch.testing.assert_close(sum(loss) / 3, expected.detach())
    torch.testing.assert_close(torch.cat(grad) / 3, logits.grad)
    assert nothing == (0, 0, 0)


def compiled_loss_of_a_rank(world):
    logits, labels = (t[world.rank, None] for t in scores())
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    return compiled(logits, labels, "valid"), cross_entropy(logits, labels, "valid")


@pytest.mark.slow
def test_a_compiled_step_needs_no_graph_break_for_the_count(ranks):
    for compiled, eager in ranks(compiled_loss_of_a_rank, 3):
        assert compiled == eager


# ---------------------------------------------------------------- evaluation


class Pictures:
    """Random images of changing sizes, in memory."""

    def __init__(self, count):
        rng = np.random.default_rng(3)
        sizes = [(24 + 3 * i, 40 - i) for i in range(count)]
        self.classes = [str(c) for c in range(5)]
        self.images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
        self.labels = [rng.choice([0, 1, 4, 255], size).astype(np.uint8) for size in sizes]

    def __len__(self):
        return len(self.images)

    def load(self, index):
        return self.images[index], self.labels[index]


def counts(metrics):
    return {
        name: np.asarray(v) for name, v in vars(metrics).items() if name != "band_confusion"
    } | {f"band {width}": values for width, values in metrics.band_confusion.items()}


def evaluation_of_a_rank(world, count):
    bars, seen = [], []
    bar_of = inference.tqdm

    def tqdm(*arguments, **options):
        bars.append(options["disable"])
        return bar_of(*arguments, **options)

    inference.tqdm = tqdm
    metrics = inference.evaluate_dataset(
        small().float(),
        Pictures(count),
        None,
        workers=1,
        on_prediction=lambda index, _: seen.append(index),
        world=world,
    )
    return counts(metrics), seen, bars


@pytest.mark.slow
@pytest.mark.parametrize(("count", "shares"), [(5, [[0, 2, 4], [1, 3]]), (1, [[0], []])])
def test_an_evaluation_shared_out_counts_every_image_once(ranks, count, shares):
    expected = counts(inference.evaluate_dataset(small().float(), Pictures(count), None))
    assert expected["images"] == count
    results = ranks(evaluation_of_a_rank, 2, count)
    assert [seen for _, seen, _ in results] == shares
    assert [bars for *_, bars in results] == [[None], [True]]  # None: if this is a terminal
    for own, *_ in results:
        assert own.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(own[name], value, name)


def big_counts(world):
    metrics = SegmentationMetrics(2)
    metrics.confusion[0, 1] = 2**60 + world.rank
    metrics.all_reduce()
    return int(metrics.confusion[0, 1])


# ---------------------------------------------------------------- joining, agreeing, leaving


def exchanges(world):
    assert world.is_main == (world.rank == 0)
    asked = [agree(world.rank == 1), agree(False), agree(True)]
    return asked, gather(f"rank {world.rank}"), mean(torch.tensor([world.rank, 3.0]))


@pytest.mark.slow
def test_exchanges(ranks):
    for asked, gathered, average in ranks(exchanges, 2):
        assert asked == [True, False, True]
        assert gathered == ["rank 0", "rank 1"]
        assert average.tolist() == [0.5, 3]
    assert ranks(big_counts, 2) == [2**61 + 1, 2**61 + 1]


def test_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as world:
        assert world == ALONE and world.is_main
        assert not dist.is_initialized()
        assert agree(True) and not agree(False)
        assert gather("here") == ["here"]
        assert mean(torch.ones(2)).tolist() == [1, 1]
    with pytest.raises(ValueError, match="'nonsense' is no device here"), joined("nonsense"):
        pass


def test_what_joining_refuses(monkeypatch):
    def refused(device, message, **environment):
        started = {
            "RANK": 2,
            "WORLD_SIZE": 3,
            "LOCAL_RANK": 2,
            "MASTER_ADDR": "x",
            "MASTER_PORT": 1,
        }
        with monkeypatch.context() as patch:
            for name, value in (started | environment).items():
                if value is None:
                    patch.delenv(name, raising=False)
                else:
                    patch.setenv(name, str(value))
            with pytest.raises(ValueError, match=message), joined(device):
                pass
        assert not dist.is_initialized()

    refused("cpu", "has RANK, WORLD_SIZE, but not LOCAL_RANK: start with torchrun", LOCAL_RANK=None)
    refused("cpu", "but not MASTER_ADDR, MASTER_PORT", MASTER_ADDR=None, MASTER_PORT=None)
    refused("cpu", "RANK must be a whole number, not 'one'", RANK="one")
    refused("cuda:1", "device is 'cuda:1', but under torchrun every rank has a GPU of its own")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "auto"):
        refused(device, "local rank 2 has no GPU, as this machine has 2: --nproc_per_node")


FAILING = """
        if world.rank == 1:
            Path("raised").touch()
            raise ArithmeticError("the loss of rank one is lost")
        time.sleep(1)
        mean(torch.ones(1000))
"""
STOPPED = """
        if world.is_main:
            time.sleep(2)
            Path("written").touch()
    os._exit(143)  # at once
"""


def torchrun(tmp_path, body):
    (tmp_path / "script.py").write_text(
        "import os, time\n"
        "import torch\n"
        "from pathlib import Path\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "from pointrend_triton.distributed import joined, mean\n"
        "def main():\n"
        f"    with joined('cpu') as world:{body}"
        "record(main)()\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        + ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_its_error_first(tmp_path):
    run = torchrun(tmp_path, FAILING)
    assert time.time() - (tmp_path / "raised").stat().st_mtime < 20
    assert run.returncode != 0
    errors = re.findall(r"^\[rank(\d)\]: (\w+Error: .*)", run.stderr, re.MULTILINE)
    assert errors[0] == ("1", "ArithmeticError: the loss of rank one is lost")
    summary = run.stderr[run.stderr.index("Root Cause (first observed failure)") :]
    assert "(local_rank: 1)" in summary and "the loss of rank one is lost" in summary


@pytest.mark.slow
def test_no_rank_exits_while_another_still_writes(tmp_path):
    """torchrun ends all ranks as soon as one has exited with another status than 0."""
    run = torchrun(tmp_path, STOPPED)
    assert run.returncode != 0
    assert (tmp_path / "written").exists(), run.stderr
