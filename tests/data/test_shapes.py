"""The drawn data set: the same pictures for ever, all classes, labels that sit on their objects."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from pointrend_triton.config import DataConfig
from pointrend_triton.data import DataError, build_dataset
from pointrend_triton.data.shapes import KINDS, Outline, Shapes, _coverage, draw_scene


def test_a_picture_depends_on_split_and_number_only():
    first, again = Shapes("train", 100), Shapes("train", 9)
    for index in (0, 8):
        for ours, theirs in zip(first.load(index), again.load(index), strict=True):
            assert np.array_equal(ours, theirs)
    labels = [
        Shapes(split, 2).load(i)[1].tobytes() for split in ("train", "val", "test") for i in (0, 1)
    ]
    assert len(set(labels)) == 6


@pytest.mark.parametrize("size", [(128, 128), (64, 200), (300, 50), (7, 5)])
def test_sizes(size):
    image, label = Shapes("train", 1, size).load(0)
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.uint8


def test_all_classes_appear_and_nothing_else():
    labels = np.stack([Shapes("train", 60).load(i)[1] for i in range(60)])
    share = np.bincount(labels.ravel(), minlength=256) / labels.size
    assert set(np.flatnonzero(share)) == {*range(len(KINDS)), 255}
    # thin classes cover least; every one must matter to a mean over classes
    assert share[: len(KINDS)].min() > 0.01
    assert 0.001 < share[255] < 0.05
    assert share[0] < 0.85


def test_the_number_of_objects_grows_with_the_area():
    def objects(size):
        labels = (draw_scene(size, np.random.default_rng(i))[1] for i in range(10))
        return sum(cv2.connectedComponents((label > 0).astype(np.uint8))[0] - 1 for label in labels)

    # four times the area; overlaps and cut objects blur the count, so half to double of 4
    assert 2 < objects((256, 256)) / objects((128, 128)) < 8


def test_image_borders_coincide_with_label_borders():
    strength = {}
    for shift in range(-3, 4):
        total = []
        for i in range(20):
            image, label = Shapes("val", 20).load(i)
            grey = cv2.GaussianBlur(image, (0, 0), 0.7).astype(float)
            edge = np.abs(np.diff(grey, axis=1)).sum(axis=2)
            border = np.roll(np.diff(label.astype(int), axis=1) != 0, shift, axis=1)
            total.append(edge[border].mean())
        strength[shift] = np.mean(total)
    assert max(strength, key=strength.get) == 0
    # the label is neither too fat nor too thin: both sides fall off alike
    assert abs(strength[1] - strength[-1]) < 0.1 * strength[0]


def test_coverage_is_the_area_inside_the_outline():
    square = np.array([[2.0, 3.0], [7.5, 3.0], [7.5, 9.0], [2.0, 9.0]])
    cover = _coverage([square], None, (12, 12))
    # the rasteriser counts pixels on the outline: at most one fine pixel more along each side
    assert 5.5 * 6 <= cover.sum() <= (5.5 + 0.5) * (6 + 0.5)
    assert cover[6, 4] == 1
    assert cover[6, 10] == 0
    hole = np.array([[4.0, 5.0], [6.0, 5.0], [6.0, 7.0], [4.0, 7.0]])
    assert _coverage([square, hole], None, (12, 12))[5, 5] < 0.3


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind.name)
def test_outlines_are_of_moderate_size_and_around_the_origin(kind):
    for seed in range(30):
        outline = kind.outline(np.random.default_rng(seed))
        assert isinstance(outline, Outline)
        points = np.concatenate(outline.lines)
        assert np.isfinite(points).all()
        assert 8 < np.ptp(points, axis=0).max() < 110
        assert np.abs(points.mean(axis=0)).max() < 12


def test_names_and_bounds():
    data = build_dataset(DataConfig(shapes_eval_images=5), "val")
    assert (len(data), data.stem(3), data.files(3)) == (5, "shapes_val_00003", "shapes:val:3")
    assert len(build_dataset(DataConfig(shapes_train_images=8), "train")) == 8
    assert len(data.classes) == len(data.palette) == 8
    with pytest.raises(IndexError, match="no number 5"):
        data.load(5)
    assert len(list(data)) == 5


def test_unknown_split_and_holdout_are_refused():
    with pytest.raises(DataError, match="no split 'eval'; it has train, val, test"):
        build_dataset(DataConfig(), "eval")
    with pytest.raises(DataError, match="holdout_every"):
        build_dataset(DataConfig(holdout_every=5), "train")


@pytest.mark.slow
def test_contact_sheet_is_written(tmp_path):
    out = tmp_path / "sheet.png"
    command = [sys.executable, "-W", "error", "-m", "pointrend_triton.data.shapes", str(out)]
    subprocess.run(command, check=True)
    assert cv2.imread(str(out)).std() > 10
