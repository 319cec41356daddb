"""Logits resampled to another size: labels, scores and values, in one pass over the classes.

A program holds a tile of [classes, pixels]: each row keeps the best of the classes that it sees,
and the rows are brought together once, at the end. Where classes lie closest in memory
(channels-last) the lanes of a warp run along them, else along the pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointrend_triton.kernels.launch import INTERPRETED, Constants, Kernel

_MOST_CLASSES = 32  # in a tile


@triton.jit
def keep(best, second, label, value, channel, MARGIN: tl.constexpr, LABELS: tl.constexpr):
    """One more class: the largest value so far (NaN stays), what the score needs, the label.

    `second` is the second largest value, or without MARGIN that of class 0.
    """
    if MARGIN:
        second = tl.maximum(second, tl.minimum(best, value))
    else:
        second = tl.where(channel == 0, value, second)
    if LABELS:  # of equal ones the first stays; the first NaN beats all, as torch.argmax has it
        better = (best == best) & ((value > best) | (value != value))
        label = tl.where(better, channel, label)
    return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL), second, label


@triton.jit
def settle(best, second, label, slot, C: tl.constexpr, MARGIN: tl.constexpr):
    """What the rows of a tile kept, [rows, ...] -> score, label [...]; slot numbers the rows."""
    ROWS: tl.constexpr = best.shape[0]
    top = tl.max(best, 0)
    is_nan = tl.max((best != best).to(tl.int32), 0) > 0  # which the other reductions drop
    if C == 1:
        lowest = (top > 0.0).to(tl.int32)
    else:
        wins = tl.where(is_nan[None], best != best, best == top[None])
        lowest = tl.min(tl.where(wins, label, C - 1), 0)
    if MARGIN:
        winner = tl.min(tl.where(best == top[None], slot, ROWS), 0)
        rest = tl.max(tl.where(slot == winner[None], second, best), 0)
        score = tl.where(is_nan, float("nan"), rest - top)
    else:
        score = -tl.abs(tl.sum(tl.where(slot == 0, second, 0.0), 0))
    return score, lowest


@triton.jit
def _low_tap(index, size_from, size_to):
    """The cell at or before an output index and the share of the next one, as F.interpolate's."""
    scale = tl.div_rn(size_from.to(tl.float32), size_to.to(tl.float32))
    place = tl.maximum(scale * (index.to(tl.float32) + 0.5) - 0.5, 0.0)
    low = tl.minimum(place.to(tl.int32), size_from - 1)
    return low, place - low.to(tl.float32)


@triton.jit
def _taps(index, size, between, size_to, stride, STEPS: tl.constexpr):
    """What makes an output index along one axis: the offsets of cells, and their weights.

    STEPS: 0, 1 (size -> size_to) or 2 (size -> between -> size_to).
    """
    if STEPS == 0:
        return (index * stride,), (1.0,)
    elif STEPS == 1:
        low, share = _low_tap(index, size, size_to)
        high = tl.minimum(low + 1, size - 1)
        return (low * stride, high * stride), (1.0 - share, share)
    else:
        low, share = _low_tap(index, between, size_to)
        a, share_a = _low_tap(low, size, between)
        b, share_b = _low_tap(tl.minimum(low + 1, between - 1), size, between)
        after_a, after_b = tl.minimum(a + 1, size - 1), tl.minimum(b + 1, size - 1)
        rest = 1.0 - share
        return (
            (a * stride, after_a * stride, b * stride, after_b * stride),
            (rest * (1.0 - share_a), rest * share_a, share * (1.0 - share_b), share * share_b),
        )


