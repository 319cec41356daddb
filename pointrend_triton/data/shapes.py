"""Shapes: an embedded, endless data set of drawn scenes, for trainings that need no download.

What is in a picture is easy to tell, where it ends is not: spikes, teeth, wires and wavy borders of
two to six pixels are lost on a grid of every fourth pixel and have to be refined. Picture number i
of a split is always the same, and image and label come from the same outlines.

    python -m pointrend_triton.data.shapes OUT.png      draws some pictures and their labels
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pointrend_triton.data.base import SegmentationDataset
from pointrend_triton.data.io import IGNORE, DataError

SPLITS = ("train", "val", "test")

# outlines are rasterised this much finer, so that label borders are exact and image borders soft
FINE = 4

Points = NDArray[np.float64]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Outline:
    """Closed polygons, filled even-odd, or open lines of a stroke width; pixels about (0, 0)."""

    lines: list[Points]
    stroke: float | None = None


def blob(rng: np.random.Generator) -> Outline:
    """A disc with a wavy border."""
    angle = _angles(72)
    wave = 0.16 * np.sin(rng.integers(2, 5) * angle + rng.uniform(0, 6.3))
    ripple = 0.07 * np.sin(rng.integers(9, 15) * angle + rng.uniform(0, 6.3))
    return Outline([_polar(angle, rng.uniform(10, 19) * (1 + wave + ripple), rng.uniform(0.6, 1))])


def star(rng: np.random.Generator) -> Outline:
    """A disc with long, uneven spikes."""
    spikes = int(rng.integers(7, 12))
    outer = rng.uniform(13, 22)
    radius = np.empty(2 * spikes)
    radius[0::2] = outer * rng.uniform(0.75, 1.1, spikes)
    radius[1::2] = outer * rng.uniform(0.42, 0.55, spikes)
    return Outline([_polar(_angles(2 * spikes), radius, 1.0)])


def wire(rng: np.random.Generator) -> Outline:
    """A bent line two to four pixels wide."""
    x = np.linspace(-1, 1, 24)
    bend = rng.uniform(-14, 14) * x**2 + rng.uniform(-8, 8) * x**3
    return Outline([np.stack([rng.uniform(22, 48) * x, bend], axis=1)], stroke=rng.uniform(2, 4))


def ring(rng: np.random.Generator) -> Outline:
    """An annulus, its hole off the centre."""
    outer, thickness, squash = rng.uniform(10, 18), rng.uniform(3, 5.5), rng.uniform(0.7, 1)
    hole = _polar(_angles(48), outer - thickness, squash) + rng.uniform(-1, 1, 2)
    return Outline([_polar(_angles(48), outer, squash), hole])


def ribbon(rng: np.random.Generator) -> Outline:
    """A wavy band five to eight pixels wide."""
    x = np.linspace(-1, 1, 40)
    wave = rng.uniform(5, 9) * np.sin(rng.uniform(5, 8) * x + rng.uniform(0, 6.3))
    return Outline([np.stack([rng.uniform(22, 38) * x, wave], axis=1)], stroke=rng.uniform(5, 8))


def comb(rng: np.random.Generator) -> Outline:
    """A bar with teeth, and gaps, of three to six pixels."""
    tooth, gap = rng.uniform(3, 6, 2)
    count = int(rng.uniform(24, 44) / (tooth + gap)) + 1
    back, length = rng.uniform(5, 9), rng.uniform(9, 17)
    left = np.arange(count) * (tooth + gap)
    ends = np.stack([left, left, left + tooth, left + tooth], axis=1).ravel()
    depth = np.tile([0, length, length, 0], count) + back
    teeth = np.stack([ends, depth], axis=1)
    points = np.concatenate([[[0, 0]], teeth, [[ends[-1], 0]]])
    return Outline([points - points.mean(axis=0)])


def shard(rng: np.random.Generator) -> Outline:
    """A triangle with one saw-toothed side."""
    corners = rng.uniform(12, 22) * _unit(_angles(3) + rng.uniform(-0.45, 0.45, 3)).T
    steps = 2 * int(rng.integers(3, 6))
    t = np.linspace(0, 1, steps + 1)[:, None]
    side = corners[0] * (1 - t) + corners[1] * t
    inward = -(corners[0] + corners[1]) / np.linalg.norm(corners[0] + corners[1])
    side[1::2] += inward * rng.uniform(4, 8)
    return Outline([np.concatenate([side, corners[2:]])])


@dataclass(frozen=True)
class Kind:
    """A class: its outline, mean colour (BGR) and texture; its colour in label pictures (RGB)."""

    name: str
    outline: Callable[[np.random.Generator], Outline] | None
    colour: tuple[int, int, int]
    texture: str
    shown: tuple[int, int, int]


KINDS = (
    Kind("ground", None, (105, 120, 110), "clouds", (40, 40, 48)),
    Kind("blob", blob, (70, 90, 190), "spots", (214, 69, 65)),
    Kind("star", star, (60, 185, 205), "plain", (247, 202, 24)),
    Kind("wire", wire, (45, 40, 50), "plain", (245, 245, 245)),
    Kind("ring", ring, (190, 130, 60), "stripes", (52, 152, 219)),
    Kind("ribbon", ribbon, (150, 70, 165), "stripes", (155, 89, 182)),
    Kind("comb", comb, (80, 165, 75), "grain", (46, 204, 113)),
    Kind("shard", shard, (200, 205, 195), "grain", (230, 126, 34)),
)


class Shapes(SegmentationDataset):
    """`length` pictures of `size` (height, width), drawn when they are asked for; eight classes."""

    name = "shapes"
    classes = tuple(kind.name for kind in KINDS)
    palette = np.array([kind.shown for kind in KINDS], dtype=np.uint8)

    def __init__(self, split: str, length: int, size: tuple[int, int] = (128, 128)) -> None:
        if split not in SPLITS:
            raise DataError(f"shapes has no split {split!r}; it has {', '.join(SPLITS)}")
        self.split, self.length, self.size = split, length, size

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> tuple[Image, Image]:
        if not 0 <= index < self.length:
            raise IndexError(f"shapes:{self.split} has {self.length} pictures, no number {index}")
        # the first number keeps these draws apart from other users of small seeds
        return draw_scene(self.size, np.random.default_rng([1912, SPLITS.index(self.split), index]))

    def stem(self, index: int) -> str:
        return f"shapes_{self.split}_{index:05d}"

    def files(self, index: int) -> str:
        return f"shapes:{self.split}:{index}"


def draw_scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[Image, Image]:
    """Image uint8 BGR [H,W,3] and label uint8 [H,W], about one object for every 1500 pixels."""
    height, width = size
    image = _texture("clouds", size, _vary(KINDS[0].colour, 25, rng), rng)
    label = np.zeros(size, dtype=np.uint8)
    for _ in range(max(2, round(height * width / 1500 * rng.uniform(0.8, 1.2)))):
        index = int(rng.integers(1, len(KINDS)))
        _draw_object(image, label, index, rng)
    return _light(image, rng), label


def _draw_object(
    image: NDArray[np.float32], label: Image, index: int, rng: np.random.Generator
) -> None:
    """Paint an object of class `index` over `image` (float32 BGR) and `label` at a random place."""
    kind = KINDS[index]
    assert kind.outline is not None
    outline = kind.outline(rng)
    cosine, sine = _unit(rng.uniform(0, 2 * np.pi))
    turn = np.array([[cosine, sine], [-sine, cosine]])
    height, width = label.shape
    centre = rng.uniform((0, 0), (width, height))
    lines = [line @ turn + centre for line in outline.lines]
    reach = 3 + (outline.stroke or 0)
    every = np.concatenate(lines)
    x0, y0 = np.maximum(np.floor(every.min(axis=0) - reach), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(every.max(axis=0) + reach), (width, height)).astype(int)
    if x1 <= x0 or y1 <= y0:
        return
    cover = _coverage([line - (x0, y0) for line in lines], outline.stroke, (y1 - y0, x1 - x0))
    paint = _texture(kind.texture, cover.shape, _vary(kind.colour, 18, rng), rng)
    area = image[y0:y1, x0:x1]
    area += (paint - area) * cover[..., None]
    label[y0:y1, x0:x1][cover >= 0.5] = index
    if rng.random() < 0.12:
        grown = cv2.dilate(cover, np.ones((3, 3), np.uint8))
        label[y0:y1, x0:x1][(grown > 0.05) & (cover < 0.5)] = IGNORE


def _coverage(
    lines: list[Points], stroke: float | None, size: tuple[int, int]
) -> NDArray[np.float32]:
    """The share, 0..1, of every pixel of a (height, width) canvas that lies inside the outline."""
    canvas = np.zeros((size[0] * FINE, size[1] * FINE), dtype=np.uint8)
    # pixel i of the fine canvas has its centre at (i + 0.5) / FINE; 4 fractional bits
    points = [np.rint((line * FINE - 0.5) * 16).astype(np.int32) for line in lines]
    if stroke is None:
        cv2.fillPoly(canvas, points, 255, shift=4)
    else:
        cv2.polylines(canvas, points, False, 255, max(round(stroke * FINE), 1), shift=4)
    share = cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA)
    return share.astype(np.float32) * np.float32(1 / 255)


def _texture(
    kind: str, size: tuple[int, int], colour: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """A float32 BGR picture [H,W,3] around `colour`."""
    height, width = size
    if kind == "clouds":
        coarse = rng.normal(0, 16, (height // 24 + 2, width // 24 + 2, 3)).astype(np.float32)
        return colour + cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    if kind == "spots":
        relief = cv2.blur(rng.normal(0, 45, size).astype(np.float32), (3, 3))
    elif kind == "grain":
        relief = rng.normal(0, 16, size).astype(np.float32)
    elif kind == "stripes":
        along, across = _unit(rng.uniform(0, np.pi)) / rng.uniform(0.6, 1.1)
        phase = np.arange(height)[:, None] * along + np.arange(width) * across
        relief = (20 * np.sin(phase)).astype(np.float32)
    else:
        relief = np.zeros(size, np.float32)
    return colour + relief[..., None]


def _light(image: NDArray[np.float32], rng: np.random.Generator) -> Image:
    """Uneven light and sensor noise; float32 BGR [H,W,3] -> uint8."""
    height, width = image.shape[:2]
    down, right = rng.uniform(-0.22, 0.22, 2)
    light = 1 + down * np.linspace(-1, 1, height)[:, None] + right * np.linspace(-1, 1, width)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(3, 9))
    return np.clip(image * light[..., None].astype(np.float32) + noise, 0, 255).astype(np.uint8)


def _vary(
    colour: tuple[int, int, int], spread: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    # a common shift in brightness and a smaller one in hue
    shift = rng.normal(0, spread) + rng.normal(0, 0.6 * spread, 3)
    return (np.array(colour) + shift).astype(np.float32)


def _angles(count: int) -> NDArray[np.float64]:
    return np.linspace(0, 2 * np.pi, count, endpoint=False)


def _unit(angle: float | NDArray[np.float64]) -> NDArray[np.float64]:
    radians = np.asarray(angle, dtype=np.float64)
    return np.stack([np.cos(radians), np.sin(radians)])


def _polar(
    angle: NDArray[np.float64], radius: float | NDArray[np.float64], squash: float
) -> Points:
    cosine, sine = _unit(angle)
    return np.stack([radius * cosine, radius * sine * squash], axis=1)


def contact_sheet(dataset: SegmentationDataset, count: int) -> Image:
    """The first `count` pictures, each beside its label in colours (255 is pink); uint8 BGR."""
    colours = np.full((256, 3), (203, 100, 255), dtype=np.uint8)
    colours[: len(dataset.classes)] = dataset.palette[:, ::-1]
    pairs = [np.hstack([image, colours[label]]) for image, label in map(dataset.load, range(count))]
    columns = 3
    rows = [np.hstack(pairs[i : i + columns]) for i in range(0, count - columns + 1, columns)]
    return np.vstack(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pointrend_triton.data.shapes OUT.png")
    sheet = contact_sheet(Shapes("train", 15), 15)
    if not cv2.imwrite(
        sys.argv[1], cv2.resize(sheet, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    ):
        sys.exit(f"{sys.argv[1]}: cannot be written")
