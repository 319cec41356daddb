"""Order, errors and streams of batches that are on their way; the streams are played here."""

import contextlib
import itertools

import pytest
import torch

from pointrend_triton.config import DataConfig
from pointrend_triton.data import build_dataset, train_loader
from pointrend_triton.data.loader import to_device
from pointrend_triton.data.prefetch import Prefetch, one_ahead
from pointrend_triton.data.transforms import normalise, pad

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_one_ahead_keeps_the_order_and_is_one_ahead():
    made = []

    def source():
        for number in range(5):
            made.append(number)
            yield number

    for number in one_ahead(source()):
        assert made[-1] == min(number + 1, 4)
    assert list(one_ahead(range(5))) == [0, 1, 2, 3, 4]
    assert list(one_ahead([7])) == [7]
    assert list(one_ahead([])) == []


def test_an_error_waits_its_turn():
    def source():
        yield from range(3)
        raise RuntimeError("worker died")

    seen = []
    with pytest.raises(RuntimeError, match="worker died"):
        for number in one_ahead(source()):
            seen.append(number)
    assert seen == [0, 1, 2]


def test_stopping_early_closes_the_source():
    closed = []

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    ahead = one_ahead(source())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    ahead.close()
    del ahead
    assert closed == [True]


def test_on_the_cpu_nothing_is_done_ahead():
    moved = []
    batches = iter(Prefetch(range(5), lambda n: moved.append(n) or (n,), CPU))
    assert next(batches) == (0,)
    assert moved == [0]


class Events:
    """Stands in for CUDA's streams and events, and notes the order of what happens."""

    def __init__(self, monkeypatch):
        self.log = []
        self.count = itertools.count()
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", self.inside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, s: self.log.append(f"keep {int(tensor)}")
        )

    @contextlib.contextmanager
    def inside(self, stream):
        self.log.append("side")
        yield
        self.log.append("main")

    def record_event(self):
        self.log.append(f"event {(number := next(self.count))}")
        return number

    def wait_event(self, number):
        self.log.append(f"wait {number}")


def test_a_batch_is_staged_beside_and_handed_over_in_order(monkeypatch):
    events = Events(monkeypatch)
    log = events.log

    def move(number):
        log.append(f"move {number}")
        return torch.tensor(number), "file"

    for tensor, file in Prefetch(range(3), move, CUDA):
        log.append(f"train {int(tensor)}")
        assert file == "file"
    staged = [["side", f"move {n}", "main", f"event {n}"] for n in range(3)]
    used = [[f"wait {n}", f"keep {n}", f"train {n}"] for n in range(3)]
    assert log == staged[0] + staged[1] + used[0] + staged[2] + used[1] + used[2]


def test_images_are_normalised_on_the_device_as_on_the_host():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 40, 60, 3), dtype=torch.uint8, generator=rng)
    pixels[0].view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    pixels[1, 30:], pixels[1, :, 50:] = 0, 0
    labels = torch.randint(0, 256, (2, 40, 60), dtype=torch.uint8, generator=rng)
    images, classes, files = to_device((pixels, labels, [(40, 60), (30, 50)], ["a", "b"]), CPU)
    assert torch.equal(images[0], torch.from_numpy(normalise(pixels[0].numpy())))
    second = pad(normalise(pixels[1, :30, :50].numpy()), (40, 60), 0)
    assert torch.equal(images[1], torch.from_numpy(second))
    assert images.is_contiguous()
    assert torch.equal(classes, labels.long())
    assert files == ["a", "b"]


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu():
    data = DataConfig(crop_size=(96, 80), scale=(128, 128), workers=2)
    dataset = build_dataset(data, "train")
    expected = list(train_loader(dataset, data, 4, 0, 0, 12))
    loader = train_loader(dataset, data, 4, 0, 0, 12, device=torch.device("cuda"))
    for ours, theirs in zip(loader, expected, strict=True):
        # work for the main stream, which memory that came back too early would show
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(10):
            busy = busy @ busy.sigmoid()
        assert torch.equal(ours[0].cpu(), theirs[0])
        assert torch.equal(ours[1].cpu(), theirs[1])
        assert ours[2] == theirs[2]
