"""The published training and test pipelines, on NumPy arrays with an explicit random generator.

Steps, order and quirks are those of mmsegmentation 0.x; equal random draws give equal pictures.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pointrend_triton.config import DataConfig
from pointrend_triton.data.io import IGNORE

Image = NDArray[np.uint8]
Label = NDArray[np.uint8]
Table = NDArray[np.uint8]
Size = tuple[int, int]
Box = tuple[slice, slice]
T = TypeVar("T", bound=np.generic)

# ImageNet's mean and standard deviation, RGB, in grey levels
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

MULTI_SCALE_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

_GREYS = np.arange(256, dtype=np.float32)
_SAME = np.arange(256, dtype=np.uint8)


class Colours(NamedTuple):
    """A photometric distortion, in the order of its steps; by default the picture stays as it is.

    The numbers are rounded to float32 before they are used.
    """

    brightness: float = 0  # added, in grey levels
    early_contrast: float = 1  # a factor
    saturation: float = 0  # a factor; 0: none, and no way through HSV and back
    hue: float = -1  # added in half degrees, 0 to 179, modulo 180; -1: none, and no way through HSV
    late_contrast: float = 1  # a factor


class Cut(NamedTuple):
    """What is made of a picture: all random choices of the training pipeline."""

    size: Size  # (height, width) of the whole picture, resized
    box: Box  # what is cut from that; its end may lie beyond it
    flip: bool
    colours: Colours


class TrainTransform:
    """Resize, crop, flip, distort colours, normalise, pad: mmsegmentation's training pipeline."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __call__(
        self, image: Image, label: Label, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image uint8 BGR [H,W,3] and label uint8 [H,W] -> float32 RGB [3,h,w], int64 [h,w].

        (h, w) is the crop size; the part beyond a smaller picture is 0 (the mean colour) and 255.
        """
        image, label = self.cut(image, label, rng)
        pixels = pad(normalise(image), self.data.crop_size, 0)
        classes = pad(label, self.data.crop_size, IGNORE).astype(np.int64)
        return torch.from_numpy(pixels), torch.from_numpy(classes)

    def cut(self, image: Image, label: Label, rng: np.random.Generator) -> tuple[Image, Label]:
        """All steps before `normalise`: uint8 BGR [h,w,3] and uint8 [h,w], at most the crop size.

        The published order resizes the whole picture first; here only what the crop needs of it.
        """
        size, box, flip, colours = self.draw(label, rng)
        image, label = resized_crop(image, size, box), ResizedLabel(label, size)[box]
        if flip:
            image, label = _flip(image), _flip(label)
        return distort(image, colours), label

    def draw(self, label: Label, rng: np.random.Generator) -> Cut:
        """The random choices for a picture of this label [H,W], which the box is checked by."""
        data = self.data
        size = rescale_size(label.shape, data.scale, data.scale_range, rng)
        box = random_crop_box(ResizedLabel(label, size), data.crop_size, data.crop_max_share, rng)
        flip = rng.random() < data.flip_probability
        return Cut(size, box, flip, draw_colours(rng) if data.photometric else Colours())


class TestTransform:
    """Keep-ratio resize into `scale` (None: keep the size) and normalise; no padding, no crop."""

    __test__ = False  # pytest would take the class for a test

    def __init__(self, scale: Size | None) -> None:
        self.scale = scale

    def __call__(self, image: Image) -> torch.Tensor:
        """Image uint8 BGR [H,W,3] -> float32 RGB [3,h,w], normalised."""
        if self.scale is not None:
            h, w = image.shape[:2]
            image = resize(image, keep_ratio_size(h, w, self.scale), cv2.INTER_LINEAR)
        return torch.from_numpy(normalise(image))


def keep_ratio_size(height: int, width: int, scale: Size) -> Size:
    """The largest (height, width) of the picture's ratio that fits `scale`, rounded half up.

    `scale` bounds the longer and the shorter side, in either order; small pictures grow, and those
    of extreme shape keep a pixel.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def rescale_size(
    size: tuple[int, ...], scale: Size, scale_range: tuple[float, float], rng: np.random.Generator
) -> Size:
    """The size of a picture of (height, width) `size` fitted into `scale` times a random factor."""
    low, high = scale_range
    ratio = rng.random() * (high - low) + low
    return keep_ratio_size(size[0], size[1], (int(scale[0] * ratio), int(scale[1] * ratio)))


