"""Device functions that kernels share: where points lie on a map, in `grid_sample`'s arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position(coordinate, size, ALIGN: tl.constexpr):
    """A coordinate in [0, 1] -> its place on the axis of cell indices, rounded as torch rounds."""
    grid = 2.0 * coordinate - 1.0
    if ALIGN:
        return (grid + 1.0) * 0.5 * (size - 1)
    return ((grid + 1.0) * size - 1.0) * 0.5


@triton.jit
def linear_taps(coordinate, size, ALIGN: tl.constexpr, BORDER: tl.constexpr):
    """The two cells about a coordinate: value = (1 - fraction) * low + fraction * (low + 1).

    A coordinate that is not finite is beyond the map, as `grid_sample` has it on CUDA.

    Returns:
        index of the lower cell int32 (-1 to size - 1), fraction (0 where neither cell is on the
        map), whether the lower cell is on the map, whether the upper one is.
    """
    place = position(coordinate, size, ALIGN)
    if BORDER:
        place = tl.where(place > 0.0, place, 0.0)  # NaN too goes to the first cell
        place = tl.where(place < size - 1, place, size - 1.0)
    low = tl.floor(place)
    has_low = (low >= 0) & (low < size)
    has_high = (low >= -1) & (low < size - 1)
    has_any = has_low | has_high
    # only what is on the map becomes an integer: elsewhere the conversion is undefined; and there
    # infinity minus infinity would be NaN, which a weight of nothing must not be
    index = tl.where(has_any, low, 0.0).to(tl.int32)
    return index, tl.where(has_any, place - low, 0.0), has_low, has_high


@triton.jit
def nearest_tap(coordinate, size, ALIGN: tl.constexpr, BORDER: tl.constexpr):
    """The cell nearest to a coordinate, halves to the even one.

    The launch needs enable_fp_fusion=False: fused, other points than torch's are ties.

    Returns:
        index int32, whether it is on the map.
    """
    place = position(coordinate, size, ALIGN)
    if BORDER:
        place = tl.where(place > 0.0, place, 0.0)
        place = tl.where(place < size - 1, place, size - 1.0)
    low = tl.floor(place)
    above = place - low
    is_odd = low != 2.0 * tl.floor(low * 0.5)
    nearest = tl.where((above > 0.5) | ((above == 0.5) & is_odd), low + 1.0, low)
    inside = (nearest >= 0) & (nearest < size)
    return tl.where(inside, nearest, 0.0).to(tl.int32), inside


@triton.jit
def cell_centre(index, width, step_x, step_y):
    """Flat cell index -> (x, y); step_x, step_y are 1 / width and 1 / height from the host."""
    x = step_x * 0.5 + (index % width).to(tl.float32) * step_x
    y = step_y * 0.5 + (index // width).to(tl.float32) * step_y
    return x, y
