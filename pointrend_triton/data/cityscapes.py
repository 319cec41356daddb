"""Cityscapes, fine annotations, 19 classes: ROOT holds leftImg8bit/ and gtFine/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pointrend_triton.data.base import (
    IDENTITY,
    FileDataset,
    by_stem,
    class_values,
    label_folder,
    split_folder,
    translate,
)
from pointrend_triton.data.io import IGNORE

LAYOUT = (
    "ROOT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and "
    "ROOT/gtFine/SPLIT/CITY/*_gtFine_{labelTrainIds,labelIds}.png"
)

# class (its position here is the trainId), its id in the official label files, its colour
_TABLE: list[tuple[str, int, tuple[int, int, int]]] = [
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
]
CLASSES = tuple(name for name, _, _ in _TABLE)
PALETTE = np.array([rgb for _, _, rgb in _TABLE], dtype=np.uint8)

_IDS = np.array([number for _, number, _ in _TABLE])
_NUM_IDS = 34

# id -> trainId; ids that are not evaluated are ignored, numbers that are no id stay invalid
FROM_ID = IDENTITY.copy()
FROM_ID[:_NUM_IDS] = IGNORE
FROM_ID[_IDS] = np.arange(len(_IDS))
# trainId -> id; 255 becomes 0, "unlabeled"
TO_ID = np.zeros(256, dtype=np.uint8)
TO_ID[: len(_IDS)] = _IDS


class Cityscapes(FileDataset):
    """19 classes; splits "train", "val" and "test".

    Reads *_labelTrainIds.png where there is one (mmsegmentation's data preparation writes them),
    else maps the official zip's *_labelIds.png, which holds the same polygons, on the fly.
    """

    def __init__(self, root: str | Path, split: str, labels_optional: bool = False) -> None:
        root = Path(root)
        pictures = split_folder(root, "leftImg8bit", split, LAYOUT).glob("*/*_leftImg8bit.png")
        images = by_stem(pictures, "_leftImg8bit.png")
        labels = None
        if truth := label_folder(root, "gtFine", split, LAYOUT, labels_optional):
            labels = by_stem(truth.glob("*/*_gtFine_labelIds.png"), "_gtFine_labelIds.png")
            train_ids = truth.glob("*/*_gtFine_labelTrainIds.png")
            labels |= by_stem(train_ids, "_gtFine_labelTrainIds.png")
        super().__init__("cityscapes", f"{root} [{split}]", images, labels, CLASSES, PALETTE)

    def lookup(self, label_path: Path) -> NDArray[np.uint8]:
        return IDENTITY if label_path.name.endswith("_labelTrainIds.png") else FROM_ID

    def encode(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Train ids -> the label ids that the Cityscapes server wants; 255 -> 0."""
        return translate(label, TO_ID, class_values(len(CLASSES)), "cityscapes prediction")