def multi_scale_sizes(scale: Size) -> list[Size]:
    """The six scales of mmsegmentation 0.x's multi-scale test: ratios of the test scale itself."""
    return [(int(scale[0] * ratio), int(scale[1] * ratio)) for ratio in MULTI_SCALE_RATIOS]


def resize(array: NDArray[np.uint8], size: Size, interpolation: int) -> NDArray[np.uint8]:
    """OpenCV's resize of [H,W] or [H,W,3] to (height, width); no copy if it has that size."""
    if array.shape[:2] == size:
        return array
    return cv2.resize(array, size[::-1], interpolation=interpolation).astype(np.uint8, copy=False)


def resized_crop(image: Image, size: Size, box: Box) -> Image:
    """`resize(image, size, cv2.INTER_LINEAR)[box]`, bit for bit, without the whole resized picture.

    OpenCV counts its fixed-point weights from the top left corner, so the part above and left of
    the box has to be computed with it; the part below and to the right does not.
    """
    if image.shape[:2] == size:
        return image[box]
    fy, fx = size[0] / image.shape[0], size[1] / image.shape[1]
    # the last tap of resized pixel i is below (i + 1.5) / f + 0.5
    height, width = (math.ceil(part.stop / f) + 3 for part, f in zip(box, (fy, fx), strict=True))
    part = image[:height, :width]
    # given factors and no size, OpenCV uses the factors that it derives from the whole size
    resized = cv2.resize(part, None, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR)
    if resized.shape == part.shape:
        # a factor so near 1 that OpenCV copied
        resized = resize(image, size, cv2.INTER_LINEAR)
    return resized[box].astype(np.uint8, copy=False)


class ResizedLabel:
    """A label [H,W] as `resize` to (height, width) with INTER_NEAREST makes it; read by `[box]`.

    Only the pixels of a box are looked up, each time anew.
    """

    def __init__(self, label: Label, size: Size) -> None:
        self.label, self.shape = label, size
        self.rows, self.columns = (_nearest(*n) for n in zip(label.shape, size, strict=True))

    def __getitem__(self, box: Box) -> Label:
        rows = np.take(self.label, self.rows[box[0]], axis=0)
        return np.take(rows, self.columns[box[1]], axis=1)


def _nearest(source: int, target: int) -> NDArray[np.intp]:
    # as OpenCV rounds: by the inverse of the factor, in double precision
    positions = np.arange(target) * (1 / (target / source))
    return np.minimum(positions.astype(np.intp), source - 1)


def random_crop_box(
    label: Label | ResizedLabel, crop_size: Size, max_share: float, rng: np.random.Generator
) -> Box:
    """Where to crop: rows and columns of at most `crop_size`, all of a side that is smaller.

    A box is drawn again, up to ten times, unless it holds two classes or more and the commonest has
    less than `max_share` of its pixels, ignored ones not counted. The eleventh box is taken
    unchecked; a `max_share` of 1 checks nothing.
    """
    box = _draw_box(label.shape, crop_size, rng)
    if max_share < 1:
        for _ in range(10):
            # counted as float32: exact up to 2**24 pixels, then to 1e-7
            # and a column in OpenCV 4, a row in 5
            counts = cv2.calcHist([label[box]], [0], None, [256], [0, 256]).ravel()[:IGNORE]
            if (
                np.count_nonzero(counts) > 1
                and float(counts.max()) / counts.sum(dtype=np.float64) < max_share
            ):
                break
            box = _draw_box(label.shape, crop_size, rng)
    return box


