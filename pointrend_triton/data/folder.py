"""Any data in the plain layout: images/SPLIT/NAME.jpg, labels/SPLIT/NAME.png and classes.csv."""

from __future__ import annotations

from pathlib import Path

from pointrend_triton.data.base import (
    IMAGE_SUFFIXES,
    FileDataset,
    by_stem,
    files_in,
    label_folder,
    split_folder,
)
from pointrend_triton.data.io import read_classes

LAYOUT = "ROOT/images/SPLIT/NAME.{jpg,png,...}, ROOT/labels/SPLIT/NAME.png and ROOT/classes.csv"


class Folder(FileDataset):
    """Labels hold the class indices of classes.csv (see read_classes), or 255 to be ignored."""

    def __init__(self, root: str | Path, split: str, labels_optional: bool = False) -> None:
        root = Path(root)
        images = files_in(split_folder(root, "images", split, LAYOUT), IMAGE_SUFFIXES)
        truth = label_folder(root, "labels", split, LAYOUT, labels_optional)
        labels = by_stem(files_in(truth, (".png",))) if truth else None
        classes, palette = read_classes(root / "classes.csv")
        where = f"{root} [{split}]"
        super().__init__(root.name, where, by_stem(images), labels, classes, palette)
