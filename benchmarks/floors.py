"""The least work of each operation: every byte once, and the arithmetic of matrix products.

Sizes are named as in the benches; `size` is the bytes of an element of a map. Scores and
coordinates are fp32, indices int64, labels uint8. Sampling counts the cells that uniform points
touch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.inputs import Sizes


@dataclass(frozen=True)
class Work:
    """Bytes through device memory, operations of matrix products, and, where taps are read again
    and again, bytes through the L2 cache."""

    bytes: float
    flops: float = 0
    l2_bytes: float | None = None

    def __add__(self, other: Work) -> Work:
        l2 = None
        if self.l2_bytes is not None or other.l2_bytes is not None:
            l2 = (self.l2_bytes or 0) + (other.l2_bytes or 0)
        return Work(self.bytes + other.bytes, self.flops + other.flops, l2)


def both(forward: Work, backward: Work) -> dict[str, Work]:
    return {"forward": forward, "backward": backward, "both": forward + backward}


def touched(cells: int, points: int) -> float:
    """How many cells the four taps of uniform random points touch, on average."""
    return cells * -math.expm1(-4 * points / cells)


def sample(
    n: int, channels: int, cells: int, points: int, size: int, out: int, shared: bool = False
) -> dict[str, Work]:
    """Sampling [n, channels, cells] at points; `out` is the bytes of a sampled value."""
    coords = 8 * points * (1 if shared else n)
    read = n * channels * touched(cells, points) * size + coords
    values = n * channels * points
    taps = 4 * values * size
    return both(
        Work(read + values * out, l2_bytes=taps + values * out),
        # every cell of the gradient is written, four of them added to per point
        Work(values * out + coords + n * channels * cells * size, l2_bytes=taps + values * out),
    )


def select_points(n: int, channels: int, cells: int, points: int, size: int) -> Work:
    """The uncertain of 3 points candidates, and random ones."""
    read = n * (channels * touched(cells, 3 * points) * size + 3 * points * 8 + points / 4 * 8)
    return Work(read + n * points * 8)


def topk(n: int, cells: int, k: int) -> Work:
    """Scores in, indices and coordinates out."""
    return Work(n * (cells * 4 + k * 16))


def upsample(n: int, channels: int, cells: int, size: int, *, logits: bool, labels: bool) -> Work:
    """Twofold enlargement of [n, channels, cells] to scores and, as asked, logits and labels."""
    large = 4 * n * cells
    written = large * (4 + channels * size * logits + labels)
    return Work(n * channels * cells * size + written)


def head(sizes: Sizes, points: int, size: int) -> dict[str, Work]:
    """The MLP at points: F fine and C coarse channels, L layers of D, C classes.

    The backward reads the maps and the weights again and writes the gradients of all of them.
    """
    n, fine, classes, hidden = sizes["N"], sizes["F"], sizes["C"], sizes["D"]
    cells, coarse_cells = sizes["fh"] * sizes["fw"], sizes["H"] * sizes["W"]
    widths, width = [], fine + classes
    for out in [hidden] * sizes["L"] + [classes]:
        widths.append(width * out)
        width = out + classes
    weights = sum(widths) * size
    gathered = (
        n * size * (fine * touched(cells, points) + classes * touched(coarse_cells, points))
        + 8 * n * points
    )
    out = n * classes * points * size
    products = 2 * n * points * sum(widths)
    maps = n * size * (fine * cells + classes * coarse_cells)
    return both(
        Work(gathered + weights + out, products),
        Work(gathered + weights + out + maps + weights, 2 * products),
    )


def decode(n: int, channels: int, cells: int, pixels: int, size: int) -> Work:
    return Work(n * (channels * cells * size + pixels))


def refine(sizes: Sizes, size: int, *, output: str, pixels: int) -> Work:
    """Two steps with every intermediate map written once and read once, full-size logits only where
    they are the result.

    Labels at another size than the grid's read the map of the first step once more.
    """
    n, classes, cells, k = sizes["N"], sizes["C"], sizes["H"] * sizes["W"], sizes["k"]
    labels = output == "labels"
    on_grid = pixels == 16 * cells
    work = (
        upsample(n, classes, cells, size, logits=True, labels=False)
        + upsample(n, classes, 4 * cells, size, logits=not labels, labels=labels and on_grid)
        + topk(n, 4 * cells, min(k, 4 * cells))
        + topk(n, 16 * cells, min(k, 16 * cells))
        + head(sizes, min(k, 4 * cells), size)["forward"]
        + head(sizes, min(k, 16 * cells), size)["forward"]
    )
    if labels and not on_grid:
        work += decode(n, classes, 4 * cells, pixels, size)
    if not labels and not on_grid:
        work += Work(n * classes * (16 * cells + pixels) * size)
    return work
