"""The published training and test pipelines, on NumPy arrays with an explicit random generator.

Steps, order and quirks are those of mmsegmentation 0.x; equal random draws give equal pictures.
"""

from __future__ import annotations

from typing import TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pointrend_triton.config import DataConfig
from pointrend_triton.data.io import IGNORE

Image = NDArray[np.uint8]
Label = NDArray[np.uint8]
Size = tuple[int, int]
T = TypeVar("T", bound=np.generic)

# ImageNet's mean and standard deviation, RGB, in grey levels
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

MULTI_SCALE_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

_GREYS = np.arange(256, dtype=np.float32)


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
        data = self.data
        size = rescale_size(image.shape[:2], data.scale, data.scale_range, rng)
        image = resize(image, size, cv2.INTER_LINEAR)
        label = resize(label, size, cv2.INTER_NEAREST)
        box = random_crop_box(label, data.crop_size, data.crop_max_share, rng)
        image, label = image[box], label[box]
        if rng.random() < data.flip_probability:
            image, label = image[:, ::-1], label[:, ::-1]
        image = np.ascontiguousarray(image)
        if data.photometric:
            image = photometric_distortion(image, rng)
        pixels = pad(normalise(image), data.crop_size, 0)
        classes = pad(label, data.crop_size, IGNORE).astype(np.int64)
        return torch.from_numpy(pixels), torch.from_numpy(classes)


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

    `scale` bounds the longer and the shorter side, in either order; small pictures grow.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


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


def random_crop_box(
    label: Label, crop_size: Size, max_share: float, rng: np.random.Generator
) -> tuple[slice, slice]:
    """Where to crop: rows and columns of at most `crop_size`, all of a side that is smaller.

    A box is drawn again, up to ten times, unless it holds two classes or more and the commonest has
    less than `max_share` of its pixels, ignored ones not counted. The eleventh box is taken
    unchecked; a `max_share` of 1 checks nothing.
    """
    box = _draw_box(label.shape, crop_size, rng)
    if max_share < 1:
        for _ in range(10):
            counts = np.bincount(label[box].ravel(), minlength=IGNORE)[:IGNORE]
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_share:
                break
            box = _draw_box(label.shape, crop_size, rng)
    return box


def _draw_box(
    shape: tuple[int, ...], crop_size: Size, rng: np.random.Generator
) -> tuple[slice, slice]:
    top = int(rng.integers(0, max(shape[0] - crop_size[0], 0) + 1))
    left = int(rng.integers(0, max(shape[1] - crop_size[1], 0) + 1))
    return slice(top, top + crop_size[0]), slice(left, left + crop_size[1])


def photometric_distortion(image: Image, rng: np.random.Generator) -> Image:
    """Random brightness, contrast, saturation, hue of uint8 BGR [H,W,3], each half of the time.

    Contrast comes second in mode 1 and last in mode 0, each half of the time. Every step clips to
    0..255 and cuts the fraction off; saturation and hue each go through 8-bit HSV and back.
    """
    if rng.integers(2):
        image = _apply(image, _GREYS + np.float32(rng.uniform(-32, 32)))
    contrast_first = rng.integers(2) == 1
    if contrast_first:
        image = _random_contrast(image, rng)
    if rng.integers(2):
        image = _apply_in_hsv(image, 1, _truncated(_GREYS * np.float32(rng.uniform(0.5, 1.5))))
    if rng.integers(2):
        # the upper end is excluded: shifts of -18..17, in OpenCV's half degrees
        shifted = (np.arange(256) + rng.integers(-18, 18)) % 180
        image = _apply_in_hsv(image, 0, shifted.astype(np.uint8))
    if not contrast_first:
        image = _random_contrast(image, rng)
    return image


def _random_contrast(image: Image, rng: np.random.Generator) -> Image:
    return _apply(image, _GREYS * np.float32(rng.uniform(0.5, 1.5))) if rng.integers(2) else image


def _apply(image: Image, values: NDArray[np.float32]) -> Image:
    # a function of one 8-bit value is a table of 256: same result, far fewer operations
    return cv2.LUT(image, _truncated(values)).astype(np.uint8, copy=False)


def _apply_in_hsv(image: Image, channel: int, table: NDArray[np.uint8]) -> Image:
    tables = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    tables[0, :, channel] = table
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), tables)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR).astype(np.uint8, copy=False)


def _truncated(values: NDArray[np.float32]) -> NDArray[np.uint8]:
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
