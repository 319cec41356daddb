"""How uncertain logits are: at points of a map, and everywhere on the map enlarged.

Scores come from interpolated values in fp32; the larger is the more uncertain. They are the second
largest logit minus the largest ("top2_margin"), or -|logit of class 0| ("neg_abs", and always
where C = 1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointrend_triton.kernels.decode import (
    empty_labels,
    keep,
    layout,
    resample,
    settle,
    tiles,
)
from pointrend_triton.kernels.grid import linear_taps
from pointrend_triton.kernels.launch import Kernel


@triton.jit
def _columns(row, left, middle, right, mask):
    """One row of cells, enlarged along x: the left and the right half of each cell.

    The values are a quarter of what they should be, which `3 * near + far` makes up for: so
    nothing overflows on the way, and the weights are exact.
    """
    centre = 0.1875 * tl.load(row + middle, mask=mask, other=0.0).to(tl.float32)
    before = tl.load(row + left, mask=mask, other=0.0).to(tl.float32)
    after = tl.load(row + right, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(before, 0.0625, centre), tl.fma(after, 0.0625, centre)


@triton.jit(do_not_specialize=["height", "width"])
def _double(
    logits,
    scores,
    values,
    labels,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    height,
    width,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    MARGIN: tl.constexpr,
    VALUES: tl.constexpr,
    LABELS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The two output rows between two input rows, over a run of BLOCK cells.

    Between rows y and y + 1, for y = -1 to height - 1, lie output rows 2y + 1 and 2y + 2: both
    need the same two rows of the input, the near one three times as much as the far one.

    Args:
        logits: [N, C, height, width], any strides.
        scores: [N, 2 height, 2 width] fp32.
        values: [N, C, 2 height, 2 width] contiguous, written with VALUES.
        labels: [N, 2 height, 2 width], written with LABELS.
        CHANNELS_LAST: only the choice of a configuration depends on it.
        WIDE: offsets need 64 bits.
        MARGIN: the score is second largest minus largest, else -|class 0|.
        CLASSES: classes at a time.
    """
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = (row // (height + 1)).to(tl.int64)
    y = row % (height + 1) - 1

    slot = tl.arange(0, CLASSES)[:, None]
    base = logits + n * stride_n
    advance = tl.full((), CLASSES, tl.int64) * stride_c
    unit = tl.full((), 1, tl.int64 if WIDE else tl.int32)
    upper = tl.maximum(y, 0) * (unit * stride_y) + slot * (unit * stride_c)
    lower = tl.minimum(y + 1, height - 1) * (unit * stride_y) + slot * (unit * stride_c)
    known_x = tl.minimum(x, width - 1)[None]
    left = tl.maximum(known_x - 1, 0) * (unit * stride_x)
    middle = known_x * (unit * stride_x)
    right = tl.minimum(known_x + 1, width - 1) * (unit * stride_x)

    # where the two rows go: two columns of a cell side by side
    column = tl.arange(0, 2)[None]
    size = 4 * height.to(tl.int64) * width
    out = (2 * (n * height + y) + 1) * (2 * width) + (2 * x[:, None] + column)
    inside = (x[:, None] < width) & (column < 2)
    has_upper = inside & (y >= 0)
    has_lower = inside & (y < height - 1)
    target = values + (n * (C - 1) + slot[:, :, None]) * size + out[None]

    best = tl.full([CLASSES, BLOCK, 2, 2], float("-inf"), tl.float32)
    second = best
    label = tl.zeros([CLASSES, BLOCK, 2, 2], tl.int32)
    slot4 = slot[:, :, None, None]
    for start in range(0, C, CLASSES):
        known = start + slot < C
        a, b = _columns(base, upper + left, upper + middle, upper + right, known)
        c, d = _columns(base, lower + left, lower + middle, lower + right, known)
        base += advance
        top = tl.join(tl.fma(a, 3.0, c), tl.fma(b, 3.0, d))
        bottom = tl.join(tl.fma(c, 3.0, a), tl.fma(d, 3.0, b))
        if VALUES:
            dtype = values.dtype.element_ty
            tl.store(target, top.to(dtype), known[:, :, None] & has_upper[None])
            tl.store(target + 2 * width, bottom.to(dtype), known[:, :, None] & has_lower[None])
            target += size * CLASSES
        value = tl.join(top, bottom)
        if C % CLASSES:
            value = tl.where(start + slot4 < C, value, float("-inf"))
        best, second, label = keep(best, second, label, value, start + slot4, MARGIN, LABELS)

    score, lowest = settle(best, second, label, slot4, C, MARGIN)
    top, bottom = tl.split(score)
    tl.store(scores + out, top, has_upper)
    tl.store(scores + out + 2 * width, bottom, has_lower)
    if LABELS:
        top, bottom = tl.split(lowest.to(labels.dtype.element_ty))
        tl.store(labels + out, top, has_upper)
        tl.store(labels + out + 2 * width, bottom, has_lower)


@triton.jit(do_not_specialize=["points", "coords_stride_n", "coords_stride_p"])
def _sampled(
    logits,
    coords,
    scores,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    coords_stride_n,
    coords_stride_p,
    coords_stride_xy,
    height,
    width,
    points,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scores of a run of BLOCK points of one map, which is zero beyond its border.

    Args:
        logits: [N, C or more, height, width], any strides; the first C classes count.
        coords: [N, points, 2] (x, y) in [0, 1], any strides.
        scores: [N, points] fp32: second largest minus largest, for C = 1 -|class 0|.
        CHANNELS_LAST: only the choice of a configuration depends on it.
        WIDE: offsets need 64 bits.
        CLASSES: classes at a time.
    """
    blocks = tl.cdiv(points, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = point < points
    place = coords + n * coords_stride_n + point.to(tl.int64) * coords_stride_p
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(place + coords_stride_xy, mask=inside, other=0.0).to(tl.float32)
    x, share_x, has_left, has_right = linear_taps(x, width, ALIGN=False, BORDER=False)
    y, share_y, has_upper, has_lower = linear_taps(y, height, ALIGN=False, BORDER=False)
    upper_left = ((1.0 - share_y) * (1.0 - share_x))[None]
    upper_right = ((1.0 - share_y) * share_x)[None]
    lower_left = (share_y * (1.0 - share_x))[None]
    lower_right = (share_y * share_x)[None]

    slot = tl.arange(0, CLASSES)[:, None]
    base = logits + n * stride_n
    advance = tl.full((), CLASSES, tl.int64) * stride_c
    unit = tl.full((), 1, tl.int64 if WIDE else tl.int32)
    upper = slot * (unit * stride_c) + (y * (unit * stride_y) + x * (unit * stride_x))[None]
    lower = upper + stride_y
    best = tl.full([CLASSES, BLOCK], float("-inf"), tl.float32)
    second = best
    label = tl.zeros([CLASSES, BLOCK], tl.int32)
    for start in range(0, C, CLASSES):
        channel = start + slot
        known = channel < C
        a = tl.load(base + upper, known & (has_upper & has_left)[None], 0.0)
        b = tl.load(base + (upper + stride_x), known & (has_upper & has_right)[None], 0.0)
        c = tl.load(base + lower, known & (has_lower & has_left)[None], 0.0)
        d = tl.load(base + (lower + stride_x), known & (has_lower & has_right)[None], 0.0)
        base += advance
        value = upper_left * a.to(tl.float32) + upper_right * b.to(tl.float32)
        value += lower_left * c.to(tl.float32) + lower_right * d.to(tl.float32)
        if C % CLASSES:
            value = tl.where(known, value, float("-inf"))
        best, second, label = keep(best, second, label, value, channel, C > 1, False)
    score, _ = settle(best, second, label, slot, C, C > 1)
    tl.store(scores + n * points + point, score, inside)


DOUBLE = Kernel("uncertainty.double", _double, tiles)
SAMPLED = Kernel("uncertainty.sampled", _sampled, tiles)


def upsample(
    logits: Tensor, scale: int, *, kind: str, return_logits: bool, return_labels: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Enlarges logits [N, C, H, W] by a whole factor (bilinear, border cells repeated) and scores.

    Args:
        kind: "top2_margin" or "neg_abs".

    Returns:
        scores fp32 [N, 1, sH, sW]; the enlarged logits [N, C, sH, sW] in their own type and
        contiguous, or None; labels [N, sH, sW] (uint8 up to 256 classes, else int64; for C = 1
        whether the logit is positive), or None.
    """
    n, classes, height, width = logits.shape
    size = (scale * height, scale * width)
    scores = torch.empty(n, 1, *size, dtype=torch.float32, device=logits.device)
    values = labels = None
    if return_logits:
        values = torch.empty(n, classes, *size, dtype=logits.dtype, device=logits.device)
    if return_labels:
        labels = empty_labels(n, classes, size, logits.device)
    if kind == "neg_abs" and not (return_logits or return_labels):
        logits, classes = logits[:, :1], 1  # the others are not needed
    margin = kind == "top2_margin" and classes > 1
    if scale != 2:
        resample(logits, None, size, scores=scores, values=values, labels=labels, margin=margin)
        return scores, values, labels
    DOUBLE(
        lambda meta: (n * (height + 1) * triton.cdiv(width, meta["BLOCK"]),),
        logits,
        scores,
        scores if values is None else values,
        scores if labels is None else labels,
        *logits.stride(),
        height,
        width,
        size=(n * height * width,),
        C=classes,
        **layout(logits),
        MARGIN=margin,
        VALUES=return_logits,
        LABELS=return_labels,
    )
    return scores, values, labels


def sampled(logits: Tensor, coords: Tensor, *, kind: str) -> Tensor:
    """Scores fp32 [N, K] of logits [N, C, H, W] sampled bilinearly at points, zero beyond the map.

    Args:
        coords: [N, K, 2], or [1, K, 2] for all maps; (x, y) in [0, 1], fp32 or half precision.
        kind: "top2_margin" or "neg_abs".
    """
    n, classes, height, width = logits.shape
    points = coords.shape[1]
    scores = torch.empty(n, points, dtype=torch.float32, device=logits.device)
    SAMPLED(
        lambda meta: (n * triton.cdiv(points, meta["BLOCK"]),),
        logits,
        coords,
        scores,
        *logits.stride(),
        *coords.expand(n, -1, -1).stride(),
        height,
        width,
        points,
        size=(n * points,),
        C=1 if kind == "neg_abs" else classes,
        **layout(logits),
    )
    return scores
