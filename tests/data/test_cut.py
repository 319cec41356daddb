"""Crops cut without resizing the whole picture are those of the published order, bit for bit."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.data import PublishedOrder
from pointrend_triton.config import DataConfig
from pointrend_triton.data import TrainTransform
from pointrend_triton.data.transforms import (
    ResizedLabel,
    photometric_distortion,
    resize,
    resized_crop,
)

sides = st.integers(1, 90)


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.choice(
        np.array([0, 0, 0, 1, 2, 255], np.uint8), (height, width)
    )


@st.composite
def windows(draw):
    """A picture's size, the size it is resized to, and a box of that."""
    source = draw(sides), draw(sides)
    kind = draw(st.sampled_from(["any", "one factor", "half", "near"]))
    if kind == "any":
        target = draw(sides), draw(sides)
    elif kind == "one factor":
        factor = draw(st.floats(0.3, 3))
        target = tuple(max(1, int(n * factor + 0.5)) for n in source)
    elif kind == "half":
        # OpenCV has a path of its own for this factor
        source = source[0] * 2, source[1] * 2
        target = source[0] // 2, source[1] // 2
    else:
        target = tuple(max(1, n + draw(st.integers(-1, 1))) for n in source)
    starts = [draw(st.integers(0, n - 1)) for n in target]
    return source, target, tuple(slice(a, a + draw(st.integers(1, 60))) for a in starts)


@given(windows(), st.integers(0, 100))
def test_resized_crop(window, seed):
    source, target, box = window
    image, label = picture(*source, seed)
    whole = resize(image, target, cv2.INTER_LINEAR)
    assert np.array_equal(resized_crop(image, target, box), whole[box])
    whole = resize(label, target, cv2.INTER_NEAREST)
    assert ResizedLabel(label, target).shape == whole.shape
    assert np.array_equal(ResizedLabel(label, target)[box], whole[box])


@pytest.mark.parametrize(
    ("source", "target", "box"),
    # what is needed of the picture would be resized to its own size, which OpenCV takes for a copy
    [
        ((262, 317), (261, 317), (slice(50, 108), slice(134, 137))),
        ((144, 337), (144, 336), (slice(0, 188), slice(6, 50))),
        ((45, 283), (45, 281), (slice(0, 63), slice(10, 54))),
    ],
)
def test_factors_near_one(source, target, box):
    image, _ = picture(*source)
    whole = resize(image, target, cv2.INTER_LINEAR)
    assert np.array_equal(resized_crop(image, target, box), whole[box])


def test_nearest_rows_at_many_sizes():
    for source in (1, 2, 3, 7, 49, 333, 683, 1024, 2048):
        line = np.arange(source) * 255 // source
        label = np.stack([line, np.arange(source) % 251]).astype(np.uint8)
        for target in (*range(1, 120), 683, 1023, 1999, 4096):
            whole = resize(label, (2, target), cv2.INTER_NEAREST)
            ours = ResizedLabel(label, (2, target))[slice(0, 2), slice(0, target)]
            assert np.array_equal(ours, whole), (source, target)


@pytest.mark.parametrize(
    ("size", "scale", "crop"),
    [
        ((101, 203), (200, 100), (51, 103)),
        ((97, 64), (131, 77), (64, 64)),
        ((64, 96), (96, 64), (200, 60)),
        ((50, 50), (50, 50), (50, 50)),
    ],
)
def test_the_pipeline_is_the_published_one(size, scale, crop):
    image, label = picture(*size)
    # regions, so that some crops are drawn again
    label = cv2.resize(label[:7, :9], size[::-1], interpolation=cv2.INTER_NEAREST)
    data = DataConfig(scale=scale, crop_size=crop)
    published, ours = PublishedOrder(None, data, 0), TrainTransform(data)
    for seed in range(60):
        first, second = np.random.default_rng(seed), np.random.default_rng(seed)
        for a, b in zip(
            published.transform(image, label, first), ours(image, label, second), strict=True
        ):
            assert torch.equal(a, b)
        assert first.bit_generator.state == second.bit_generator.state


def test_read_only_pictures_are_cut_and_left_alone():
    image, label = picture(40, 40)
    before = image.copy(), label.copy()
    image.flags.writeable = label.flags.writeable = False
    transform = TrainTransform(DataConfig(scale=(40, 40), crop_size=(24, 24)))
    for seed in range(20):
        transform.cut(image, label, np.random.default_rng(seed))
    assert np.array_equal(image, before[0])
    assert np.array_equal(label, before[1])


def by_steps(image, rng):
    """Every distortion by itself, in float32 and through HSV, as mmsegmentation writes them."""

    def convert(picture, factor=1.0, shift=0.0):
        values = picture.astype(np.float32) * np.float32(factor) + np.float32(shift)
        return np.clip(values, 0, 255).astype(np.uint8)

    if rng.integers(2):
        image = convert(image, shift=rng.uniform(-32, 32))
    mode = rng.integers(2)
    if mode == 1 and rng.integers(2):
        image = convert(image, rng.uniform(0.5, 1.5))
    if rng.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = convert(hsv[..., 1], rng.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if rng.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if mode == 0 and rng.integers(2):
        image = convert(image, rng.uniform(0.5, 1.5))
    return image


def test_joined_distortions_are_the_separate_ones():
    image, _ = picture(48, 48)
    for seed in range(200):
        ours = photometric_distortion(image, np.random.default_rng(seed))
        assert np.array_equal(ours, by_steps(image, np.random.default_rng(seed)))