def _draw_box(shape: tuple[int, ...], crop_size: Size, rng: np.random.Generator) -> Box:
    top = int(rng.integers(0, max(shape[0] - crop_size[0], 0) + 1))
    left = int(rng.integers(0, max(shape[1] - crop_size[1], 0) + 1))
    return slice(top, top + crop_size[0]), slice(left, left + crop_size[1])


def _flip(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # many times faster than NumPy's view with a negative stride is to read
    return cv2.flip(array, 1).astype(np.uint8, copy=False)


def photometric_distortion(image: Image, rng: np.random.Generator) -> Image:
    """Random brightness, contrast, saturation, hue of uint8 BGR [H,W,3]: see `draw_colours`."""
    return distort(image, draw_colours(rng))


def draw_colours(rng: np.random.Generator) -> Colours:
    """Draws brightness, contrast, saturation and hue, each none half of the time.

    Contrast comes second in mode 1 and last in mode 0, each half of the time.
    """
    brightness = rng.uniform(-32, 32) if rng.integers(2) else 0
    is_early = rng.integers(2) == 1
    early = _contrast(rng) if is_early else 1
    saturation = rng.uniform(0.5, 1.5) if rng.integers(2) else 0
    # the upper end is excluded: shifts of -18..17, in OpenCV's half degrees
    hue = int(rng.integers(-18, 18)) % 180 if rng.integers(2) else -1
    late = 1 if is_early else _contrast(rng)
    return Colours(brightness, early, saturation, hue, late)


def _contrast(rng: np.random.Generator) -> float:
    return rng.uniform(0.5, 1.5) if rng.integers(2) else 1


def distort(image: Image, colours: Colours) -> Image:
    """uint8 BGR [H,W,3] distorted; equal to mmsegmentation's, for equal draws.

    Every step clips to 0..255 and cuts the fraction off; saturation and hue each go through 8-bit
    HSV and back.
    """
    table = _truncated(_GREYS + np.float32(colours.brightness))
    image = _apply(image, _truncated(table * np.float32(colours.early_contrast)))
    if colours.saturation > 0:
        image = _apply_in_hsv(image, 1, _truncated(_GREYS * np.float32(colours.saturation)))
    if colours.hue >= 0:
        shifted = (np.arange(256) + int(colours.hue)) % 180
        image = _apply_in_hsv(image, 0, shifted.astype(np.uint8))
    return _apply(image, _truncated(_GREYS * np.float32(colours.late_contrast)))


def _apply(image: Image, table: Table) -> Image:
    # a function of one 8-bit value is a table of 256: same result, far fewer operations
    return (
        image
        if np.array_equal(table, _SAME)
        else cv2.LUT(image, table).astype(np.uint8, copy=False)
    )


def _apply_in_hsv(image: Image, channel: int, table: Table) -> Image:
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR).astype(np.uint8, copy=False)


def _truncated(values: NDArray[np.float32]) -> Table:
    return np.clip(values, 0, 255).astype(np.uint8)


def normalise(image: Image) -> NDArray[np.float32]:
    """uint8 BGR [H,W,3] -> float32 RGB [3,H,W], (value - MEAN) / STD computed in float32.

    Bit for bit what mmsegmentation gets, 0.x from OpenCV and 1.x from PyTorch.
    """
    planes = np.empty((3, *image.shape[:2]), dtype=np.float32)
    for channel, values in enumerate(reversed(cv2.split(image))):
        table = (_GREYS - np.float32(MEAN[channel])) / np.float32(STD[channel])
        cv2.LUT(values, table, dst=planes[channel])
    return planes


def denormalise(pixels: torch.Tensor) -> Image:
    """What `normalise` made, float [3,H,W] on any device -> uint8 RGB [H,W,3], for pictures."""
    planes = pixels.detach().float().cpu().numpy()
    values = planes.transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def pad(array: NDArray[T], size: Size, value: float) -> NDArray[T]:
    """[...,H,W] continued to the right and below with `value` up to (height, width) `size`."""
    h, w = array.shape[-2:]
    if (h, w) == size:
        return array
    padded = np.full((*array.shape[:-2], *size), value, dtype=array.dtype)
    padded[..., :h, :w] = array
    return padded
