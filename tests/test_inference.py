"""inference.py: the test protocols against plain twins, on a stand-in and on the real network."""

import itertools
import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pointrend_triton import build_model, inference
from pointrend_triton.data import TestTransform
from pointrend_triton.metrics import SegmentationMetrics

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On maps this small, threads wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stub(nn.Module):
    """Coarse logits of a strided convolution; "refined" ones add a finer, asymmetric one."""

    def __init__(self, num_classes):
        super().__init__()
        self.config = SimpleNamespace(num_classes=num_classes)
        self.wide = nn.Conv2d(3, num_classes, 5, stride=4, padding=2)
        self.narrow = nn.Conv2d(3, num_classes, 3, padding=1)
        self.seen = []

    def coarse(self, images):
        self.seen.append(tuple(images.shape[2:]))
        return self.wide(images)

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return resize(self.coarse(images), images.shape[2:]) + self.narrow(images)

    def predict(self, images, size=None):
        return decide(resize(self(images), size or images.shape[2:]).softmax(1))


def resize(logits, size):
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def decide(probabilities):
    return probabilities.argmax(1).to(torch.uint8)


class Pictures:
    """Random images of changing sizes, in memory."""

    def __init__(self, num_classes, sizes=((24, 40), (33, 21), (30, 30))):
        rng = np.random.default_rng(3)
        self.classes = [str(c) for c in range(num_classes)]
        self.images = [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
        self.labels = [rng.choice([0, 1, 255], size).astype(np.uint8) for size in sizes]
        self.loaded = []

    def __len__(self):
        return len(self.images)

    def load(self, index):
        self.loaded.append(index)
        return self.images[index], self.labels[index]


@pytest.fixture
def model():
    return Stub(4).eval()


@pytest.mark.parametrize("coarse", [False, True])
def test_predict_at_the_images_own_size(model, coarse):
    image = Pictures(4).images[0]
    labels = inference.predict(model, image, TestTransform((60, 30)), coarse=coarse)
    x = TestTransform((60, 30))(image)[None]
    assert x.shape[2:] == (30, 50) and model.seen == [(30, 50)]
    with torch.no_grad():
        logits = model.coarse(x) if coarse else model(x)
        expected = resize(resize(logits, (30, 50)), (24, 40)).argmax(1)[0]
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), expected)
    assert inference.predict(model, image, TestTransform(None), size=(7, 9)).shape == (7, 9)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("num_classes", "size"), [(4, (24, 40)), (1, (24, 40)), (1, (33, 21)), (150, (33, 21))]
)
def test_multi_scale_is_the_mean_of_twelve(num_classes, size, coarse, monkeypatch):
    model = Stub(num_classes).eval()
    image = np.random.default_rng(3).integers(0, 256, (*size, 3)).astype(np.uint8)
    scale = (60, 30)
    transforms = [TestTransform((int(60 * r), int(30 * r))) for r in RATIOS]
    passes = []
    with torch.no_grad():
        for ratio in RATIOS:
            factor = min(int(60 * ratio) / max(size), int(30 * ratio) / min(size))
            height, width = (int(side * factor + 0.5) for side in size)
            small = cv2.resize(image, (width, height))
            for flip in (False, True):
                # mirrored before it is normalised, as the published pipeline does
                x = TestTransform(None)(small[:, ::-1].copy() if flip else small)[None]
                logits = resize(model.coarse(x) if coarse else model(x), x.shape[2:])
                logits = resize(logits, size)
                p = torch.sigmoid(logits) if num_classes == 1 else torch.softmax(logits, 1)
                passes.append(torch.flip(p, [3]) if flip else p)
    expected = torch.stack(passes).double().mean(0)
    assert len(passes) == 12
    model.seen.clear()
    # seven rows at a time, the last strip has fewer
    monkeypatch.setattr(inference, "STRIP_BYTES", 7 * 4 * num_classes * size[1])
    mean = inference.mean_probabilities(model, image, transforms, coarse=coarse)
    # twelve roundings of a sum of up to 12, one of a softmax
    torch.testing.assert_close(mean.double(), expected, atol=5e-7, rtol=0)
    assert len(model.seen) == 12 and len(set(model.seen)) == 6
    labels = inference.predict_multi_scale(model, image, transforms, coarse=coarse)
    decided = (expected[:, 0] > 0.5).byte() if num_classes == 1 else decide(expected)
    assert labels.dtype == torch.uint8 and torch.equal(labels, decided[0])
    # what evaluate_dataset runs is the same twelve
    chosen = inference._transforms(scale, image, multi_scale=True)
    assert torch.equal(inference.mean_probabilities(model, image, chosen, coarse=coarse), mean)


