"""Training crops of 8-bit pictures that lie in device memory: every step in one pass.

The roundings are those of OpenCV, as `pointrend_triton.reference.augment` has them: its resize
computes in fixed point with 11 bits of weight, its HSV with 12 bits on the way there and in fp32 on
the way back. No two operations may be fused, so that a float is rounded where OpenCV rounds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointrend_triton.kernels.launch import Constants, Kernel


@triton.jit
def _round(value):
    """The nearest whole number, halves to even, of fp32 below 2^22."""
    return (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: sums have no room for a fraction


@triton.jit
def _factor(size, whole):
    """The inverse of the factor by which a side is resized, in double precision."""
    return 1.0 / (whole.to(tl.float64) / size.to(tl.float64))


@triton.jit
def _taps(at, size, factor):
    """Cells of a line resized bilinearly: the lower and the upper one, and their weights / 2048."""
    place = ((at.to(tl.float64) + 0.5) * factor - 0.5).to(tl.float32)
    floor = tl.floor(place)
    share = place - floor
    low = floor.to(tl.int32)
    weight_low = _round((1.0 - share) * 2048.0).to(tl.int32)
    weight_high = _round(share * 2048.0).to(tl.int32)
    upper = tl.minimum(tl.maximum(low + 1, 0), size - 1)
    return tl.maximum(tl.minimum(low, size - 1), 0), upper, weight_low, weight_high


@triton.jit
def _mixed(a, b, c, d, wa, wb, wc, wd, SHIFT: tl.constexpr):
    """The grey level of a channel between four pixels: a and b above, c and d below."""
    upper = ((a >> SHIFT) & 255) * wa + ((b >> SHIFT) & 255) * wb
    lower = ((c >> SHIFT) & 255) * wa + ((d >> SHIFT) & 255) * wb
    return (((upper >> 4) * wc >> 16) + ((lower >> 4) * wd >> 16) + 2) >> 2


@triton.jit
def _truncated(value):
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _adjusted(grey, brightness, contrast):
    brighter = _truncated(grey.to(tl.float32) + brightness)
    return _truncated(brighter.to(tl.float32) * contrast)


@triton.jit
def _normalised(grey, contrast, mean, std):
    return tl.div_rn(_truncated(grey.to(tl.float32) * contrast).to(tl.float32) - mean, std)


@triton.jit
def _to_hsv(blue, green, red):
    """OpenCV's 8-bit HSV, hue in half degrees."""
    value = tl.maximum(tl.maximum(blue, green), red)
    spread = value - tl.minimum(tl.minimum(blue, green), red)
    by = tl.maximum(value, 1)
    saturation = (spread * ((2 * 255 * 4096 + by) // (2 * by)) + 2048) >> 12
    hue = tl.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = tl.where(value == red, green - blue, hue)
    by = tl.maximum(spread, 1)
    hue = (hue * ((2 * 30 * 4096 + by) // (2 * by)) + 2048) >> 12
    return tl.where(hue < 0, hue + 180, hue), saturation, value


@triton.jit
def _level(value, is_cut):
    level = value * 255.0
    return tl.where(is_cut, level, _round(level)).to(tl.int32)


@triton.jit
def _to_bgr(hue, saturation, value, is_cut):
    """Back from 8-bit HSV; OpenCV cuts the fraction off in some columns, and rounds in others."""
    turn = hue.to(tl.float32) * (6 / 180)
    sector = turn.to(tl.int32)
    share = turn - sector.to(tl.float32)
    weight = saturation.to(tl.float32) * (1 / 255)
    top = value.to(tl.float32) * (1 / 255)
    bottom = top * (1.0 - weight)
    share = tl.where((sector & 1) == 1, share, 1.0 - share)
    # rounded once, as by a fused multiply-add: the product is exact in double precision
    product = weight.to(tl.float64) * share.to(tl.float64)
    middle = top * (1.0 - product).to(tl.float32)
    blue = tl.where((sector == 2) | (sector == 5), middle, bottom)
    blue = tl.where((sector == 3) | (sector == 4), top, blue)
    green = tl.where((sector == 0) | (sector == 3), middle, bottom)
    green = tl.where((sector == 1) | (sector == 2), top, green)
    red = tl.where((sector == 1) | (sector == 4), middle, bottom)
    red = tl.where((sector == 0) | (sector == 5), top, red)
    return _level(blue, is_cut), _level(green, is_cut), _level(red, is_cut)


@triton.jit(do_not_specialize=["height", "width"])
def _augment(
    images,
    labels,
    pictures,
    places,
    colours,
    height,
    width,
    mean_r,
    mean_g,
    mean_b,
    std_r,
    std_g,
    std_b,
    BLOCK: tl.constexpr,
):
    """A run of BLOCK pixels of one row of one crop.

    Args:
        images: [B, 3, height, width] fp32 contiguous, written: red, green, blue.
        labels: [B, height, width] int64 contiguous, written.
        pictures: [pixels] int32: blue in the lowest byte, green, red, class.
        places: [B, 8] int64, and colours: [B, 5] fp32, as `ops.augment` has them.
    """
    blocks = tl.cdiv(width, BLOCK)
    line = tl.program_id(0) // blocks
    n = (line // height).to(tl.int64)
    y = line % height
    x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    places += n * 8
    start = tl.load(places)
    source_height = tl.load(places + 1).to(tl.int32)
    source_width = tl.load(places + 2).to(tl.int32)
    whole_height = tl.load(places + 3).to(tl.int32)
    whole_width = tl.load(places + 4).to(tl.int32)
    left = tl.load(places + 6).to(tl.int32)
    used_width = tl.minimum(whole_width - left, width)
    row = tl.load(places + 5).to(tl.int32) + y
    flipped = tl.load(places + 7) == 1
    column = left + tl.where(flipped, used_width - 1 - x, x)
    inside = (x < used_width) & (row < whole_height)

    factor_y = _factor(source_height, whole_height)
    factor_x = _factor(source_width, whole_width)
    upper, lower, wc, wd = _taps(row, source_height, factor_y)
    before, after, wa, wb = _taps(column, source_width, factor_x)
    # beyond the first and the last column OpenCV repeats that, with its whole weight
    wa = tl.where(before == after, 2048, wa)
    wb = tl.where(before == after, 0, wb)
    above = pictures + start + upper.to(tl.int64) * source_width
    below = pictures + start + lower.to(tl.int64) * source_width
    a = tl.load(above + before, inside, 0)
    b = tl.load(above + after, inside, 0)
    c = tl.load(below + before, inside, 0)
    d = tl.load(below + after, inside, 0)
    blue = _mixed(a, b, c, d, wa, wb, wc, wd, SHIFT=0)
    green = _mixed(a, b, c, d, wa, wb, wc, wd, SHIFT=8)
    red = _mixed(a, b, c, d, wa, wb, wc, wd, SHIFT=16)

    nearest_y = tl.minimum((row.to(tl.float64) * factor_y).to(tl.int32), source_height - 1)
    nearest_x = tl.minimum((column.to(tl.float64) * factor_x).to(tl.int32), source_width - 1)
    nearest = pictures + start + nearest_y.to(tl.int64) * source_width
    label = tl.load(nearest + nearest_x, inside, -1) >> 24 & 255  # 255 where nothing is loaded

    colours += n * 5
    brightness, early, saturation = tl.load(colours), tl.load(colours + 1), tl.load(colours + 2)
    hue, late = tl.load(colours + 3), tl.load(colours + 4)
    is_cut = x < used_width // 32 * 32
    blue = _adjusted(blue, brightness, early)
    green = _adjusted(green, brightness, early)
    red = _adjusted(red, brightness, early)
    if saturation > 0.0:
        h, s, v = _to_hsv(blue, green, red)
        s = _truncated(s.to(tl.float32) * saturation)
        blue, green, red = _to_bgr(h, s, v, is_cut)
    if hue >= 0.0:
        h, s, v = _to_hsv(blue, green, red)
        blue, green, red = _to_bgr((h + hue.to(tl.int32)) % 180, s, v, is_cut)
    red = _normalised(red, late, mean_r, std_r)
    green = _normalised(green, late, mean_g, std_g)
    blue = _normalised(blue, late, mean_b, std_b)

    at = line.to(tl.int64) * width + x  # in the labels
    plane = height.to(tl.int64) * width
    image = images + at + 2 * n * plane
    known = x < width
    tl.store(image, tl.where(inside, red, 0.0), known)
    tl.store(image + plane, tl.where(inside, green, 0.0), known)
    tl.store(image + 2 * plane, tl.where(inside, blue, 0.0), known)
    tl.store(labels + at, label.to(tl.int64), known)


def _configs(constants: Constants) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK": block}, num_warps=warps)
        for block, warps in ((256, 4), (256, 2), (512, 4), (1024, 8))
    ]


AUGMENT = Kernel("augment.augment", _augment, _configs, enable_fp_fusion=False)


def augment(
    pictures: Tensor,
    places: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Images fp32 [B, 3, h, w] and labels int64 [B, h, w] of h x w `size`; see `ops.augment`."""
    n, (height, width) = places.shape[0], size
    images = torch.empty(n, 3, height, width, dtype=torch.float32, device=pictures.device)
    labels = torch.empty(n, height, width, dtype=torch.int64, device=pictures.device)
    AUGMENT(
        lambda meta: (n * height * triton.cdiv(width, meta["BLOCK"]),),
        images,
        labels,
        pictures.view(torch.int32),  # one load for a pixel
        places,
        colours,
        height,
        width,
        *mean,
        *std,
        size=(n * height * width,),
    )
    return images, labels
