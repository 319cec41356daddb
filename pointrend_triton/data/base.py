"""What every data set offers; what those on disk share: pairing, checking, holding out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from pointrend_triton.data.io import (
    IGNORE,
    MAX_CLASSES,
    DataError,
    MissingDataError,
    read_image,
    read_label,
)

Pair = tuple[Path, Path | None]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
IDENTITY = np.arange(256, dtype=np.uint8)


class SegmentationDataset(Dataset[tuple[NDArray[np.uint8], NDArray[np.uint8]]]):
    """Pictures with a class for every pixel; `palette` is the classes' colours, uint8 [C,3] RGB."""

    name: str
    classes: tuple[str, ...]
    palette: NDArray[np.uint8]
    # False: every label is 255 throughout, for predictions that cannot be judged here
    has_labels: bool = True

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image uint8 BGR [H,W,3] and label uint8 [H,W]: class indices, 255 where to be ignored."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return self.load(index)

    def stem(self, index: int) -> str:
        """A name for files about this picture, without folder or suffix; unique in the split."""
        raise NotImplementedError

    def files(self, index: int) -> str:
        """Where the picture comes from, for messages."""
        raise NotImplementedError

    def encode(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Class indices [H,W] in the values of the data set's own benchmark; here unchanged."""
        return translate(
            label, IDENTITY, class_values(len(self.classes)), f"{self.name} prediction"
        )


class FileDataset(SegmentationDataset):
    """Pairs of an image and a label file, ordered by stem; both kinds are given by stem.

    `labels` None: the images alone.
    """

    def __init__(
        self,
        name: str,
        where: str,
        images: dict[str, Path],
        labels: dict[str, Path] | None,
        classes: tuple[str, ...],
        palette: NDArray[np.uint8],
    ) -> None:
        if len(classes) > MAX_CLASSES:
            raise DataError(f"{where}: {len(classes)} classes; labels hold at most {MAX_CLASSES}")
        self.name, self.classes, self.palette = name, classes, palette
        self.has_labels = labels is not None
        self.stems = sorted(images)
        self.pairs = pair_files(images, labels, where)

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        image_path, label_path = self.pairs[index]
        image = read_image(image_path)
        if label_path is None:
            return image, np.full(image.shape[:2], IGNORE, np.uint8)
        raw = read_label(label_path)
        if image.shape[:2] != raw.shape:
            (h, w), (label_h, label_w) = image.shape[:2], raw.shape
            raise DataError(
                f"{image_path} is {w}x{h} (width x height) but its label {label_path} is "
                f"{label_w}x{label_h}; they must agree (EXIF rotation applies to the image only)"
            )
        table = self.lookup(label_path)
        allowed = class_values(len(self.classes))[table]
        return image, translate(raw, table, allowed, str(label_path))

    def stem(self, index: int) -> str:
        return self.stems[index]

    def files(self, index: int) -> str:
        return str(self.pairs[index][0])

    def hold_out(self, every: int, *, held: bool) -> FileDataset:
        """This data set with every `every`-th pair (in stem order) if `held`, else without them."""
        if held and len(self) < every:
            images = f"{self.name} has {len(self)} images"
            raise DataError(f"{images}, so data.holdout_every {every} holds out none")
        chosen = [i for i in range(len(self)) if (i % every == every - 1) == held]
        part = copy.copy(self)
        part.pairs, part.stems = [self.pairs[i] for i in chosen], [self.stems[i] for i in chosen]
        return part

    def lookup(self, label_path: Path) -> NDArray[np.uint8]:
        """uint8 [256]: the class index, or 255, for each value stored in this label file."""
        return IDENTITY


def class_values(num_classes: int) -> NDArray[np.bool_]:
    """bool [256]: which values a label of so many classes may hold; 255, ignore, is one of them."""
    return (num_classes > IDENTITY) | (IDENTITY == IGNORE)


def translate(
    raw: NDArray[np.uint8], table: NDArray[np.uint8], allowed: NDArray[np.bool_], where: str
) -> NDArray[np.uint8]:
    """`raw` looked up in `table` (uint8 [256]); DataError where not `allowed` (bool [256])."""
    wrong = cv2.LUT(raw, (~allowed).astype(np.uint8))
    if wrong.any():
        values, counts = np.unique(raw[wrong != 0], return_counts=True)
        found = ", ".join(f"{v} ({n} px)" for v, n in zip(values[:5], counts[:5], strict=True))
        accepted = _ranges(np.flatnonzero(allowed))
        raise DataError(f"{where}: value {found} is no class; values may be {accepted}")
    return cv2.LUT(raw, table).astype(np.uint8, copy=False)


def pair_files(images: dict[str, Path], labels: dict[str, Path] | None, where: str) -> list[Pair]:
    """Images and labels by stem -> pairs sorted by stem; neither may lack its counterpart.

    `labels` None: no image has one.
    """
    if not images and not labels:
        raise MissingDataError(f"{where}: no images and no labels there")
    if labels is None:
        return [(images[stem], None) for stem in sorted(images)]
    for have, lack, kind in ((images, labels, "label"), (labels, images, "image")):
        if alone := sorted(set(have) - set(lack)):
            raise MissingDataError(
                f"{have[alone[0]]} has no {kind} of the same stem; {len(alone)} such in {where}"
            )
    return [(images[stem], labels[stem]) for stem in sorted(images)]


def by_stem(paths: Iterable[Path], ending: str | None = None) -> dict[str, Path]:
    """Visible files by name without `ending` (None: without suffix); stems must be unique."""
    found: dict[str, Path] = {}
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        stem = path.stem if ending is None else path.name.removesuffix(ending)
        if stem in found:
            raise DataError(f"{found[stem]} and {path} have the same stem; it must be unique")
        found[stem] = path
    return found


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The folder's files with one of these suffixes (any case)."""
    return [path for path in folder.iterdir() if path.suffix.lower() in suffixes]


def split_folder(root: Path, kind: str, split: str, layout: str) -> Path:
    """ROOT/kind/split, or MissingDataError that says what was looked for and what is there."""
    folder = root / kind / split
    if folder.is_dir():
        return folder
    if not (root / kind).is_dir():
        there = (
            _listing(root.iterdir()) or "nothing" if root.is_dir() else "nothing: it is no folder"
        )
        raise MissingDataError(f"{root / kind}: no such folder; need {layout}; {root} has {there}")
    splits = _listing(path for path in (root / kind).iterdir() if path.is_dir()) or "no folders"
    # build_dataset asks for this one only where nothing is held out
    hint = "; data.holdout_every makes that split" if split == "holdout" else ""
    raise MissingDataError(f"{root / kind} has no split {split!r}; it has {splits}{hint}")


def label_folder(root: Path, kind: str, split: str, layout: str, optional: bool) -> Path | None:
    """`split_folder` for labels; if they are `optional`, None instead of its error."""
    try:
        return split_folder(root, kind, split, layout)
    except MissingDataError as error:
        if optional:
            return None
        rule = "evaluate.py --save works without labels, on any split but data.train_split"
        raise MissingDataError(f"{error}; {rule}") from None


def _listing(paths: Iterable[Path]) -> str:
    visible = (path for path in paths if not path.name.startswith("."))
    names = sorted(path.name + "/" * path.is_dir() for path in visible)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more


def _ranges(values: NDArray[np.intp]) -> str:
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