class Scratch(nn.Module):
    """Small logits of a "network" that needs as much memory as `size` logits while it runs."""

    def __init__(self, num_classes, size):
        super().__init__()
        self.shape = (1, num_classes, *size)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        scratch = torch.ones(self.shape)
        return torch.randn(1, self.shape[1], *images.shape[2:]) * scratch[0, 0, 0, 0]


def peak_bytes(function, path):
    """The most memory that a call holds at once, temporaries inside operators too."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("num_classes", [1, 19])
def test_multi_scale_holds_two_maps(num_classes, tmp_path, monkeypatch):
    size = (128, 192)
    model, image = Scratch(num_classes, size).eval(), np.zeros((*size, 3), np.uint8)
    one_map = 4 * num_classes * size[0] * size[1]
    monkeypatch.setattr(inference, "STRIP_BYTES", one_map // 16)
    transforms = [TestTransform((side, side)) for side in (8, 12)]
    peak = peak_bytes(
        lambda: inference.mean_probabilities(model, image, transforms), tmp_path / "trace.json"
    )
    # the sum and a pass's logits, or the sum and what the network needs; strips, images, small maps
    assert 2 <= peak / one_map < 2.3


def test_multi_scale_without_flip_and_without_transforms(model):
    image = Pictures(4).images[0]
    inference.predict_multi_scale(model, image, [TestTransform(None)], flip=False)
    assert model.seen == [(24, 40)]
    with pytest.raises(ValueError, match="at least one transform"):
        inference.mean_probabilities(model, image, [])


def test_multi_scale_of_images_that_keep_their_size():
    image = np.zeros((40, 24, 3), np.uint8)
    shapes = [tuple(t(image).shape[1:]) for t in inference._transforms(None, image, True)]
    assert shapes == [(int(40 * r), int(24 * r)) for r in RATIOS]


@pytest.mark.parametrize("multi_scale", [False, True])
def test_evaluate_dataset(model, multi_scale):
    data = Pictures(4)
    predictions, scores = [], []
    metrics = inference.evaluate_dataset(
        model,
        data,
        (40, 32),
        multi_scale=multi_scale,
        on_prediction=lambda index, prediction: predictions.append((index, prediction)),
        on_score=lambda index, counted: scores.append((index, counted)),
    )
    assert [index for index, _ in predictions] == [0, 1, 2]
    assert sorted(data.loaded) == [0, 1, 2]  # by threads, in any order
    assert metrics.images == 3
    expected = SegmentationMetrics(4)
    for index, prediction in predictions:
        expected.update(prediction, data.labels[index])
        transforms = inference._transforms((40, 32), data.images[index], multi_scale)
        if multi_scale:
            again = inference.predict_multi_scale(model, data.images[index], transforms)
        else:
            again = inference.predict(model, data.images[index], transforms[0])
        assert np.array_equal(prediction, again.numpy())
    np.testing.assert_array_equal(metrics.confusion, expected.confusion)
    np.testing.assert_array_equal(metrics.boundary_union, expected.boundary_union)
    assert [index for index, _ in scores] == [0, 1, 2]
    for (index, prediction), (_, counted) in zip(predictions, scores, strict=True):
        alone = SegmentationMetrics(4)
        alone.update(prediction, data.labels[index])
        assert counted.images == 1
        np.testing.assert_array_equal(counted.confusion, alone.confusion)


def test_evaluate_dataset_limits_and_chooses(model):
    data = Pictures(4)
    assert inference.evaluate_dataset(model, data, None, limit=2, boundary=False).images == 2
    assert sorted(data.loaded) == [0, 1]
    data.loaded.clear()
    assert inference.evaluate_dataset(model, data, None, indices=[2, 0], limit=1).images == 1
    assert data.loaded == [2]
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        inference.evaluate_dataset(model, data, None, limit=0)
    with pytest.raises(ValueError, match="no image"):
        inference.evaluate_dataset(model, data, None, indices=[])


def test_an_error_while_loading_reaches_the_caller(model):
    data = Pictures(4)
    data.labels[2] = np.full((30, 30), 9, np.uint8)
    with pytest.raises(ValueError, match="label holds class 9"):
        inference.evaluate_dataset(model, data, None)
    data.images.pop()
    with pytest.raises(IndexError):
        inference.evaluate_dataset(model, data, None, indices=[0, 1, 2])


def test_evaluation_mode_restores_every_module():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), inference.evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_the_progress_bar_counts_images(model, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bars = []
    monkeypatch.setattr(
        inference, "tqdm", lambda *args, **kw: bars.append(tqdm(*args, **kw)) or bars[-1]
    )
    inference.evaluate_dataset(model, Pictures(4), None, boundary=False, limit=2)
    assert (bars[0].n, bars[0].total) == (2, 2)
    assert "0/2" in capsys.readouterr().err
    inference.evaluate_dataset(model, Pictures(4), None, boundary=False, progress=False)
    assert capsys.readouterr().err == ""


def test_measure_speed_times_the_network_and_not_the_loading(model, monkeypatch):
    data = Pictures(4)
    load, predict = data.load, model.predict
    clock, calls = [0.0], []

    def slow_load(index):
        clock[0] += 7.0
        return load(index)

    def slow_predict(images, size=None):
        calls.append(size)
        # the first five take longer: 50 ms, and then 1, 2, 3 and 10 ms
        clock[0] += 0.050 if len(calls) <= 5 else (0.001, 0.002, 0.003, 0.010)[len(calls) - 6]
        return predict(images, size=size)

    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(data, "load", slow_load)
    monkeypatch.setattr(model, "predict", slow_predict)
    speed = inference.measure_speed(model, data, None, images=9, progress=False)
    assert calls == [data.images[i % 3].shape[:2] for i in range(9)]
    assert (speed["images"], speed["skipped"]) == (4, 5)
    assert speed["median_ms"] == pytest.approx(2.5)
    assert speed["images_per_second"] == pytest.approx(4 / 0.016)
    assert speed["peak_memory_mib"] > 10
    assert "process" in speed["peak_memory_of"]
    with pytest.raises(ValueError, match="more than the 5 skipped, not 5"):
        inference.measure_speed(model, data, None, images=5)


@pytest.fixture(scope="module")
def pointrend():
    torch.manual_seed(0)
    head = {"channels": 16, "subdivision_num_points": 64}
    sizes = {"base_channels": 8, "fpn_channels": 16, "head_channels": 8}
    config = {"model": {"depth": 18, "num_classes": 4, "point_head": head, **sizes}}
    return build_model(config)


@pytest.mark.parametrize("coarse", [False, True])
def test_the_network_itself(pointrend, coarse):
    data = Pictures(4)
    maps = []
    metrics = inference.evaluate_dataset(
        pointrend, data, (70, 45), coarse=coarse, on_prediction=lambda _, p: maps.append(p)
    )
    assert metrics.images == 3 and pointrend.training
    pointrend.eval()
    for image, labels in zip(data.images, maps, strict=True):
        x = TestTransform((70, 45))(image)[None]
        with torch.no_grad():
            logits = pointrend.coarse(x) if coarse else pointrend(x)
            logits = resize(resize(logits, x.shape[2:]), image.shape[:2])
        assert np.array_equal(labels, logits.argmax(1)[0].numpy())
    pointrend.train()


def test_the_network_in_bfloat16(pointrend):
    with inference.evaluation_mode(pointrend):
        image, transform = Pictures(4).images[0], TestTransform(None)
        plain = inference.mean_probabilities(pointrend, image, [transform])
        half = inference.mean_probabilities(pointrend, image, [transform], amp=True)
        assert half.dtype == torch.float32 and not torch.equal(plain, half)
        torch.testing.assert_close(plain, half, atol=0.05, rtol=0)
        for coarse in (False, True):
            labels = inference.predict(pointrend, image, transform, coarse=coarse, amp=True)
            assert labels.shape == (24, 40)


def test_example_picture(pointrend):
    data = Pictures(4)
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    image, label = data.images[0], data.labels[0]
    picture = inference.example_picture(pointrend, image, label, None, palette)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    # 24x40 enlarged by 8: the first tile is the image, in RGB
    assert (picture[24 : 24 + 192 : 8, 0:320:8] == image[..., ::-1]).all()
    assert (picture == (255, 225, 25)).all(2).any()
    assert pointrend.training


def test_example_picture_of_a_large_image_is_small(pointrend):
    image, label = np.full((600, 1200, 3), 90, np.uint8), np.zeros((600, 1200), np.uint8)
    palette = np.zeros((4, 3), np.uint8)
    picture = inference.example_picture(pointrend, image, label, (64, 32), palette)
    assert picture.shape == (2 * (24 + 256) + 4, 4 * 512 + 3 * 4, 3)
    assert (picture == (255, 225, 25)).all(2).any()


def test_pick_device():
    assert inference.pick_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "vulkan", "xla", "hpu"):
        with pytest.raises(ValueError, match=f"'{name}' is no device here: ") as raised:
            inference.pick_device(name)
        assert len(str(raised.value)) < 300
