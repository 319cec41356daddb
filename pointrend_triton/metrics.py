"""Segmentation quality: IoU and accuracy, Boundary IoU, and mIoU in a band around class changes.

All counts are int64 and are summed over the data set before any division, as mmsegmentation does
for IoU. The border measures exist because IoU hides what PointRend is for: few pixels lie on a
border.

Distances are chessboard distances, so "within r pixels" is a square window of side 2r + 1. A pixel
of a class map is on its class's border when such a window around it is not constant: one minimum
and one maximum filter serve every class at once, with no mask per class.
"""

from __future__ import annotations

import math
from typing import TypedDict

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

IGNORE = 255
BAND_WIDTHS = (1, 3, 5)
BOUNDARY_RATIO = 0.02

ByteMap = npt.NDArray[np.uint8]
BoolMap = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Percents = npt.NDArray[np.float64]
ClassMap = npt.NDArray[np.integer] | torch.Tensor


class Scores(TypedDict):
    """Percentages, not rounded; NaN where nothing was counted (a class in neither map)."""

    iou: Percents  # [C]
    acc: Percents  # [C] share of a class's pixels that were found
    miou: float
    macc: float
    aacc: float
    boundary_iou: Percents  # [C]
    mean_boundary_iou: float
    band_miou: dict[int, float]  # by pixels on each side of a class change


class SegmentationMetrics:
    """Counts over a data set: `update` per image, `merge` with others, `compute` at the end.

    `boundary=False` leaves out Boundary IoU and the band mIoU, whose scores are then NaN. A model
    with one logit is measured over two classes, 0 and 1.

    Raises ValueError if `num_classes` is not within 2 and 255: labels are 8-bit, 255 is ignored.
    """

    def __init__(self, num_classes: int, boundary: bool = True) -> None:
        if not 2 <= num_classes <= IGNORE:
            raise ValueError(f"num_classes must be within 2 and {IGNORE}, not {num_classes}")
        self.num_classes = num_classes
        self.boundary = boundary
        self.images = 0
        # rows are the truth, columns the prediction
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.boundary_intersection = np.zeros(num_classes, np.int64)
        self.boundary_union = np.zeros(num_classes, np.int64)
        self.band_confusion = {width: np.zeros_like(self.confusion) for width in BAND_WIDTHS}

    def update(self, prediction: ClassMap, label: ClassMap) -> None:
        """Count one image: both maps [H,W] of integers, 255 in `label` is ignored.

        What is predicted at an ignored pixel is never counted. Raises ValueError for maps of
        different shapes and for a class that does not exist; nothing is counted then.
        """
        truth = _class_map("label", label, self.num_classes, may_ignore=True)
        guess = _class_map("prediction", prediction, self.num_classes, may_ignore=False)
        if truth.shape != guess.shape:
            raise ValueError(f"prediction is {guess.shape}, label {truth.shape}; they must agree")
        self.images += 1
        self.confusion += _confusion(truth, guess, truth != IGNORE, self.num_classes)
        if self.boundary:
            self._update_boundary(truth, guess)

    def merge(self, other: SegmentationMetrics) -> None:
        """Add the counts of `other`, which must measure the same thing (ValueError otherwise)."""
        mine, theirs = (self.num_classes, self.boundary), (other.num_classes, other.boundary)
        if mine != theirs:
            raise ValueError(f"cannot merge (num_classes, boundary) {theirs} into {mine}")
        self.images += other.images
        self.confusion += other.confusion
        self.boundary_intersection += other.boundary_intersection
        self.boundary_union += other.boundary_union
        for width, counts in other.band_confusion.items():
            self.band_confusion[width] += counts

    def all_reduce(self) -> None:
        """Give every rank the sums over all ranks, which must all call it; nothing without a group.

        Counts stay whole numbers, so it is as if one process had counted.
        """
        if not dist.is_initialized():
            return
        counts = [
            self.confusion,
            self.boundary_intersection,
            self.boundary_union,
            *self.band_confusion.values(),
        ]
        sums = np.concatenate([[self.images], *(array.ravel() for array in counts)])
        dist.all_reduce(torch.from_numpy(sums))  # in place
        self.images = int(sums[0])
        ends = np.cumsum([array.size for array in counts])
        for array, total in zip(counts, np.split(sums[1:], ends[:-1]), strict=True):
            array[...] = total.reshape(array.shape)

    def compute(self) -> Scores:
        """The scores of everything counted so far."""
        found, total = np.diagonal(self.confusion), self.confusion.sum()
        iou = _class_iou(self.confusion)
        acc = _percent(found, self.confusion.sum(axis=1))
        boundary_iou = _percent(self.boundary_intersection, self.boundary_union)
        return Scores(
            iou=iou,
            acc=acc,
            miou=_mean(iou),
            macc=_mean(acc),
            aacc=100.0 * int(found.sum()) / int(total) if total else math.nan,
            boundary_iou=boundary_iou,
            mean_boundary_iou=_mean(boundary_iou),
            band_miou={width: _mean(_class_iou(c)) for width, c in self.band_confusion.items()},
        )

    def _update_boundary(self, truth: ByteMap, guess: ByteMap) -> None:
        distance = boundary_distance(*truth.shape)
        near_ignored = _dilate((truth == IGNORE).astype(np.uint8), distance).astype(bool)
        counted = ~near_ignored

        # Boundary IoU (Cheng et al. 2021): the image's edge ends a mask, as by their zero padding
        truth_border = counted & _within_border(truth, distance, edge_is_border=True)
        guess_border = counted & _within_border(guess, distance, edge_is_border=True)
        both = truth_border & guess_border & (truth == guess)
        truth_area, guess_area, intersection = (
            np.bincount(classes[where], minlength=self.num_classes)
            for classes, where in ((truth, truth_border), (guess, guess_border), (truth, both))
        )
        self.boundary_intersection += intersection
        self.boundary_union += truth_area + guess_area - intersection

        # bands: only a change of class counts, neither the image's edge nor an ignored area
        for width, counts in self.band_confusion.items():
            band = counted & _within_border(truth, width, edge_is_border=False)
            counts += _confusion(truth, guess, band, self.num_classes)


