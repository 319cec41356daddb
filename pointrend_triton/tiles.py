"""Pictures too large for one pass: overlapping tiles, their probabilities blended.

A tile's share falls off linearly towards those of its edges that lie inside the picture, where the
network knows least of what surrounds a pixel, so that no seam shows. Only a band of probabilities,
as high as one tile, is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from pointrend_triton import reference
from pointrend_triton.config import ModelConfig

# neighbours share a quarter of a tile, at least so many pixels (but no more than half of a tile)
MIN_OVERLAP = 128
# what `choices` offers below the whole picture
TILES = (2048, 1024, 512, 256)

# Bytes that a pass needs for each pixel of its input and, more, for each pixel and class. Measured
# in fp32 on a CPU, at 512x1024, as growth of the process: 19 classes 431 and 458, 150
# classes 1868 and 2011, the more of a pass for labels and of one for blending.
BYTES_PER_PIXEL, BYTES_PER_CLASS = 250, 12
# rows that are resampled at a time
CHUNK = 64

# rows and columns
Box = tuple[slice, slice]


def starts(length: int, tile: int) -> list[int]:
    """Where the tiles of a side begin: spread evenly, the first at 0, the last at length - tile."""
    if length <= tile:
        return [0]
    overlap = min(max(tile // 4, MIN_OVERLAP), tile // 2)
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def shares(length: int, tile: int) -> list[Tensor]:
    """Of each tile of a side, its share in each of its pixels: float32 [n], above 0.

    Over the tiles they add up to 1 everywhere.
    """
    first, size = starts(length, tile), min(tile, length)
    ramps = torch.ones(len(first), size)
    steps = torch.arange(size) + 0.5
    for i, (one, other) in enumerate(pairwise(first)):
        ramp = (steps / (one + size - other)).clamp(max=1)
        ramps[i + 1] *= ramp
        ramps[i] *= ramp.flip(0)
    total = torch.zeros(length)
    for start, ramp in zip(first, ramps, strict=True):
        total[start : start + size] += ramp
    return [ramp / total[start : start + size] for start, ramp in zip(first, ramps, strict=True)]


def blend(
    probabilities: Callable[[Box], Tensor], height: int, width: int, tile: int
) -> Iterator[tuple[int, Tensor]]:
    """The blended maps of all tiles, in bands from top to bottom.

    Args:
        probabilities: maps a box to float32 [K, rows, columns].
        height, width: of the picture.

    Yields:
        a row of the picture and the band [K, n, width] that begins there; its first row is the last
        one of the band before. A band is valid until the next one is asked for.
    """
    tops, lefts = starts(height, tile), starts(width, tile)
    row_shares, column_shares = shares(height, tile), shares(width, tile)
    rows, columns = min(tile, height), min(tile, width)
    band: Tensor | None = None
    for i, top in enumerate(tops):
        for left, column_share in zip(lefts, column_shares, strict=True):
            maps = probabilities((slice(top, top + rows), slice(left, left + columns)))
            if band is None:
                # row 0 is for the last row of the band before
                band = maps.new_zeros(len(maps), rows + 1, width)
            share = row_shares[i][:, None] * column_share
            band[:, 1:, left : left + columns] += maps * share.to(maps.device)
        assert band is not None
        done = (tops[i + 1] if i + 1 < len(tops) else height) - top
        yield (0, band[:, 1 : done + 1]) if top == 0 else (top - 1, band[:, : done + 1])
        # what lies below is shared with the next tiles
        band[:, : rows + 1 - done] = band[:, done:].clone()
        band[:, rows + 1 - done :] = 0


def labels(
    logits: Callable[[Box], Tensor], height: int, width: int, tile: int, size: tuple[int, int]
) -> Tensor:
    """The class of each pixel by the blended probabilities, resampled to `size`.

    Args:
        logits: maps a box of the network's input to [C, rows, columns].
        height, width: of the network's input.
        tile: length of a tile's sides; where the input is shorter, the tiles are.
        size: (height, width) of the result.

    Returns:
        labels [h, w] on the CPU: uint8 up to 256 classes, else int64; with one class, 1 where its
        probability is above a half.
    """

    def probabilities(box: Box) -> Tensor:
        maps = logits(box).float()
        return maps.sigmoid() if len(maps) == 1 else maps.softmax(dim=0)

    result: Tensor | None = None
    for first, band in blend(probabilities, height, width, tile):
        for top, rows in _resampled(band, first, height, size):
            # what the logits mean: for one class, positive
            found = reference.logits_to_labels(rows - 0.5 if rows.shape[1] == 1 else rows)[0]
            if result is None:
                result = torch.empty(size, dtype=found.dtype)
            result[top : top + len(found)] = found.cpu()
    assert result is not None
    return result


def _resampled(
    band: Tensor, first: int, height: int, size: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """What a band has of the maps resampled bilinearly to `size`: rows and [1, K, n, w] from there.

    The band begins in row `first` of `height`. Output rows between two bands belong to the later
    one, which holds both of their neighbours.
    """
    end = first + band.shape[1]
    at = (torch.arange(size[0], dtype=torch.float64) + 0.5) * height / size[0] - 0.5
    at = at.clamp(0, height - 1)
    upper = at.long()
    lower = (upper + 1).clamp(max=height - 1)
    inside = torch.nonzero((upper >= first) & (lower < end))[:, 0]
    # splitting nothing gives one empty part
    for rows in inside.split(CHUNK) if len(inside) else ():
        weight = (at - upper)[rows].float().to(band.device)[:, None]
        above, below = (band[:, (i[rows] - first).to(band.device)] for i in (upper, lower))
        maps = above.lerp(below, weight)[None]
        yield int(rows[0]), reference.resample(maps, (len(rows), size[1]))


def choices(
    config: ModelConfig, height: int, width: int, memory: int, dtype: torch.dtype
) -> tuple[int, ...]:
    """Tiles to try in turn, the largest first: those expected to fit into `memory` bytes.

    One at least as long as the picture is the whole picture.
    """
    longest = max(height, width)
    sizes = (longest, *(tile for tile in TILES if tile < longest))
    fitting = [tile for tile in sizes if bytes_needed(config, height, width, tile, dtype) <= memory]
    return tuple(fitting) or sizes[-1:]


def bytes_needed(
    config: ModelConfig, height: int, width: int, tile: int, dtype: torch.dtype
) -> int:
    """An estimate of what `labels` needs beside the weights and the picture."""
    pixel = BYTES_PER_PIXEL * dtype.itemsize // 4 + BYTES_PER_CLASS * config.num_classes
    rows, columns = min(tile, height), min(tile, width)
    band = 0 if tile >= max(height, width) else 4 * config.num_classes * rows * width
    # the band's lower part is copied when it moves on
    return pixel * rows * columns + band * 3 // 2