@triton.jit(
    do_not_specialize=["height", "width", "mid_height", "mid_width", "to_height", "to_width"]
)
def _resample(
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
    mid_height,
    mid_width,
    to_height,
    to_width,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    STEPS_Y: tl.constexpr,
    STEPS_X: tl.constexpr,
    MARGIN: tl.constexpr,
    SCORES: tl.constexpr,
    VALUES: tl.constexpr,
    LABELS: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A run of BLOCK output pixels of one row.

    Args:
        logits: [N, C, height, width], any strides.
        scores: [N, to_height, to_width] fp32, written with SCORES.
        values: [N, C, to_height, to_width] contiguous, written with VALUES.
        labels: [N, to_height, to_width], written with LABELS.
        mid_height, mid_width: the size between two resamplings.
        CHANNELS_LAST: only the choice of a configuration depends on it.
        WIDE: offsets need 64 bits.
        STEPS_Y, STEPS_X: resamplings along each axis, 0 to 2.
        MARGIN: the score is second largest minus largest, else -|class 0|.
        CLASSES: classes at a time.
    """
    blocks = tl.cdiv(to_width, BLOCK)
    row = tl.program_id(0) // blocks  # of all maps
    x = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[None]
    inside = x < to_width
    n = (row // to_height).to(tl.int64)
    y = row % to_height
    unit = tl.full((), 1, tl.int64 if WIDE else tl.int32)
    ys, weights_y = _taps(y, height, mid_height, to_height, unit * stride_y, STEPS_Y)
    x_known = tl.minimum(x, to_width - 1)
    xs, weights_x = _taps(x_known, width, mid_width, to_width, unit * stride_x, STEPS_X)

    slot = tl.arange(0, CLASSES)[:, None]
    plane = slot * (unit * stride_c)
    base = logits + n * stride_n
    advance = tl.full((), CLASSES, tl.int64) * stride_c
    out = row.to(tl.int64) * to_width + x
    size = to_height.to(tl.int64) * to_width
    target = values + (n * (C - 1) + slot) * size + out

    best = tl.full([CLASSES, BLOCK], float("-inf"), tl.float32)
    second = best
    label = tl.zeros([CLASSES, BLOCK], tl.int32)
    for start in range(0, C, CLASSES):
        channel = start + slot
        value = tl.zeros([CLASSES, BLOCK], tl.float32)
        for i in tl.static_range(len(ys)):
            line = tl.zeros([CLASSES, BLOCK], tl.float32)
            for j in tl.static_range(len(xs)):
                tap = tl.load(base + (plane + (ys[i] + xs[j])), mask=channel < C, other=0.0)
                line += weights_x[j] * tap.to(tl.float32)
            value += weights_y[i] * line
        base += advance
        if VALUES:
            tl.store(target, value.to(values.dtype.element_ty), (channel < C) & inside)
            target += size * CLASSES
        if C % CLASSES:
            value = tl.where(channel < C, value, float("-inf"))
        best, second, label = keep(best, second, label, value, channel, MARGIN, LABELS)

    score, lowest = settle(best, second, label, slot, C, MARGIN)
    if SCORES:
        tl.store(scores + out, score[None], inside)
    if LABELS:
        tl.store(labels + out, lowest[None].to(labels.dtype.element_ty), inside)


def tiles(constants: Constants) -> list[triton.Config]:
    """Tiles of [classes, pixels]: several classes where pixels are few or far from each other."""
    if constants["C"] < 8:
        shapes = [(1, 128, 4), (1, 32, 1)]
    elif constants["CHANNELS_LAST"]:
        shapes = [(8, 32, 4), (_MOST_CLASSES, 16, 4), (_MOST_CLASSES, 32, 8)]
    else:
        shapes = [(1, 128, 4), (8, 32, 4), (4, 32, 4), (1, 32, 1)]
    if INTERPRETED:
        shapes.sort(reverse=True)  # it takes its time for an operation, not for a value
    return [
        triton.Config({"CLASSES": classes, "BLOCK": block}, num_warps=warps)
        for classes, block, warps in shapes
    ]


RESAMPLE = Kernel("decode.resample", _resample, tiles)


def layout(logits: Tensor) -> dict[str, bool]:
    """The constants of a kernel that depend on the strides of its map."""
    _, _, height, width = logits.shape
    _, stride_c, stride_y, stride_x = logits.stride()
    furthest = _MOST_CLASSES * stride_c + height * stride_y + width * stride_x
    return {"CHANNELS_LAST": stride_c == 1 < stride_x, "WIDE": furthest >= 1 << 31}


def empty_labels(n: int, classes: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """[n, height, width] for classes: uint8 up to 256 of them, else int64."""
    dtype = torch.uint8 if classes <= 256 else torch.int64
    return torch.empty(n, *size, dtype=dtype, device=device)


def resample(
    logits: Tensor,
    image_size: tuple[int, int] | None,
    size: tuple[int, int] | None,
    *,
    scores: Tensor | None = None,
    values: Tensor | None = None,
    labels: Tensor | None = None,
    margin: bool = False,
) -> None:
    """Logits [N, C, H, W] resampled to `image_size`, then to `size`; writes what is asked for.

    Bilinear with half-pixel centres, in fp32 throughout; None is no step.

    Args:
        scores: fp32 [N, 1, h, w]: with `margin` second largest minus largest, else -|class 0|.
        values: [N, C, h, w], contiguous.
        labels: [N, h, w]; for C = 1 whether the value is positive.
    """
    n, classes, height, width = logits.shape
    mid_height, mid_width = image_size or (height, width)
    to_height, to_width = size or (mid_height, mid_width)
    outputs = [logits if output is None else output for output in (scores, values, labels)]
    RESAMPLE(
        lambda meta: (n * to_height * triton.cdiv(to_width, meta["BLOCK"]),),
        logits,
        *outputs,
        *logits.stride(),
        height,
        width,
        mid_height,
        mid_width,
        to_height,
        to_width,
        size=(n * to_height * to_width,),
        C=classes,
        **layout(logits),
        STEPS_Y=(height != mid_height) + (mid_height != to_height),
        STEPS_X=(width != mid_width) + (mid_width != to_width),
        MARGIN=margin and classes > 1,
        SCORES=scores is not None,
        VALUES=values is not None,
        LABELS=labels is not None,
    )


def decode(
    logits: Tensor,
    image_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Logits [N, C, H, W] -> classes [N, h, w]: uint8 up to 256 of them, else int64.

    Resampled to `image_size` (height, width), then to `size`, bilinearly; None is no step. For
    C = 1, whether the logit is positive.
    """
    n, classes = logits.shape[:2]
    to_size = size or image_size or (logits.shape[2], logits.shape[3])
    labels = empty_labels(n, classes, to_size, logits.device)
    resample(logits, image_size, size, labels=labels)
    return labels