def boundary_distance(height: int, width: int) -> int:
    """Boundary IoU's distance in pixels for an image: 2 % of its diagonal, at least 1."""
    return max(1, round(BOUNDARY_RATIO * math.hypot(height, width)))


def _class_map(name: str, classes: ClassMap, num_classes: int, may_ignore: bool) -> ByteMap:
    """`classes` as uint8 [H,W] on the host, checked."""
    if isinstance(classes, torch.Tensor):
        classes = classes.detach().cpu().numpy()
    array = np.asarray(classes)
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise ValueError(f"{name} must be integers [H,W], not {array.dtype} of shape {array.shape}")
    known = (array >= 0) & (array < num_classes)
    if may_ignore:
        known |= array == IGNORE
    if not known.all():
        ignored = f", or {IGNORE} for ignored" if may_ignore else ""
        value = int(array[~known][0])
        raise ValueError(f"{name} holds class {value}; classes are 0 to {num_classes - 1}{ignored}")
    return np.ascontiguousarray(array, np.uint8)


def _confusion(truth: ByteMap, guess: ByteMap, where: BoolMap, num_classes: int) -> Counts:
    """Counts [C,C], truth by prediction, over the pixels in `where`."""
    pairs = truth[where].astype(np.int32) * num_classes + guess[where]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _within_border(classes: ByteMap, distance: int, edge_is_border: bool) -> BoolMap:
    """Pixels within `distance` of another class (255 is none) or, if asked, the image's edge."""
    lowest = _erode(classes, distance)
    # 255 lowers no minimum; for the maximum an ignored pixel is 0, which raises none
    highest = _dilate(np.where(classes == IGNORE, 0, classes).astype(np.uint8), distance)
    border: BoolMap = lowest != highest
    if edge_is_border:
        border[:distance] = border[-distance:] = True
        border[:, :distance] = border[:, -distance:] = True
    return border


def _erode(image: ByteMap, distance: int) -> ByteMap:
    """Minimum over the square window of `distance` pixels each way, clipped at the image's edge."""
    return np.asarray(cv2.erode(image, _window(distance)), np.uint8)


def _dilate(image: ByteMap, distance: int) -> ByteMap:
    """Maximum over the square window of `distance` pixels each way, clipped at the image's edge."""
    return np.asarray(cv2.dilate(image, _window(distance)), np.uint8)


def _window(distance: int) -> ByteMap:
    side = 2 * distance + 1
    # a full rectangle is what OpenCV filters by rows, then by columns
    return np.ones((side, side), np.uint8)


def _class_iou(confusion: Counts) -> Percents:
    intersection = np.diagonal(confusion)
    return _percent(intersection, confusion.sum(axis=0) + confusion.sum(axis=1) - intersection)


def _percent(part: Counts, whole: Counts) -> Percents:
    """100 * part / whole, NaN where `whole` is 0."""
    percents: Percents = np.full(whole.shape, np.nan)
    np.divide(100.0 * part, whole, out=percents, where=whole > 0)
    return percents


def _mean(values: Percents) -> float:
    """Mean over the classes that have a value; NaN, without NumPy's warning, if none has."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan
