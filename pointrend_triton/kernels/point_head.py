"""PointRend's point MLP: maps sampled at points, hidden layers with ReLU, predictor, in one launch.

A program takes a tile of rows (a row is one point of one image) through all layers. What goes from
layer to layer lies in a row of global memory that stays in L2; in training those rows are what
backward needs. Columns are padded with zeros inside: widths to multiples of 32, the hidden width
to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config, cdiv, next_power_of_2

from pointrend_triton.kernels.grid import cell_centre, linear_taps
from pointrend_triton.kernels.launch import INTERPRETED, Constants, Kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256  # hidden channels: a program holds a whole layer's output in registers
STEP = 32  # columns of every part are multiples of it

_BLOCK = tl.constexpr(64)  # outputs of the predictor at a time
_UPCAST = tl.constexpr(INTERPRETED)  # the interpreter's dot is wrong in bf16


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "tf32":
        return tl.dot(a, b, sums, input_precision="tf32")
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _operand(value, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """A value as it is stored for a dot, in `dtype`; for TF32 rounded to ten bits of mantissa.

    Tensor cores cut the other bits off, which errs by twice as much and always towards zero.
    """
    value = value.to(dtype)
    if PRECISION == "tf32":
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)  # a NaN's bits would become -0
    return value


@triton.jit
def _gather(
    image, x, y, height, width, stride_c, stride_h, stride_w, at, valid,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Samples all channels of `image` at (x, y) into `at` (pointers to rows), CHUNK at a time.

    Beyond the last channel, up to PADDED, it writes zeros.
    """
    column, right, has_left, has_right = linear_taps(x, width, False, False)
    row, below, has_top, has_bottom = linear_taps(y, height, False, False)
    image += row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    for first in tl.range(0, PADDED, CHUNK, disable_licm=True):
        channel = first + tl.arange(0, CHUNK)
        real = (channel < CHANNELS)[None, :]
        tap = image[:, None] + (channel.to(tl.int64) * stride_c)[None, :]
        a = tl.load(tap, mask=real & (has_top & has_left)[:, None], other=0.0)
        b = tl.load(tap + stride_w, mask=real & (has_top & has_right)[:, None], other=0.0)
        c = tl.load(tap + stride_h, mask=real & (has_bottom & has_left)[:, None], other=0.0)
        d = tl.load(
            tap + stride_h + stride_w, mask=real & (has_bottom & has_right)[:, None], other=0.0
        )
        value = a.to(tl.float32) * ((1 - right) * (1 - below))[:, None]
        value += b.to(tl.float32) * (right * (1 - below))[:, None]
        value += c.to(tl.float32) * ((1 - right) * below)[:, None]
        value += d.to(tl.float32) * (right * below)[:, None]
        value = _operand(value, at.dtype.element_ty, PRECISION)
        tl.store(at[:, None] + channel[None, :], value, mask=valid[:, None])


