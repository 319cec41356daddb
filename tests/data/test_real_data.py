"""Real photographs, where there are any: POINTREND_DATA names the folder that holds the sets."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pointrend_triton.config import DataConfig
from pointrend_triton.data import TestTransform, TrainTransform, ade20k, build_dataset, train_loader


@pytest.fixture
def folder(data_root):
    def named(name):
        if not (data_root / name).is_dir():
            pytest.skip(f"{data_root / name} is not there")
        return data_root / name

    return named


def test_camvid(folder):
    root = folder("camvid")
    config = DataConfig(dataset="folder", root=str(root), scale=(480, 360), crop_size=(352, 480))
    data = build_dataset(config, "train")
    assert data.name == "camvid"
    assert (len(data), len(data.classes), data.classes[8]) == (367, 11, "Car")
    assert data.palette[8].tolist() == [64, 0, 128]
    image, label = data.load(100)
    stem = data.stem(100)
    assert np.array_equal(image, cv2.imread(str(root / f"images/train/{stem}.jpg")))
    assert np.array_equal(label, np.array(Image.open(root / f"labels/train/{stem}.png")))


def test_camvid_holdout_and_loading_by_workers(folder):
    root = folder("camvid")
    config = DataConfig(
        dataset="folder",
        root=str(root),
        holdout_every=10,
        scale=(480, 360),
        crop_size=(352, 480),
    )
    train, held = build_dataset(config, "train"), build_dataset(config, "holdout")
    assert (len(train), len(held)) == (331, 36)
    (batch,) = train_loader(train, config, 3, 0, 5, 6)
    assert batch[0].shape == (3, 3, 352, 480)
    assert set(np.unique(batch[1].numpy()).tolist()) <= {*range(11), 255}
    assert all(Path(file).is_file() for file in batch[2])


def test_ade20k_layouts_agree(folder):
    root = folder("ade20k_sample")
    native = DataConfig(dataset="ade20k", root=str(root / "ADEChallengeData2016"))
    plain = DataConfig(dataset="folder", root=str(root))
    for split, count in (("train", 3), ("val", 5)):
        ours, theirs = build_dataset(native, split), build_dataset(plain, split)
        assert len(ours) == len(theirs) == count
        for i in range(count):
            assert ours.stem(i) == theirs.stem(i)
            for a, b in zip(ours.load(i), theirs.load(i), strict=True):
                assert np.array_equal(a, b)
            stored = np.array(Image.open(ours.pairs[i][1]))
            assert np.array_equal(ours.encode(ours.load(i)[1]), stored)


def test_ade20k_classes_are_the_published_ones(folder):
    with (folder("ade20k_sample") / "color150.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"].split(",")[0] for row in rows] == list(ade20k.CLASSES)
    assert [[int(row[c]) for c in "rgb"] for row in rows] == ade20k.PALETTE.tolist()


def test_ade20k_pipelines(folder):
    root = folder("ade20k_sample") / "ADEChallengeData2016"
    config = DataConfig(dataset="ade20k", root=str(root), scale=(2048, 512), crop_size=(512, 512))
    data = build_dataset(config, "val")
    sizes = [tuple(TestTransform((2048, 512))(data.load(i)[0]).shape) for i in range(len(data))]
    # short side 512, from 683x512, 500x364, 400x300, 739x512 and 768x512
    assert sizes == [(3, 512, width) for width in (683, 703, 683, 739, 768)]
    image, label = data.load(0)
    pixels, classes = TrainTransform(config)(image, label, np.random.default_rng(0))
    assert pixels.shape == (3, 512, 512)
    assert torch.isfinite(pixels).all()
    assert set(np.unique(classes.numpy()).tolist()) <= {*np.unique(label).tolist(), 255}
