"""metrics.py against a slow twin: one mask per class, distances measured pixel by pixel."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointrend_triton.metrics import (
    BAND_WIDTHS,
    IGNORE,
    SegmentationMetrics,
    boundary_distance,
)

SCALARS = ("miou", "macc", "aacc", "mean_boundary_iou")
VECTORS = ("iou", "acc", "boundary_iou")


def blobs(rng, height, width, classes, cell, ignored=0.1):
    """A random label map of cells of `cell` pixels, a share of the cells ignored."""
    rows, columns = -(-height // cell), -(-width // cell)
    cells = rng.choice(classes, (rows, columns)).astype(np.uint8)
    cells[rng.random((rows, columns)) < ignored] = IGNORE
    return cells.repeat(cell, 0).repeat(cell, 1)[:height, :width]


def disturbed(rng, label, classes):
    """A prediction: the label moved, pixels replaced, some class where the label is ignored."""
    guess = np.roll(label, rng.integers(-3, 4, 2), (0, 1))
    wrong = (rng.random(label.shape) < 0.1) | (guess == IGNORE)
    return np.where(wrong, rng.choice(classes, label.shape), guess).astype(np.uint8)


def nearest(height, width, points):
    """Chessboard distance [H,W] to the nearest of `points` [n,2], infinite without any."""
    rows, columns = np.mgrid[:height, :width]
    distances = np.full((height, width), math.inf)
    for row, column in points:
        here = np.maximum(abs(rows - row), abs(columns - column))
        distances = np.minimum(distances, here)
    return distances


def thin(mask, times):
    """`times` erosions by 3x3 of the mask in a frame of zeros, as Cheng et al. write it down."""
    frame = np.pad(mask, 1)
    for _ in range(times):
        shifts = [np.roll(frame, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        frame = np.pad(np.all(shifts, 0)[1:-1, 1:-1], 1)
    return frame[1:-1, 1:-1]


def share(part, whole):
    return 100 * part / whole if whole else math.nan


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def slow_scores(pairs, num_classes):
    """All the scores of (prediction, label) pairs, one class and one pixel at a time."""
    classes = range(num_classes)
    inter, union, truth = ([0] * num_classes for _ in range(3))
    border_inter, border_union = ([0] * num_classes for _ in range(2))
    band = {width: [[0, 0] for _ in classes] for width in BAND_WIDTHS}
    for guess, label in pairs:
        height, width = label.shape
        distance = max(1, round(0.02 * math.sqrt(height**2 + width**2)))
        valid = label != IGNORE
        kept = nearest(height, width, np.argwhere(~valid)) > distance
        to_change = np.full(label.shape, math.inf)
        for c in set(label[valid].tolist()):
            others = np.argwhere(valid & (label != c))
            to_change[label == c] = nearest(height, width, others)[label == c]
        for c in classes:
            g, p = label == c, guess == c
            inter[c] += (g & p).sum()
            union[c] += ((g | p) & valid).sum()
            truth[c] += g.sum()
            g_border, p_border = (m & ~thin(m, distance) & kept for m in (g, p))
            border_inter[c] += (g_border & p_border).sum()
            border_union[c] += (g_border | p_border).sum()
            for w in BAND_WIDTHS:
                inside = kept & (to_change <= w)
                band[w][c][0] += (g & p & inside).sum()
                band[w][c][1] += ((g | p) & inside).sum()
    iou = [share(i, u) for i, u in zip(inter, union, strict=True)]
    acc = [share(i, t) for i, t in zip(inter, truth, strict=True)]
    border = [share(i, u) for i, u in zip(border_inter, border_union, strict=True)]
    return {
        "iou": iou,
        "acc": acc,
        "miou": mean(iou),
        "macc": mean(acc),
        "aacc": share(sum(inter), sum(truth)),
        "boundary_iou": border,
        "mean_boundary_iou": mean(border),
        "band_miou": {w: mean([share(*c) for c in counts]) for w, counts in band.items()},
    }


def assert_scores(got, expected):
    for name in SCALARS + VECTORS:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-12, err_msg=name)
    assert got["band_miou"] == pytest.approx(expected["band_miou"], rel=1e-12, nan_ok=True)


@pytest.mark.parametrize(
    ("height", "width", "cell", "distance"), [(1, 1, 1, 1), (17, 23, 4, 1), (81, 77, 19, 2)]
)
def test_equals_the_slow_implementation(height, width, cell, distance):
    rng = np.random.default_rng(height)
    present = [0, 1, 2, 4, 6]
    assert boundary_distance(height, width) == distance
    metrics, pairs = SegmentationMetrics(8), []
    for _ in range(3):
        label = blobs(rng, height, width, present, cell)
        # class 6 is never predicted, class 5 only predicted, 3 and 7 are nowhere
        pairs.append((disturbed(rng, np.where(label == 6, 0, label), [0, 1, 2, 4, 5]), label))
        metrics.update(*pairs[-1])
    scores = metrics.compute()
    assert_scores(scores, slow_scores(pairs, 8))
    assert np.isnan(scores["iou"][[3, 7]]).all() and np.isnan(scores["boundary_iou"][[3, 7]]).all()
    assert metrics.images == 3


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    cell=st.integers(1, 9),
    ignored=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_slow_implementation_on_any_map(height, width, cell, ignored, seed):
    rng = np.random.default_rng(seed)
    label = blobs(rng, height, width, [0, 1, 3], cell, ignored)
    guess = disturbed(rng, label, [0, 1, 2])
    metrics = SegmentationMetrics(4)
    metrics.update(guess, label)
    assert_scores(metrics.compute(), slow_scores([(guess, label)], 4))


def test_known_numbers():
    label = np.array([[0, 0, 1, 1], [0, 0, 1, IGNORE]], np.uint8)
    guess = np.array([[0, 1, 1, 1], [0, 0, 0, 0]], np.uint8)
    metrics = SegmentationMetrics(3, boundary=False)
    metrics.update(guess, label)
    assert metrics.confusion.dtype == np.int64
    np.testing.assert_array_equal(metrics.confusion, [[3, 1, 0], [1, 2, 0], [0, 0, 0]])
    scores = metrics.compute()
    np.testing.assert_allclose(scores["iou"], [60, 50, math.nan])
    np.testing.assert_allclose(scores["acc"], [75, 200 / 3, math.nan])
    assert scores["miou"] == pytest.approx(55)
    assert scores["aacc"] == pytest.approx(100 * 5 / 7)
    assert math.isnan(scores["mean_boundary_iou"]) and math.isnan(scores["band_miou"][1])


def test_bands_count_both_sides_of_a_change_and_not_the_image_edge():
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 1
    metrics = SegmentationMetrics(2)
    metrics.update(label, label)
    assert {w: int(c.sum()) for w, c in metrics.band_confusion.items()} == {1: 80, 3: 240, 5: 400}


def test_boundary_iou_of_a_shifted_square():
    # d = 3 at 100x100: two 20x20 squares, one pixel apart, each with a border 3 px wide
    label, guess = np.zeros((2, 100, 100), np.uint8)
    label[40:60, 40:60] = 1
    guess[40:60, 41:61] = 1
    metrics = SegmentationMetrics(2)
    metrics.update(guess, label)
    square = 20 * 20 - 14 * 14
    overlap = 20 * 19 - 14 * 15
    assert metrics.boundary_intersection[1] == overlap
    assert metrics.boundary_union[1] == 2 * square - overlap


def test_what_is_predicted_at_or_near_ignored_pixels():
    rng = np.random.default_rng(1)
    label = blobs(rng, 60, 60, [0, 1], 15, ignored=0.2)
    guess = disturbed(rng, label, [0, 1])
    other = np.where(label == IGNORE, 1 - guess, guess)
    assert (guess != other).any()
    one, two = SegmentationMetrics(2), SegmentationMetrics(2)
    one.update(guess, label)
    two.update(other, label)
    assert_scores(one.compute(), two.compute())


def test_merge_is_update_of_both():
    rng = np.random.default_rng(2)
    whole, parts = SegmentationMetrics(3), [SegmentationMetrics(3), SegmentationMetrics(3)]
    for i in range(4):
        label = blobs(rng, 20, 30, [0, 1, 2], 5)
        guess = disturbed(rng, label, [0, 1, 2])
        whole.update(guess, label)
        parts[i % 2].update(guess, label)
    parts[0].merge(parts[1])
    assert parts[0].images == whole.images
    assert_scores(parts[0].compute(), whole.compute())
    with pytest.raises(ValueError, match=r"\(4, True\) into \(3, True\)"):
        whole.merge(SegmentationMetrics(4))


def test_takes_tensors_and_wide_integers():
    label = np.array([[0, 1, IGNORE]], np.uint8)
    one, two = SegmentationMetrics(2), SegmentationMetrics(2)
    one.update(label * 0, label)
    two.update(torch.zeros(1, 3, dtype=torch.int64), torch.from_numpy(label).long())
    assert_scores(one.compute(), two.compute())


def test_counts_beyond_what_float32_can_hold():
    metrics = SegmentationMetrics(2, boundary=False)
    metrics.confusion[0, 0] = 2**31
    metrics.update(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert metrics.confusion[0, 0] == 2**31 + 1


def test_empty_metrics_are_nan_without_a_warning(recwarn):
    scores = SegmentationMetrics(2).compute()
    assert all(math.isnan(scores[name]) for name in SCALARS)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("guess", "label", "message"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), r"prediction is \(2, 2\), label \(2, 3\)"),
        (np.full((2, 2), 3), np.zeros((2, 2), int), "prediction holds class 3; classes are 0 to 2"),
        (np.full((2, 2), IGNORE), np.zeros((2, 2), int), "prediction holds class 255"),
        (np.zeros((2, 2), int), np.full((2, 2), 9), "label holds class 9; .* 255 for ignored"),
        (np.zeros((2, 2), int), np.full((2, 2), -1), "label holds class -1"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), r"prediction must be integers \[H,W\]"),
        (np.zeros((1, 2, 2), int), np.zeros((2, 2), int), r"of shape \(1, 2, 2\)"),
    ],
)
def test_unusable_maps(guess, label, message):
    metrics = SegmentationMetrics(3)
    with pytest.raises(ValueError, match=message):
        metrics.update(guess, label)
    assert metrics.images == 0 and not metrics.confusion.any()


@pytest.mark.parametrize("num_classes", [1, 256])
def test_number_of_classes(num_classes):
    with pytest.raises(ValueError, match=f"not {num_classes}"):
        SegmentationMetrics(num_classes)


@pytest.mark.parametrize(
    ("height", "width", "classes", "budget"), [(128, 128, 8, 0.010), (1024, 2048, 19, 1.5)]
)
def test_time_of_an_image(height, width, classes, budget):
    rng = np.random.default_rng(0)
    label = blobs(rng, height, width, range(classes), 32)
    guess = disturbed(rng, label, range(classes))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        SegmentationMetrics(classes).update(guess, label)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < budget
