"""ADE20K, SceneParse150 release: ROOT is the folder ADEChallengeData2016."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pointrend_triton.data.base import (
    FileDataset,
    by_stem,
    class_values,
    files_in,
    label_folder,
    split_folder,
    translate,
)
from pointrend_triton.data.io import IGNORE, read_classes

LAYOUT = "ROOT/{images,annotations}/{training,validation}/NAME.{jpg,png} (ADEChallengeData2016)"
# the first name and the colour of each class in the release's objectInfo150 and color150
CLASSES, PALETTE = read_classes(Path(__file__).with_name("ade20k_classes.csv"))

_NATIVE_SPLITS = {"train": "training", "val": "validation"}


def _reduce_zero_label() -> NDArray[np.uint8]:
    """Stored value -> class, as in mmsegmentation: 0 ("other") -> 255, k -> k-1, 255 -> 255."""
    table = np.arange(-1, 255).astype(np.uint8)
    table[IGNORE] = IGNORE
    return table


FROM_RAW = _reduce_zero_label()
# the evaluation server counts classes from 1; 255 becomes 0, "other"
TO_RAW = np.arange(1, 257).astype(np.uint8)


class ADE20K(FileDataset):
    """150 classes; splits "training" and "validation", also called "train" and "val"."""

    def __init__(self, root: str | Path, split: str, labels_optional: bool = False) -> None:
        root, folder = Path(root), _NATIVE_SPLITS.get(split, split)
        images = files_in(split_folder(root, "images", folder, LAYOUT), (".jpg",))
        truth = label_folder(root, "annotations", folder, LAYOUT, labels_optional)
        labels = by_stem(files_in(truth, (".png",))) if truth else None
        where = f"{root} [{folder}]"
        super().__init__("ade20k", where, by_stem(images), labels, CLASSES, PALETTE)

    def lookup(self, label_path: Path) -> NDArray[np.uint8]:
        return FROM_RAW

    def encode(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class indices -> 1..150, 255 -> 0: the values that the SceneParse150 server wants."""
        return translate(label, TO_RAW, class_values(len(CLASSES)), "ade20k prediction")
