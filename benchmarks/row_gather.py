"""The floor of sampling: rows of a channels-last map, four per point, added up and nothing else."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # has no build outside Linux; CPU tensors do without
    triton = None


def taps(coords: Tensor, height: int, width: int) -> Tensor:
    """The four cells around points [N, P, 2] as rows of the maps' cells one after another: int32
    [N * P, 4], clamped at the border."""
    n = coords.shape[0]
    x, y = ((coords[..., i] * size - 0.5).floor().int() for i, size in ((0, width), (1, height)))
    first = torch.arange(n, device=coords.device, dtype=torch.int32)[:, None] * (height * width)
    cells = [
        first + (y + dy).clamp(0, height - 1) * width + (x + dx).clamp(0, width - 1)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    return torch.stack(cells, dim=2).view(-1, 4)


def gather(map: Tensor, rows: Tensor) -> Tensor:
    """Channels-last [N, C, H, W] and rows [M, 4] -> their sums [M, C]."""
    channels = map.shape[1]
    cells = map.permute(0, 2, 3, 1).reshape(-1, channels)
    if map.device.type == "cpu":
        return cells.index_select(0, rows.flatten()).view(-1, 4, channels).sum(1)
    return launch(cells, rows)


def launch(cells: Tensor, rows: Tensor) -> Tensor:
    count, channels = rows.shape[0], cells.shape[1]
    sums = cells.new_empty(count, channels)
    block_p, block_c = 8, triton.next_power_of_2(channels)
    _sum_rows[(triton.cdiv(count, block_p),)](
        cells, rows, sums, count, channels, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4
    )
    return sums


if triton is not None:

    @triton.jit
    def _sum_rows(cells, rows, sums, count, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
        c = tl.arange(0, BLOCK_C)
        inside = (p < count)[:, None] & (c < channels)[None, :]
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for tap in tl.static_range(4):
            row = tl.load(rows + p * 4 + tap, mask=p < count, other=0).to(tl.int64)
            total += tl.load(cells + (row * channels)[:, None] + c, mask=inside, other=0.0)
        to = sums + (p.to(tl.int64) * channels)[:, None] + c
        tl.store(to, total.to(sums.dtype.element_ty), mask=inside)