@triton.jit
def _layer(
    at, valid, weights, biases, first, slot, width, end,
    OUT: tl.constexpr, COARSE_SLOT: tl.constexpr, COARSE_COLUMN: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One linear layer of the rows at `at`: fp32 [rows, OUT].

    Its input is `width` columns from `slot`, then, up to `end` columns in all, the coarse logits;
    its weights are the packed rows from `first`.
    """
    out = first + tl.arange(0, OUT)
    step = tl.arange(0, BLOCK_K)
    activation = at[:, None] + step[None, :]
    weight = weights + (out * PITCH)[None, :] + step[:, None]
    sums = tl.zeros([at.shape[0], OUT], tl.float32)
    for k in range(0, end, BLOCK_K):
        coarse = k >= width
        a = tl.load(
            activation + (k + tl.where(coarse, COARSE_SLOT - width, slot)),
            mask=valid[:, None],
            other=0.0,
        )
        b = tl.load(weight + (k + tl.where(coarse, COARSE_COLUMN - width, 0)))
        sums = _dot(a, b, sums, PRECISION)
    return sums + tl.load(biases + out)[None, :]


@triton.jit
def _predict(
    at, valid, weights, biases, logits, logits_c, best, first, slot, width, end,
    OUT: tl.constexpr, LAYERS: tl.constexpr, HIDDEN_PAD: tl.constexpr, OUTPUTS: tl.constexpr,
    COARSE_SLOT: tl.constexpr, COARSE_COLUMN: tl.constexpr, PITCH: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT outputs of the predictor, from `first`, to `logits` (pointers to cells).

    Returns:
        the larger of `best` and the best of these outputs: its place in the order of floats in
        the high half, 2^31 - 1 - index in the low one, so that the lower of equal classes wins.
    """
    out = first + tl.arange(0, OUT)
    value = _layer(
        at, valid, weights, biases, LAYERS * HIDDEN_PAD + first, slot, width, end,
        OUT, COARSE_SLOT, COARSE_COLUMN, PITCH, BLOCK_K, PRECISION,
    ).to(at.dtype.element_ty)  # fmt: skip
    if logits is not None:
        value = value.to(logits.dtype.element_ty)
        offset = (out.to(tl.int64) * logits_c)[None, :]
        tl.store(logits[:, None] + offset, value, mask=valid[:, None] & (out < OUTPUTS)[None, :])
    # labels are those of the stored values
    value = value.to(tl.float32)
    if OUTPUTS == 1:
        order = (value > 0).to(tl.int32)
    else:
        value = tl.where(value == 0, 0.0, value)  # -0 equals 0
        order = value.to(tl.int32, bitcast=True)
        order = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
        order = tl.where(value != value, 0x7FFFFFFF, order)  # NaN is the largest
    order = tl.where((out < OUTPUTS)[None, :], order, -0x80000000)
    largest = tl.max(order, 1)
    lowest = tl.min(tl.where(order == largest[:, None], out[None, :], 0x7FFFFFFF), 1)
    return tl.maximum(best, (largest.to(tl.int64) << 32) | (0x7FFFFFFF - lowest).to(tl.int64))


@triton.jit(
    do_not_specialize=[
        "points", "fine_height", "fine_width", "coarse_height", "coarse_width",
        "coords_n", "indices_n", "grid_width", "logits_n", "labels_n",
    ]
)  # fmt: skip
def _point_head(
    fine, coarse, coords, indices, weights, biases, scratch, logits, labels, points,
    fine_height, fine_width, fine_n, fine_c, fine_h, fine_w,
    coarse_height, coarse_width, coarse_n, coarse_c, coarse_h, coarse_w,
    coords_n, coords_p, coords_xy, indices_n, indices_p, grid_width, step_x, step_y,
    logits_n, logits_c, logits_h, logits_w, labels_n, labels_h, labels_w,
    FINE: tl.constexpr, FINE_PAD: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_PAD: tl.constexpr, LAYERS: tl.constexpr,
    OUTPUTS: tl.constexpr, OUTPUTS_PAD: tl.constexpr, EACH_LAYER: tl.constexpr,
    SAVE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The MLP at a tile of the points of one image, a row each.

    With indices the points are the centres of those cells of a grid of width `grid_width`, and the
    results go there; else they lie at coords and `logits` is a grid of one line, a cell per point.

    Writes:
        scratch: sampled features, hidden layers and sampled coarse logits, side by side (SAVE), or
            each layer over its input.
        logits, labels: each if it is not None.
    """
    COARSE_COLUMN: tl.constexpr = FINE_PAD if FINE_PAD > HIDDEN_PAD else HIDDEN_PAD
    COARSE_SLOT: tl.constexpr = FINE_PAD + LAYERS * HIDDEN_PAD if SAVE else COARSE_COLUMN
    PITCH: tl.constexpr = COARSE_COLUMN + CLASSES_PAD
    WHOLE: tl.constexpr = OUTPUTS // _BLOCK * _BLOCK

    tiles = tl.cdiv(points, ROWS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * ROWS
    p = start + tl.arange(0, ROWS)
    valid = p < points
    scratch += (n * points + start) * (COARSE_SLOT + CLASSES_PAD)
    at = scratch + tl.arange(0, ROWS) * (COARSE_SLOT + CLASSES_PAD)
    if indices is not None:
        indices += n * indices_n + start.to(tl.int64) * indices_p
        cell = tl.load(indices + tl.arange(0, ROWS) * indices_p, mask=valid, other=0).to(tl.int32)
        x, y = cell_centre(cell, grid_width, step_x, step_y)
    else:
        coords += n * coords_n + p.to(tl.int64) * coords_p
        x = tl.load(coords, mask=valid, other=0.0).to(tl.float32)
        y = tl.load(coords + coords_xy, mask=valid, other=0.0).to(tl.float32)

    _gather(
        fine + n * fine_n, x, y, fine_height, fine_width, fine_c, fine_h, fine_w,
        at, valid, FINE, FINE_PAD, 64 if FINE_PAD % 64 == 0 else 32, PRECISION,
    )  # fmt: skip
    _gather(
        coarse + n * coarse_n, x, y, coarse_height, coarse_width, coarse_c, coarse_h, coarse_w,
        at + COARSE_SLOT, valid, CLASSES, CLASSES_PAD, 32, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()

    column = tl.arange(0, HIDDEN_PAD)
    slot = 0
    width = FINE_PAD
    end = FINE_PAD + CLASSES_PAD
    for layer in tl.range(0, LAYERS, disable_licm=True):
        value = _layer(
            at, valid, weights, biases, layer * HIDDEN_PAD, slot, width, end,
            HIDDEN_PAD, COARSE_SLOT, COARSE_COLUMN, PITCH, BLOCK_K, PRECISION,
        )  # fmt: skip
        # no maximum: it would turn NaN into 0; padding too: infinity times its zeros is NaN
        value = tl.where((value < 0) | (column >= HIDDEN)[None, :], 0.0, value)
        slot = FINE_PAD + layer * HIDDEN_PAD if SAVE else 0
        width = HIDDEN_PAD
        end = HIDDEN_PAD + CLASSES_PAD if EACH_LAYER else HIDDEN_PAD
        tl.debug_barrier()  # all have read the input, which may be overwritten
        tl.store(
            at[:, None] + (slot + column)[None, :],
            _operand(value, at.dtype.element_ty, PRECISION),
            mask=valid[:, None],
        )
        tl.debug_barrier()

    cell_x = p
    cell_y = p * 0
    if indices is not None:
        # read again: kept from above, it would take registers from the layers
        cell = tl.load(indices + tl.arange(0, ROWS) * indices_p, mask=valid, other=0).to(tl.int32)
        cell_x = cell % grid_width
        cell_y = cell // grid_width
    if logits is not None:
        logits += n * logits_n
        logits += cell_y.to(tl.int64) * logits_h + cell_x.to(tl.int64) * logits_w
    best = tl.full([ROWS], -(1 << 63), tl.int64)
    for first in tl.range(0, WHOLE, _BLOCK, disable_licm=True):
        best = _predict(
            at, valid, weights, biases, logits, logits_c, best, first, slot, width, end,
            _BLOCK, LAYERS, HIDDEN_PAD, OUTPUTS, COARSE_SLOT, COARSE_COLUMN, PITCH,
            BLOCK_K, PRECISION,
        )  # fmt: skip
    if WHOLE < OUTPUTS:
        best = _predict(
            at, valid, weights, biases, logits, logits_c, best, WHOLE, slot, width, end,
            OUTPUTS_PAD - WHOLE, LAYERS, HIDDEN_PAD, OUTPUTS, COARSE_SLOT, COARSE_COLUMN, PITCH,
            BLOCK_K, PRECISION,
        )  # fmt: skip
    if labels is not None:
        labels += n * labels_n
        labels += cell_y.to(tl.int64) * labels_h + cell_x.to(tl.int64) * labels_w
        label = best >> 32 if OUTPUTS == 1 else 0x7FFFFFFF - (best & 0x7FFFFFFF)
        tl.store(labels, label.to(labels.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["points", "grad_n", "grad_c"])
def _dgrad(
    grad, saved, weights, gradients, points, grad_n, grad_c, grad_p,
    FINE_PAD: tl.constexpr, CLASSES_PAD: tl.constexpr, HIDDEN_PAD: tl.constexpr,
    LAYERS: tl.constexpr, OUTPUTS: tl.constexpr, OUTPUTS_PAD: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients [N, O, P] of the logits -> those of every layer's output before its ReLU.

    Writes:
        gradients: [N * P, LAYERS * HIDDEN_PAD + OUTPUTS_PAD], in the order of the packed weights'
            rows.
    """
    PITCH: tl.constexpr = (FINE_PAD if FINE_PAD > HIDDEN_PAD else HIDDEN_PAD) + CLASSES_PAD

    tiles = tl.cdiv(points, ROWS)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * ROWS
    p = start + tl.arange(0, ROWS)
    valid = p < points
    gradients += (n * points + start) * (LAYERS * HIDDEN_PAD + OUTPUTS_PAD)
    at = gradients + tl.arange(0, ROWS) * (LAYERS * HIDDEN_PAD + OUTPUTS_PAD)
    saved += (n * points + start) * (FINE_PAD + LAYERS * HIDDEN_PAD + CLASSES_PAD) + FINE_PAD
    hidden = saved + tl.arange(0, ROWS) * (FINE_PAD + LAYERS * HIDDEN_PAD + CLASSES_PAD)
    grad += n * grad_n + p.to(tl.int64) * grad_p
    for first in range(0, OUTPUTS_PAD, 32):
        out = first + tl.arange(0, 32)
        value = tl.load(
            grad[:, None] + (out.to(tl.int64) * grad_c)[None, :],
            mask=valid[:, None] & (out < OUTPUTS)[None, :],
            other=0.0,
        )
        tl.store(
            at[:, None] + (LAYERS * HIDDEN_PAD + out)[None, :],
            _operand(value, at.dtype.element_ty, PRECISION),
            mask=valid[:, None],
        )

    column = tl.arange(0, HIDDEN_PAD)
    step = tl.arange(0, BLOCK_K)
    width = OUTPUTS_PAD
    for done in range(0, LAYERS):
        first = (LAYERS - done) * HIDDEN_PAD  # the layer above: its gradient and its weights
        tl.debug_barrier()  # its gradient is written
        received = at[:, None] + (first + step)[None, :]
        weight = weights + (first + step)[:, None] * PITCH + column[None, :]
        value = tl.zeros([ROWS, HIDDEN_PAD], tl.float32)
        for k in range(0, width, BLOCK_K):
            a = tl.load(received + k, mask=valid[:, None], other=0.0)
            b = tl.load(weight + k * PITCH)
            value = _dot(a, b, value, PRECISION)
        first -= HIDDEN_PAD
        output = tl.load(
            hidden[:, None] + (first + column)[None, :], mask=valid[:, None], other=0.0
        )
        value = tl.where(output <= 0, 0.0, value)
        tl.store(
            at[:, None] + (first + column)[None, :],
            _operand(value, at.dtype.element_ty, PRECISION),
            mask=valid[:, None],
        )
        width = HIDDEN_PAD


@triton.jit
def _pack_layer(
    weight, bias, weight_out, weight_in, bias_out, packed, packed_biases, first,
    OUT: tl.constexpr, OUT_PAD: tl.constexpr, IN: tl.constexpr, COARSE: tl.constexpr,
    COARSE_COLUMN: tl.constexpr, PITCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    real = row < OUT
    valid = row < OUT_PAD
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_coarse = column >= COARSE_COLUMN
    source = tl.where(is_coarse, column - COARSE_COLUMN + IN, column)
    exists = tl.where(is_coarse, source < IN + COARSE, source < IN)
    value = tl.load(
        weight + (row * weight_out)[:, None] + (source * weight_in)[None, :],
        mask=real[:, None] & exists[None, :],
        other=0.0,
    )
    tl.store(
        packed + ((first + row) * PITCH)[:, None] + column[None, :],
        _operand(value, packed.dtype.element_ty, PRECISION),
        mask=valid[:, None] & (column < PITCH)[None, :],
    )
    if tl.program_id(2) == 0:
        shift = tl.load(bias + row * bias_out, mask=real, other=0.0)
        tl.store(packed_biases + first + row, shift.to(tl.float32), mask=valid)


@triton.jit
def _pack(
    packed, packed_biases, weights, biases, weights_out, weights_in, biases_out,
    FINE: tl.constexpr, FINE_PAD: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PAD: tl.constexpr,
    HIDDEN: tl.constexpr, HIDDEN_PAD: tl.constexpr, LAYERS: tl.constexpr,
    OUTPUTS: tl.constexpr, OUTPUTS_PAD: tl.constexpr, EACH_LAYER: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tuples of a pointer or stride per layer -> the matrix and biases that `Packed` describes."""
    COARSE_COLUMN: tl.constexpr = FINE_PAD if FINE_PAD > HIDDEN_PAD else HIDDEN_PAD
    for layer in tl.static_range(LAYERS + 1):
        if tl.program_id(1) == layer:
            _pack_layer(
                weights[layer], biases[layer],
                weights_out[layer], weights_in[layer], biases_out[layer],
                packed, packed_biases, layer * HIDDEN_PAD,
                OUTPUTS if layer == LAYERS else HIDDEN,
                OUTPUTS_PAD if layer == LAYERS else HIDDEN_PAD,
                FINE if layer == 0 else HIDDEN,
                CLASSES if layer == 0 or EACH_LAYER else 0,
                COARSE_COLUMN, COARSE_COLUMN + CLASSES_PAD, PRECISION, BLOCK_R, BLOCK_C,
            )  # fmt: skip


def _config(rows: int, warps: int, stages: int, step: int = 32) -> Config:
    return Config({"ROWS": rows, "BLOCK_K": step}, num_warps=warps, num_stages=stages)


def _dgrad_configs(constants: Constants) -> list[Config]:
    if constants["PRECISION"] == "ieee":  # without tensor cores
        return [_config(64, 16, 2, 16), _config(16, 8, 2, 16)]
    if constants["PRECISION"] == "tf32":
        return [_config(64, 16, 3, 16), _config(32, 8, 3)]
    return [_config(64, 8, 4), _config(64, 16, 3), _config(32, 8, 4), _config(32, 8, 3)]


def _configs(constants: Constants) -> list[Config]:
    configs = _dgrad_configs(constants)
    if constants["PRECISION"] == "ieee":  # with 64 rows Triton 3.6 spills
        configs.insert(0, _config(32, 16, 2, 16))
    if constants["PRECISION"] == "half" and constants["OUTPUTS_PAD"] <= _BLOCK.value:
        configs.append(_config(128, 16, 4))  # with more outputs an A100 has too few registers
    return configs


POINT_HEAD = Kernel("point_head.forward", _point_head, _configs)
DGRAD = Kernel("point_head.dgrad", _dgrad, _dgrad_configs)
PACK = Kernel("point_head.pack", _pack, lambda constants: [Config({"BLOCK_R": 32, "BLOCK_C": 128})])


@dataclass(frozen=True)
class Packed:
    """The layers of one MLP as the kernels read them.

    Attributes:
        weights: [rows, columns], row-major. The rows are the outputs of the hidden layers
            (`HIDDEN_PAD` each), then those of the predictor; the columns are the layer's own input,
            then, from max(FINE_PAD, HIDDEN_PAD), the coarse logits. What does not exist is zero.
        biases: fp32 [rows].
        sizes: the widths, with and without padding, under the kernels' names for them.
        precision: how they are multiplied: "half" in 16 bits, else "ieee" or "tf32".
    """

    weights: Tensor
    biases: Tensor
    sizes: Constants
    precision: str


def unsupported(fine_map: Tensor, coarse_map: Tensor, weights: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot run this MLP on these maps; None if they can."""
    tensors = {"fine_map": fine_map, "coarse_map": coarse_map}
    tensors |= {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the kernels take float32, float16 and bfloat16"
    widths = [weight.shape[0] for weight in weights[:-1]]
    if len(set(widths)) > 1:
        return f"the hidden layers are {widths} wide; the kernels take layers of one width"
    if widths and not 1 <= widths[0] <= WIDEST:
        return f"the hidden layers are {widths[0]} wide; the kernels take 1 to {WIDEST}"
    return None


def pack(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    fine_channels: int,
    classes: int,
    coarse_each_layer: bool,
    dtype: torch.dtype,
    precision: str = "ieee",
) -> Packed:
    """Puts the layers of an MLP into the form that the kernels read, in one launch.

    Args:
        weights: hidden layers first, the predictor last, [out, in] or [out, in, 1], any strides.
        biases: one [out] for each weight.
        fine_channels, classes: channels of the fine and of the coarse map.
        coarse_each_layer: whether every layer reads the coarse logits, or the first only.
        dtype: of the result, and so of the arithmetic.
        precision: "ieee" or "tf32", how fp32 is multiplied; other types are not asked.
    """
    precision = precision if dtype == torch.float32 else "half"
    sizes = _sizes(weights, fine_channels, classes)
    sizes["EACH_LAYER"] = coarse_each_layer
    rows = sum(_heights(sizes))
    columns = max(sizes["FINE_PAD"], sizes["HIDDEN_PAD"]) + sizes["CLASSES_PAD"]
    matrix = torch.empty(rows, columns, dtype=dtype, device=weights[0].device)
    packed = Packed(matrix, matrix.new_empty(rows, dtype=torch.float32), sizes, precision)
    tallest = max(_heights(sizes))
    PACK(
        lambda meta: (
            cdiv(tallest, meta["BLOCK_R"]),
            len(weights),
            cdiv(columns, meta["BLOCK_C"]),
        ),
        matrix,
        packed.biases,
        tuple(weights),
        tuple(biases),
        tuple(weight.stride(0) for weight in weights),
        tuple(weight.stride(1) for weight in weights),
        tuple(bias.stride(0) for bias in biases),
        **sizes,
        PRECISION=precision,
    )
    return packed


def forward(
    fine_map: Tensor,
    coarse_map: Tensor,
    coords: Tensor,
    packed: Packed,
    *,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The MLP at points.

    Args:
        fine_map: [N, F, H, W], any strides, as the next two.
        coarse_map: [N, C, H', W'].
        coords: [N, P, 2], or [1, P, 2] shared by all images; half precision is widened.
        save: whether backward will be called.

    Returns:
        logits [N, O, P] in the packed dtype; what `mlp_backward` needs, [N * P, `saved_width`] or,
        without `save`, [0, `saved_width`].
    """
    n, points = fine_map.shape[0], coords.shape[1]
    logits = packed.weights.new_empty(n, packed.sizes["OUTPUTS"], points)
    saved = _launch(
        fine_map,
        coarse_map,
        packed,
        points,
        coords=coords.expand(n, -1, -1),
        logits=logits.unsqueeze(2),
        save=save,
    )
    return logits, saved if save else saved.new_empty(0, sum(_widths(packed.sizes)))


def refine_cells(
    fine_map: Tensor,
    coarse_map: Tensor,
    indices: Tensor,
    grid_size: tuple[int, int],
    packed: Packed,
    *,
    logits: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """The MLP at the centres of cells of a grid, whose results it replaces in place.

    Args:
        fine_map, coarse_map: as in `forward`.
        indices: int64 [N, k], flat cells of the grid; a cell may occur twice.
        grid_size: (height, width) of the grid.
        logits: [N, O, height, width] of any strides and floating type.
        labels: uint8 or int64 [N, height, width]: the class of the largest logit as it is stored,
            the lowest of equals; for O = 1 whether the logit is positive.
    """
    _launch(
        fine_map,
        coarse_map,
        packed,
        indices.shape[1],
        indices=indices,
        grid_size=grid_size,
        logits=logits,
        labels=labels,
    )


def _launch(
    fine_map: Tensor,
    coarse_map: Tensor,
    packed: Packed,
    points: int,
    *,
    coords: Tensor | None = None,
    indices: Tensor | None = None,
    grid_size: tuple[int, int] = (1, 1),
    logits: Tensor | None = None,
    labels: Tensor | None = None,
    save: bool = False,
) -> Tensor:
    """Returns the scratch, a row for each point; `_widths` tells its columns with `save`."""
    n = fine_map.shape[0]
    columns = sum(_widths(packed.sizes)) if save else packed.weights.shape[1]
    scratch = packed.weights.new_empty(n * points, columns)
    if n * points == 0:
        return scratch
    height, width = grid_size
    POINT_HEAD(
        lambda meta: (n * cdiv(points, meta["ROWS"]),),
        fine_map,
        coarse_map,
        coords,
        indices,
        packed.weights,
        packed.biases,
        scratch,
        logits,
        labels,
        points,
        *fine_map.shape[2:],
        *fine_map.stride(),
        *coarse_map.shape[2:],
        *coarse_map.stride(),
        *(coords.stride() if coords is not None else (0, 0, 0)),
        *(indices.stride() if indices is not None else (0, 0)),
        width,
        1.0 / width,
        1.0 / height,
        *(logits.stride() if logits is not None else (0, 0, 0, 0)),
        *(labels.stride() if labels is not None else (0, 0, 0)),
        size=(n * points,),
        **packed.sizes,
        SAVE=save,
        PRECISION=packed.precision,
    )
    return scratch


def mlp_backward(
    grad: Tensor, saved: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The gradients of `forward`'s MLP; those of the maps are `point_sample`'s of the first two.

    Args:
        grad: [N, O, P], any strides.
        saved: from `forward`, with `save`.

    Returns:
        of the sampled features [N, F, P] and the sampled coarse logits [N, C, P], views with the
        channels innermost; of the weights, each [out, in]; these in the packed dtype; of the
        biases, in fp32.
    """
    n, _, points = grad.shape
    sizes, matrix = packed.sizes, packed.weights
    gradients = matrix.new_empty(n * points, matrix.shape[0])
    if n * points > 0:
        names = ("FINE_PAD", "CLASSES_PAD", "HIDDEN_PAD", "LAYERS", "OUTPUTS", "OUTPUTS_PAD")
        DGRAD(
            lambda meta: (n * cdiv(points, meta["ROWS"]),),
            grad,
            saved,
            matrix,
            gradients,
            points,
            *grad.stride(),
            size=(n * points,),
            **{name: sizes[name] for name in names},
            PRECISION=packed.precision,
        )
    *inputs, coarse = saved.split(_widths(sizes), 1)
    heights = _heights(sizes)
    layers = gradients.split(heights, 1)
    # the layers that read the coarse logits, all at once
    readers = gradients if sizes["EACH_LAYER"] else layers[0]
    d_fine = layers[0] @ matrix[: layers[0].shape[1], : sizes["FINE_PAD"]]
    d_coarse = readers @ matrix[: readers.shape[1], -sizes["CLASSES_PAD"] :]
    of_coarse = (readers.T @ coarse)[:, : sizes["CLASSES"]]
    of_coarse = of_coarse.split(heights if sizes["EACH_LAYER"] else heights[:1])

    hidden = [sizes["HIDDEN"]] * sizes["LAYERS"]
    outs, ins = [*hidden, sizes["OUTPUTS"]], [sizes["FINE"], *hidden]
    d_weights, d_biases = [], []
    for i, layer in enumerate(layers):
        parts = [(layer.T @ inputs[i])[:, : ins[i]]]
        parts += of_coarse[i : i + 1]
        d_weights.append(torch.cat(parts, 1)[: outs[i]])
        d_biases.append(layer.sum(0, dtype=torch.float32)[: outs[i]])
    return (
        d_fine.view(n, points, sizes["FINE_PAD"])[..., : sizes["FINE"]].transpose(1, 2),
        d_coarse.view(n, points, sizes["CLASSES_PAD"])[..., : sizes["CLASSES"]].transpose(1, 2),
        d_weights,
        d_biases,
    )


def saved_width(fine_channels: int, classes: int, weights: Sequence[Tensor]) -> int:
    """Columns of what `forward` saves."""
    return sum(_widths(_sizes(weights, fine_channels, classes)))


def _sizes(weights: Sequence[Tensor], fine_channels: int, classes: int) -> Constants:
    layers, outputs = len(weights) - 1, weights[-1].shape[0]
    hidden = weights[0].shape[0] if layers else 0
    return {
        "FINE": fine_channels,
        "FINE_PAD": _round_up(fine_channels),
        "CLASSES": classes,
        "CLASSES_PAD": _round_up(classes),
        "HIDDEN": hidden,
        "HIDDEN_PAD": max(next_power_of_2(hidden), STEP),
        "LAYERS": layers,
        "OUTPUTS": outputs,
        "OUTPUTS_PAD": _round_up(outputs),
    }


def _widths(sizes: Constants) -> list[int]:
    """Columns of what `forward` saves: sampled features, each hidden layer, sampled logits."""
    return [sizes["FINE_PAD"], *_heights(sizes)[:-1], sizes["CLASSES_PAD"]]


def _heights(sizes: Constants) -> list[int]:
    """Rows of the packed weights: each hidden layer, the predictor."""
    return [sizes["HIDDEN_PAD"]] * sizes["LAYERS"] + [sizes["OUTPUTS_PAD"]]


def _round_up(width: int) -> int:
    return cdiv(width, STEP) * STEP
