"""Sampling a map at points, and the gradient to the map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointrend_triton.kernels import grid
from pointrend_triton.kernels.launch import Constants, Kernel


@triton.jit
def _load_coords(coords, point, mask, stride_p, stride_xy):
    """Coordinates (x, y) of points in fp32; 0 where masked."""
    place = coords + point.to(tl.int64) * stride_p
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(place + stride_xy, mask=mask, other=0.0).to(tl.float32)
    return x, y


@triton.jit(do_not_specialize=["height", "width", "coords_n"])
def _forward(
    out,
    input,
    coords,
    num_points,
    channels,
    height,
    width,
    input_n,
    input_c,
    input_h,
    input_w,
    coords_n,
    coords_p,
    coords_xy,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile [BLOCK_C channels, BLOCK_P points] of one map.

    Args:
        out: [N, C, P] contiguous, written.
        input: [N, C, H, W] with the strides input_*.
        coords: [N, P, 2] with the strides coords_*.
    """
    blocks, groups = tl.cdiv(num_points, BLOCK_P), tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks
    n = (tile // groups).to(tl.int64)
    point = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tile % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    is_point, is_channel = point < num_points, (channel < channels)[:, None]
    x, y = _load_coords(coords + n * coords_n, point, is_point, coords_p, coords_xy)
    source = input + n * input_n + (channel.to(tl.int64) * input_c)[:, None]
    if NEAREST:
        column, has_column = grid.nearest_tap(x, width, ALIGN, BORDER)
        row, has_row = grid.nearest_tap(y, height, ALIGN, BORDER)
        cell = row.to(tl.int64) * input_h + column.to(tl.int64) * input_w
        mask = is_channel & (is_point & has_row & has_column)[None, :]
        value = tl.load(source + cell[None, :], mask=mask, other=0)
    else:
        column, right, has_left, has_right = grid.linear_taps(x, width, ALIGN, BORDER)
        row, bottom, has_top, has_bottom = grid.linear_taps(y, height, ALIGN, BORDER)
        cell = row.to(tl.int64) * input_h + column.to(tl.int64) * input_w
        taps = source + cell[None, :]
        # all four loads before the arithmetic, so that they are under way together
        a = tl.load(taps, mask=is_channel & (is_point & has_top & has_left)[None, :], other=0)
        taps += input_w
        b = tl.load(taps, mask=is_channel & (is_point & has_top & has_right)[None, :], other=0)
        taps += input_h
        d = tl.load(taps, mask=is_channel & (is_point & has_bottom & has_right)[None, :], other=0)
        taps -= input_w
        c = tl.load(taps, mask=is_channel & (is_point & has_bottom & has_left)[None, :], other=0)
        left, top = 1.0 - right, 1.0 - bottom
        value = a.to(tl.float32) * (top * left)[None, :]
        value += b.to(tl.float32) * (top * right)[None, :]
        value += c.to(tl.float32) * (bottom * left)[None, :]
        value += d.to(tl.float32) * (bottom * right)[None, :]
    place = out + (n * channels + channel)[:, None] * num_points + point[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=is_channel & is_point[None, :])


@triton.jit
def _taps(
    coords,
    tap,
    mask,
    height,
    width,
    coords_p,
    coords_xy,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The flat cell of each tap, -1 off the map, and its weight.

    A tap is a point where NEAREST, else 4 * point + corner (0 to 3: top left, top right, bottom
    left, bottom right).
    """
    if NEAREST:
        x, y = _load_coords(coords, tap, mask, coords_p, coords_xy)
        column, has_column = grid.nearest_tap(x, width, ALIGN, BORDER)
        row, has_row = grid.nearest_tap(y, height, ALIGN, BORDER)
        weight = tl.full(tap.shape, 1.0, tl.float32)
    else:
        x, y = _load_coords(coords, tap // 4, mask, coords_p, coords_xy)
        column, right, has_left, has_right = grid.linear_taps(x, width, ALIGN, BORDER)
        row, bottom, has_top, has_bottom = grid.linear_taps(y, height, ALIGN, BORDER)
        is_right, is_bottom = tap % 2 != 0, tap // 2 % 2 != 0
        column, row = column + is_right, row + is_bottom
        has_column = tl.where(is_right, has_right, has_left)
        has_row = tl.where(is_bottom, has_bottom, has_top)
        weight = tl.where(is_right, right, 1.0 - right) * tl.where(is_bottom, bottom, 1.0 - bottom)
    return tl.where(mask & has_row & has_column, row * width + column, -1), weight


@triton.jit(do_not_specialize=["num_taps", "height", "width", "coords_n"])
def _link(
    head,
    next,
    weights,
    coords,
    num_taps,
    height,
    width,
    coords_n,
    coords_p,
    coords_xy,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts every tap that is on the map at the front of its cell's list.

    Args:
        head: [N, H * W] int32, the first tap of each cell's list, -1 at the start; changed.
        next: [N, T] int32, the tap behind each tap, -1 behind the last; written for linked taps.
        weights: [N, T] fp32, written.
        coords: [N, P, 2] with the strides coords_*.
    """
    blocks = tl.cdiv(num_taps, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    tap = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = tap < num_taps
    coords += n * coords_n
    cell, weight = _taps(
        coords, tap, mask, height, width, coords_p, coords_xy, NEAREST, BORDER, ALIGN
    )
    front = head + n * height * width + cell
    behind = tl.atomic_xchg(front, tap, mask=cell >= 0, sem="relaxed")
    tl.store(next + n * num_taps + tap, behind, mask=cell >= 0)
    tl.store(weights + n * num_taps + tap, weight, mask=mask)


@triton.jit(do_not_specialize=["num_taps", "height", "width", "coords_n"])
def _cells(
    cells,
    weights,
    coords,
    num_taps,
    height,
    width,
    coords_n,
    coords_p,
    coords_xy,
    NEAREST: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the flat cell of every tap, -1 off the map, to cells [N, T] int32, and its weight."""
    blocks = tl.cdiv(num_taps, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    tap = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = tap < num_taps
    coords += n * coords_n
    cell, weight = _taps(
        coords, tap, mask, height, width, coords_p, coords_xy, NEAREST, BORDER, ALIGN
    )
    tl.store(cells + n * num_taps + tap, cell, mask=mask)
    tl.store(weights + n * num_taps + tap, weight, mask=mask)


@triton.jit(do_not_specialize=["num_taps", "num_cells"])
def _link_sorted(head, next, cells, taps, num_taps, num_cells, BLOCK: tl.constexpr):
    """Makes the lists of `_link` out of taps that are sorted by cell, in that order.

    Args:
        head: [N, H * W] int32, -1 at the start; changed.
        next: [N, T] int32, written.
        cells: [N, T] int32, ascending in each row.
        taps: [N, T] int64, the tap of each entry of cells.
    """
    blocks = tl.cdiv(num_taps, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_taps
    head, next = head + n * num_cells, next + n * num_taps
    cells, taps = cells + n * num_taps + i, taps + n * num_taps + i
    cell, tap = tl.load(cells, mask=mask, other=-1), tl.load(taps, mask=mask, other=0)
    before = tl.load(cells - 1, mask=mask & (i > 0), other=-1)
    tl.store(head + cell, tap.to(tl.int32), mask=mask & (cell >= 0) & (cell != before))
    has_after = i < num_taps - 1
    after = tl.load(taps + 1, mask=has_after, other=-1).to(tl.int32)
    is_same = tl.load(cells + 1, mask=has_after, other=-2) == cell
    tl.store(next + tap, tl.where(is_same, after, -1), mask=mask)


@triton.jit(do_not_specialize=["num_cells", "head_n", "next_n"])
def _backward(
    grad_input,
    grad,
    head,
    next,
    weights,
    channels,
    num_cells,
    input_n,
    input_c,
    input_cell,
    grad_n,
    grad_c,
    grad_p,
    head_n,
    next_n,
    CORNERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One tile [BLOCK_C channels, BLOCK_S cells] of one map: walks the cells' lists.

    Args:
        grad_input: [N, C, H * W] with the strides input_*, all written: cells without taps are 0.
        grad: [N, C, P] with the strides grad_*.
        head: [N, H * W] int32, rows head_n apart: the first tap of each cell's list, or -1.
        next, weights: [N, T], rows next_n apart, T = CORNERS * P.
    """
    blocks, groups = tl.cdiv(num_cells, BLOCK_S), tl.cdiv(channels, BLOCK_C)
    tile = tl.program_id(0) // blocks
    n = (tile // groups).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    channel = (tile % groups * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    is_cell, is_channel = cell < num_cells, (channel < channels)[:, None]
    source = grad + n * grad_n + (channel * grad_c)[:, None]
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    tap = tl.load(head + n * head_n + cell, mask=is_cell, other=-1)
    while tl.max(tap) >= 0:
        is_tap = tap >= 0
        weight = tl.load(weights + n * next_n + tap, mask=is_tap, other=0.0)
        place = source + ((tap // CORNERS).to(tl.int64) * grad_p)[None, :]
        value = tl.load(place, mask=is_channel & is_tap[None, :], other=0.0)
        total += weight[None, :] * value.to(tl.float32)
        tap = tl.load(next + n * next_n + tap, mask=is_tap, other=-1)
    place = grad_input + n * input_n + (channel * input_c)[:, None]
    place += (cell.to(tl.int64) * input_cell)[None, :]
    tl.store(place, total.to(grad_input.dtype.element_ty), mask=is_channel & is_cell[None, :])


def _forward_configs(constants: Constants) -> list[triton.Config]:
    width = constants["BLOCK_C"]
    if width <= 8:  # lanes along the points
        sizes = [(128, 4), (256, 4), (256, 8), (64, 2)]
    else:  # lanes along the channels
        # with fewer elements a thread, each thread works out the places of more points than it has
        sizes = [(4096 // width, 4), (8192 // width, 8)] + [(2048 // width, 4)] * (width > 32)
    return [triton.Config({"BLOCK_P": size}, num_warps=warps) for size, warps in sizes]


def _backward_configs(constants: Constants) -> list[triton.Config]:
    width = constants["BLOCK_C"]
    if width <= 8:
        sizes = [(128, 4), (256, 4), (64, 2)]
    else:
        sizes = [(4096 // width, 4), (2048 // width, 4), (1024 // width, 2), (512 // width, 1)]
    return [triton.Config({"BLOCK_S": size}, num_warps=warps) for size, warps in sizes]


def _link_configs(constants: Constants) -> list[triton.Config]:
    return [triton.Config({"BLOCK": size}, num_warps=size // 32) for size in (128, 256)]


FORWARD = Kernel("point_sample.forward", _forward, _forward_configs)
# fused, other points than torch's are ties
NEAREST = Kernel("point_sample.nearest", _forward, _forward_configs, enable_fp_fusion=False)
LINK = Kernel("point_sample.link", _link, _link_configs, changes=["head"], enable_fp_fusion=False)
CELLS = Kernel("point_sample.cells", _cells, _link_configs, enable_fp_fusion=False)
LINK_SORTED = Kernel("point_sample.link_sorted", _link_sorted, _link_configs)
BACKWARD = Kernel("point_sample.backward", _backward, _backward_configs)


def forward(
    input: Tensor,
    coords: Tensor,
    *,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Samples maps [N, C, H, W] at coords [N or 1, P, 2]: [N, C, P] contiguous of `out_dtype`.

    Args:
        input: bool, an integer type up to 64 bits (uint8 the only unsigned one), fp16, bf16 or
            fp32; any strides.
        coords: fp32, fp16 or bf16; any strides; one row is shared by all maps.
        mode: "bilinear" or "nearest".
        padding_mode: "zeros" or "border".
    """
    n, channels, height, width = input.shape
    num_points = coords.shape[1]
    out = torch.empty(n, channels, num_points, dtype=out_dtype, device=input.device)
    if out.numel() == 0:
        return out
    coords = coords.expand(n, -1, -1)
    block_c = _block_c(channels, input.stride(1))
    kernel = FORWARD if mode == "bilinear" else NEAREST
    kernel(
        lambda c: (n * triton.cdiv(channels, block_c) * triton.cdiv(num_points, c["BLOCK_P"]),),
        out,
        input,
        coords,
        num_points,
        channels,
        height,
        width,
        *input.stride(),
        *coords.stride(),
        size=(n * num_points, channels),
        NEAREST=mode == "nearest",
        BORDER=padding_mode == "border",
        ALIGN=align_corners,
        BLOCK_C=block_c,
    )
    return out


def backward(
    grad: Tensor,
    coords: Tensor,
    *,
    shape: tuple[int, int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    deterministic: bool,
) -> Tensor:
    """The gradient to the map: each cell sums over its taps in fp32 and is rounded once.

    Args:
        grad: [N, C, P], any strides.
        coords: as in `forward`.
        shape: (N, C, H, W), of the map and of the result.
        channels_last: the layout of the result; False is contiguous.
        dtype: of the result.
        deterministic: sums in the order of the points; else two runs may differ by rounding.
    """
    n, channels, height, width = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_input = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=layout)
    if grad_input.numel() == 0:
        return grad_input
    if channels > 1 and grad.stride(1) > 1:
        # a tap reads all channels of a point: each would be a memory sector of its own
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    num_cells = height * width
    block_c = _block_c(channels, grad.stride(1))
    head, next, weights = _lists(
        coords,
        height,
        width,
        deterministic=deterministic,
        NEAREST=mode == "nearest",
        BORDER=padding_mode == "border",
        ALIGN=align_corners,
    )
    BACKWARD(
        lambda c: (n * triton.cdiv(channels, block_c) * triton.cdiv(num_cells, c["BLOCK_S"]),),
        grad_input,
        grad,
        head,
        next,
        weights,
        channels,
        num_cells,
        channels * num_cells,
        *((1, channels) if channels_last else (num_cells, 1)),
        *grad.stride(),
        head.expand(n, -1).stride(0),  # 0 where the maps share one set of lists
        next.expand(n, -1).stride(0),
        size=(n * num_cells, channels, next.shape[1]),
        CORNERS=1 if mode == "nearest" else 4,
        BLOCK_C=block_c,
    )
    return grad_input


def _lists(
    coords: Tensor, height: int, width: int, *, deterministic: bool, **where: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The taps of each cell as linked lists: first [N, H * W], following and weights [N, T]."""
    n, num_taps = coords.shape[0], coords.shape[1] * (1 if where["NEAREST"] else 4)
    head = torch.full((n, height * width), -1, dtype=torch.int32, device=coords.device)
    next = torch.empty(n, num_taps, dtype=torch.int32, device=coords.device)
    weights = torch.empty(n, num_taps, dtype=torch.float32, device=coords.device)
    points: tuple[Tensor | int, ...] = (weights, coords, num_taps, height, width, *coords.stride())

    def launch(kernel: Kernel, *arguments: Tensor | int, **constants: bool) -> None:
        def grid(c: Constants) -> tuple[int]:
            return (n * triton.cdiv(num_taps, c["BLOCK"]),)

        kernel(grid, *arguments, size=(n * num_taps,), **constants)

    if not deterministic:
        launch(LINK, head, next, *points, **where)
    else:
        cells = torch.empty_like(next)
        launch(CELLS, cells, *points, **where)
        cells, taps = cells.sort(dim=1, stable=True)
        launch(LINK_SORTED, head, next, cells, taps, num_taps, height * width)
    return head, next, weights


def _block_c(channels: int, stride: int) -> int:
    """Channels of a tile: as many as make wide loads, or lie side by side, or share their taps."""
    most = 8 if stride != 1 else 32 if channels % 16 else 128
    return min(triton.next_power_of_2(channels), most)
