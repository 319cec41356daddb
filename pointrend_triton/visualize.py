"""Pictures of segmentations: NumPy arrays in, uint8 RGB [H,W,3] out."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

IGNORE = 255
RED = (230, 25, 40)
BLACK = (0, 0, 0)
GREY = (60, 60, 60)
YELLOW = (255, 225, 25)
TITLE_HEIGHT = 24
GAP = 4
# a tile narrower than this is enlarged by whole factors, so that single pixels can be seen
MIN_TILE_WIDTH = 320
# a wider tile is shrunk to this: eight tiles of full size would choke TensorBoard
MAX_TILE_WIDTH = 512

Image = npt.NDArray[np.uint8]
ClassMap = npt.NDArray[np.integer]
Color = tuple[int, int, int]


def colorize(label: ClassMap, palette: Image, ignore_color: Color = BLACK) -> Image:
    """The colour of each pixel's class: label [H,W] and palette RGB [C,3] -> [H,W,3].

    Pixels of 255 get `ignore_color`. Raises ValueError for a class that the palette lacks.
    """
    palette = np.asarray(palette, np.uint8)
    ignored = label == IGNORE
    unknown = ~ignored & ((label < 0) | (label >= len(palette)))
    if unknown.any():
        value = int(label[unknown][0])
        raise ValueError(f"label holds class {value}; palette has {len(palette)} colours")
    picture = palette[np.where(ignored, 0, label)]
    picture[ignored] = ignore_color
    return picture


def overlay(image: Image, label: ClassMap, palette: Image, alpha: float = 0.5) -> Image:
    """Class colours laid over an image [H,W,3], `alpha` (0..1) their share.

    Ignored pixels show the image. Raises ValueError for another size or alpha.
    """
    _check_same_size("label", label, image)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be within 0 and 1, not {alpha}")
    mixed = (1 - alpha) * image + alpha * colorize(label, palette)
    return np.where((label == IGNORE)[..., None], image, np.rint(mixed)).astype(np.uint8)


def error_map(prediction: ClassMap, truth: ClassMap, image: Image | None = None) -> Image:
    """Wrong pixels red over the darkened image (or black); where the truth is ignored, grey.

    Both maps [H,W], image [H,W,3] -> [H,W,3].
    """
    _check_same_size("prediction", prediction, truth)
    if image is None:
        picture = np.zeros((*truth.shape, 3), np.uint8)
    else:
        _check_same_size("truth", truth, image)
        picture = image // 3
    ignored = truth == IGNORE
    picture[(prediction != truth) & ~ignored] = RED
    picture[ignored] = GREY
    return picture


def uncertainty_heatmap(uncertainty: npt.NDArray[np.floating]) -> Image:
    """Scores [H,W], higher is less certain (PointRend's are at most 0), as dark blue to yellow.

    The lowest and the highest finite score span the colours; an infinity takes the end on its side,
    NaN the top, since selection ranks it first.
    """
    scores = np.asarray(uncertainty, np.float64)
    if scores.ndim != 2:
        raise ValueError(f"uncertainty must be [H,W], not of shape {scores.shape}")
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scores = np.clip(np.nan_to_num(scores, nan=high, posinf=high, neginf=low), low, high)
    span = high - low if high > low else 1.0
    levels = np.rint(255 * (scores - low) / span).astype(np.uint8)
    return _rgb(cv2.applyColorMap(levels, cv2.COLORMAP_CIVIDIS))


def draw_points(
    image: Image, coords: npt.NDArray[np.floating], color: Color = YELLOW, radius: int = 0
) -> Image:
    """A copy of the image [H,W,3] with points drawn: coords [k,2] are (x, y) in 0..1.

    `radius` in pixels: 0 paints the one pixel that holds the point. A coordinate of 1.0 lies in the
    last pixel; points outside 0..1 are an error (ValueError).
    """
    coords = np.asarray(coords, np.float64)
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise ValueError(f"coords must be [k,2], not of shape {coords.shape}")
    if not ((coords >= 0) & (coords <= 1)).all():
        raise ValueError("coords must be within 0 and 1")
    height, width = image.shape[:2]
    columns = np.minimum((coords[:, 0] * width).astype(int), width - 1)
    rows = np.minimum((coords[:, 1] * height).astype(int), height - 1)
    points = np.zeros((height, width), np.uint8)
    points[rows, columns] = 1
    if radius > 0:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        points = np.asarray(cv2.dilate(points, disc), np.uint8)
    picture = image.copy()
    picture[points > 0] = color
    return picture


def panel(images: Sequence[Image], titles: Sequence[str], columns: int | None = None) -> Image:
    """Images [H_i,W_i,3] side by side on white, each under its title; a new row after `columns`.

    Raises ValueError unless there is one title for each image, and at least one image.
    """
    if len(images) != len(titles) or not images:
        raise ValueError(f"panel needs one title per image, not {len(titles)} for {len(images)}")
    tiles = [
        np.concatenate([_title(title, image.shape[1]), image])
        for image, title in zip(images, titles, strict=True)
    ]
    columns = columns or len(tiles)
    rows = [_join(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return _join([row.transpose(1, 0, 2) for row in rows]).transpose(1, 0, 2)


def example_panel(
    image: Image,
    truth: ClassMap,
    coarse: ClassMap,
    refined: ClassMap,
    coords: npt.NDArray[np.floating],
    uncertainty: npt.NDArray[np.floating],
    palette: Image,
) -> Image:
    """One image's story in two rows: what was asked and answered; which points, which errors.

    image [H,W,3]; truth, coarse, refined [H,W]; coords [k,2] (x, y) in 0..1, the points that were
    computed again; uncertainty [h,w] of any size, of the coarse logits; palette [C,3]. Small images
    are enlarged pixel by pixel, large ones shrunk.
    """
    for name, classes in {"truth": truth, "coarse": coarse, "refined": refined}.items():
        _check_same_size(name, classes, image)
    height, width = image.shape[:2]
    if width > MAX_TILE_WIDTH:
        # before anything is drawn, so that a point keeps a whole pixel
        size = max(1, round(height * MAX_TILE_WIDTH / width)), MAX_TILE_WIDTH
        image = np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)
        truth, coarse, refined = (_nearest(classes, size) for classes in (truth, coarse, refined))
    heat = cv2.resize(uncertainty_heatmap(uncertainty), image.shape[1::-1])
    tiles = {
        "image": image,
        "truth": colorize(truth, palette),
        "coarse": colorize(coarse, palette),
        "refined": colorize(refined, palette),
        "coarse uncertainty": np.asarray(heat, np.uint8),
        "refined points": draw_points(image // 2, coords),
        "coarse errors": error_map(coarse, truth, image),
        "refined errors": error_map(refined, truth, image),
    }
    factor = -(-MIN_TILE_WIDTH // image.shape[1])
    enlarged = [tile.repeat(factor, axis=0).repeat(factor, axis=1) for tile in tiles.values()]
    return panel(enlarged, list(tiles), columns=4)


def save_png(path: str | os.PathLike[str], rgb: npt.NDArray[np.uint8]) -> None:
    """Write [H,W,3] RGB, or [H,W] as it is, to a PNG file; folders are made.

    The file appears whole or not at all. Raises ValueError if `path` does not end in .png, OSError
    if it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as .png")
    ok, data = cv2.imencode(".png", rgb if rgb.ndim == 2 else _rgb(rgb))
    if not ok:
        raise ValueError(f"{path}: an array of {rgb.dtype} and shape {rgb.shape} is no picture")
    write_atomic(path, data.tobytes())


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that is never there by half, not even after an interrupt; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this thread alone, and short where the name is as long as names may be
    draft = path.with_name(f".{path.name[:40]}.{threading.get_native_id()}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _join(tiles: Sequence[Image]) -> Image:
    """Tiles [H_i,W_i,3] from left to right, a gap between them, white below the shorter ones."""
    height = max(tile.shape[0] for tile in tiles)
    width = sum(tile.shape[1] + GAP for tile in tiles) - GAP
    picture = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for tile in tiles:
        picture[: tile.shape[0], left : left + tile.shape[1]] = tile
        left += tile.shape[1] + GAP
    return picture


def _nearest(classes: ClassMap, size: tuple[int, int]) -> ClassMap:
    """A class map [H,W] of any integer type at (height, width) `size`; OpenCV lacks int64."""
    rows, columns = (
        np.arange(new) * old // new for new, old in zip(size, classes.shape, strict=True)
    )
    return classes[np.ix_(rows, columns)]


def _title(text: str, width: int) -> Image:
    """A white strip [TITLE_HEIGHT,width,3] with centred text, smaller where it would not fit."""
    strip = np.full((TITLE_HEIGHT, width, 3), 255, np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.55
    (extent, _), _ = cv2.getTextSize(text, font, scale, 1)
    if extent > width - 4:
        scale *= max(width - 4, 1) / extent
    (extent, rise), _ = cv2.getTextSize(text, font, scale, 1)
    origin = ((width - extent) // 2, (TITLE_HEIGHT + rise) // 2)
    cv2.putText(strip, text, origin, font, scale, BLACK, 1, cv2.LINE_AA)
    return strip


def _rgb(bgr: npt.NDArray[np.generic]) -> Image:
    """Swap the first and the last channel; the way back is the same."""
    return np.ascontiguousarray(bgr[..., ::-1], np.uint8)


def _check_same_size(
    name: str, one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]
) -> None:
    if one.shape[:2] != other.shape[:2]:
        raise ValueError(f"{name} is {one.shape[:2]}, the map beside it {other.shape[:2]}")
