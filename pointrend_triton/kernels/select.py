"""Exact top-k without a sort: the most uncertain cells of a map, the most uncertain candidates.

A value's rank is one integer: the value's order in its upper bits, the index in the lower ones, the
lowest first. No two ranks are the same, so ties need no rule of their own: the range from the
smallest rank to the largest is halved until exactly k ranks reach its lower end.

Rows up to SHORT_LIMIT are one program each, ranks in registers. Longer ones are counted by many
programs into bins of the upper nine bits; a second pass writes what lies above the bin of the k-th
value and lists what lies in it; one program a row then chooses among those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointrend_triton.kernels import grid
from pointrend_triton.kernels.launch import Constants, Kernel

SHORT_LIMIT = 8192
BINS = tl.constexpr(512)  # sign and exponent; more bins cost more than they save


@triton.jit
def _order(value):
    """A float's place among all fp32 values, in 32 bits: NaN is the largest, -0.0 is 0.0."""
    bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    order = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    order = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0xFFFFFFFF, order)
    return order.to(tl.int64)


@triton.jit
def _halve(low, high, count, middle, reached, k):
    """The half of [low, high] that holds the k-th largest, and how many reach its lower end."""
    enough = reached >= k
    low = tl.where(enough, middle, low)
    return low, tl.where(enough, high, middle - 1), tl.where(enough, reached, count)


@triton.jit
def _kth_largest(ranks, valid, count, k):
    """A number that k of the `count` valid ranks reach; no two are the same, invalid ones lower."""
    high = tl.max(ranks)
    low = tl.min(tl.where(valid, ranks, high))
    count = tl.zeros([], tl.int32) + count  # a count of 1 comes as a constant, loops want none
    while count > k:  # that many reach `low`, fewer than k what is above `high`
        middle = low + ((high - low + 1) >> 1)
        reached = tl.sum((ranks >= middle).to(tl.int32))
        low, high, count = _halve(low, high, count, middle, reached, k)
    return low


@triton.jit
def _kth_listed(listed, length, k, CHUNK: tl.constexpr):
    """The same for a list in memory, which is read once a round."""
    lane = tl.arange(0, CHUNK)
    first = tl.load(listed)
    lows = tl.zeros([CHUNK], tl.int64) + first
    highs = lows
    for start in range(0, length, CHUNK):
        ranks = tl.load(listed + start + lane, mask=start + lane < length, other=first)
        lows = tl.minimum(lows, ranks)
        highs = tl.maximum(highs, ranks)
    low = tl.min(lows)
    high = tl.max(highs)
    count = length
    while count > k:
        middle = low + ((high - low + 1) >> 1)
        reached = tl.zeros([CHUNK], tl.int32)
        for start in range(0, length, CHUNK):
            ranks = tl.load(listed + start + lane, mask=start + lane < length, other=-1)
            reached += (ranks >= middle).to(tl.int32)
        low, high, count = _halve(low, high, count, middle, tl.sum(reached), k)
    return low


@triton.jit
def _ranks(values, index, n, SPAN: tl.constexpr):
    """The ranks of a row's values, lower beyond its end; SPAN is a power of two, at least n."""
    order = _order(tl.load(values + index, mask=index < n, other=float("-inf")))
    return order * SPAN + (SPAN - 1 - index)


@triton.jit
def _tile(BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """0 to BLOCK - 1 as a tile, row by row."""
    rows = tl.arange(0, BLOCK // COLUMNS)
    return rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _before(ones):
    """How many of a tile's ones precede each of its elements, column by column, and their sum.

    A thread has whole columns: a scan along the threads costs as many steps as there are warps.
    """
    columns = tl.sum(ones, 0)
    before = tl.cumsum(columns) - columns
    return before[None, :] + tl.cumsum(ones, 0) - ones, tl.sum(columns)


@triton.jit
def _write(indices, coords, place, index, chosen, width, step_x, step_y):
    """Indices to their places, with the centres of those cells unless `coords` is None."""
    tl.store(indices + place, index.to(tl.int64), mask=chosen)
    if coords is not None:
        x, y = grid.cell_centre(index, width, step_x, step_y)
        tl.store(coords + 2 * place, x, mask=chosen)
        tl.store(coords + 2 * place + 1, y, mask=chosen)


@triton.jit(do_not_specialize=["k", "width"])
def _short_kernel(
    values,
    indices,
    coords,
    row_stride,
    n,
    k,
    width,
    step_x,
    step_y,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program i chooses the k largest of row i, in ascending order of their indices."""
    row = tl.program_id(0).to(tl.int64)
    values += row * row_stride
    indices += row * k
    if coords is not None:
        coords += row * k * 2
    index = tl.arange(0, BLOCK)
    low = _kth_largest(_ranks(values, index, n, BLOCK), index < n, n, k)
    tile = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, COLUMNS)[None, :]
    first = 0
    for start in range(0, n, 4 * COLUMNS):
        chosen = _ranks(values, start + tile, n, BLOCK) >= low
        before, total = _before(chosen.to(tl.int32))
        _write(indices, coords, first + before, start + tile, chosen, width, step_x, step_y)
        first += total


@triton.jit(do_not_specialize=["k", "num_random"])
def _points_kernel(
    scores,
    candidates,
    random,
    coords,
    row_stride,
    n,
    k,
    num_random,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program i writes row i's k candidates of the largest scores, then its random points."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * row_stride
    candidates += row * n * 2
    random += row * num_random * 2
    coords += row * (k + num_random) * 2
    if k > 0:
        index = tl.arange(0, BLOCK)
        low = _kth_largest(_ranks(scores, index, n, BLOCK), index < n, n, k)
        tile = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, COLUMNS)[None, :]
        first = 0
        for start in range(0, n, 4 * COLUMNS):
            chosen = _ranks(scores, start + tile, n, BLOCK) >= low
            before, total = _before(chosen.to(tl.int32))
            x = tl.load(candidates + 2 * (start + tile), mask=chosen)
            y = tl.load(candidates + 2 * (start + tile) + 1, mask=chosen)
            tl.store(coords + 2 * (first + before), x, mask=chosen)
            tl.store(coords + 2 * (first + before) + 1, y, mask=chosen)
            first += total
    coords += 2 * k
    for start in range(0, 2 * num_random, COLUMNS):
        index = start + tl.arange(0, COLUMNS)
        inside = index < 2 * num_random
        tl.store(coords + index, tl.load(random + index, mask=inside), mask=inside)


@triton.jit
def _histogram_kernel(values, counters, row_stride, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Adds how many of BLOCK * STEPS values lie in each bin to the row's counters."""
    spans = tl.cdiv(n, BLOCK * STEPS)
    row = (tl.program_id(0) // spans).to(tl.int64)
    start = tl.program_id(0) % spans * (BLOCK * STEPS)
    values += row * row_stride
    counts = tl.zeros([BINS], tl.int32)
    for step in range(STEPS):
        index = start + step * BLOCK + tl.arange(0, BLOCK)
        order = _order(tl.load(values + index, mask=index < n, other=float("-inf")))
        # beyond the row is the lowest bin, whose count decides nothing
        counts += tl.histogram((order >> 23).to(tl.int32), BINS)
    bins = tl.arange(0, BINS)
    counters += row * (BINS + 1)
    tl.atomic_add(counters + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["row_stride", "k", "width"])
def _filter_kernel(
    values,
    counters,
    listed,
    indices,
    coords,
    row_stride,
    n,
    k,
    width,
    step_x,
    step_y,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of BLOCK values, writes those above the k-th one's bin and lists the ranks of those in it.

    The last counter of a row counts both: those written in its lower half, those listed above it.
    """
    blocks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    counters += row * (BINS + 1)
    index = start + _tile(BLOCK, COLUMNS)
    valid = index < n
    value = tl.load(values + row * row_stride + index, mask=valid, other=0.0)
    from_top = tl.cumsum(tl.load(counters + BINS - 1 - tl.arange(0, BINS)).to(tl.int32))
    kth_bin = BINS - 1 - tl.sum((from_top < k).to(tl.int32))
    order = _order(value)
    bins = (order >> 23).to(tl.int32)
    above = valid & (bins > kth_bin)
    within = valid & (bins == kth_bin)
    both = above.to(tl.int32) + (within.to(tl.int32) << 16)
    total = tl.sum(both)
    if coords is not None:
        coords += row * k * 2
    if total > 0:
        wide = (total & 0xFFFF) + ((total >> 16).to(tl.int64) << 32)
        before = tl.atomic_add(counters + BINS, wide, sem="relaxed")
        place, total = _before(both)
        written = (before & 0xFFFFFFFF).to(tl.int32) + (place & 0xFFFF)
        _write(indices + row * k, coords, written, index, above, width, step_x, step_y)
        ranks = order * SPAN + (SPAN - 1 - index)
        tl.store(listed + row * n + (before >> 32) + (place >> 16), ranks, mask=within)


@triton.jit(do_not_specialize=["n", "k", "width"])
def _finish_kernel(
    counters,
    listed,
    indices,
    coords,
    n,
    k,
    width,
    step_x,
    step_y,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program i writes the largest of those listed for row i, behind what is already written."""
    row = tl.program_id(0).to(tl.int64)
    both = tl.load(counters + row * (BINS + 1) + BINS)
    written = (both & 0xFFFFFFFF).to(tl.int32)
    count = (both >> 32).to(tl.int32)
    listed += row * n
    if count <= BLOCK:
        lane = tl.arange(0, BLOCK)
        ranks = tl.load(listed + lane, mask=lane < count, other=-1)
        low = _kth_largest(ranks, lane < count, count, k - written)
    else:
        low = _kth_listed(listed, count, k - written, 8 * COLUMNS)
    indices += row * k
    if coords is not None:
        coords += row * k * 2
    for start in range(0, count, 8 * COLUMNS):
        place = start + _tile(8 * COLUMNS, COLUMNS)
        ranks = tl.load(listed + place, mask=place < count, other=-1)
        chosen = ranks >= low
        before, total = _before(chosen.to(tl.int32))
        index = (SPAN - 1 - (ranks & (SPAN - 1))).to(tl.int32)
        _write(indices, coords, written + before, index, chosen, width, step_x, step_y)
        written += total


def _by_threads(constants: Constants) -> list[triton.Config]:
    """16 ranks a thread, or 32; 32 warps leave 64 registers a thread, too few."""
    block = constants["BLOCK"]
    warps = {min(max(block // (32 * each), 1), 16) for each in (16, 32)}
    return [
        triton.Config({"COLUMNS": min(block // 4, 32 * count)}, num_warps=count)
        for count in sorted(warps, reverse=True)
    ]


# a fused multiply-add would round the centres otherwise than torch does
SHORT = Kernel("select.short", _short_kernel, _by_threads, enable_fp_fusion=False)
POINTS = Kernel("select.points", _points_kernel, _by_threads)
HISTOGRAM = Kernel(
    "select.histogram",
    _histogram_kernel,
    lambda constants: [
        triton.Config({"BLOCK": 2048, "STEPS": 2}, num_warps=4),
        triton.Config({"BLOCK": 2048, "STEPS": 1}, num_warps=4),
        triton.Config({"BLOCK": 4096, "STEPS": 2}, num_warps=8),
    ],
    changes=["counters"],
)
FILTER = Kernel(
    "select.filter",
    _filter_kernel,
    lambda constants: [
        triton.Config({"BLOCK": 1024, "COLUMNS": 128}, num_warps=4),
        triton.Config({"BLOCK": 2048, "COLUMNS": 128}, num_warps=4),
        triton.Config({"BLOCK": 2048, "COLUMNS": 256}, num_warps=8),
    ],
    changes=["counters"],
    enable_fp_fusion=False,
)
FINISH = Kernel(
    "select.finish",
    _finish_kernel,
    lambda constants: [
        triton.Config({"BLOCK": 8192, "COLUMNS": 512}, num_warps=16),
        triton.Config({"BLOCK": 16384, "COLUMNS": 512}, num_warps=16),
        triton.Config({"BLOCK": 8192, "COLUMNS": 256}, num_warps=8),
    ],
    enable_fp_fusion=False,
)


def topk(values: Tensor, k: int, workspace: Tensor | None = None) -> Tensor:
    """The k largest of each row; NaN is the largest, of equal values the lowest index wins.

    Args:
        values: [N, n] fp32, fp16 or bf16, unit stride along a row.
        k: 1 to n.
        workspace: int64 zeros of `workspace_shape(N, n)`, which are changed; None makes them.

    Returns:
        column indices int64 [N, k]; their order is ascending for short rows, any for long ones.
    """
    indices = torch.empty((len(values), k), dtype=torch.int64, device=values.device)
    _topk(values, indices, None, 1, 1, workspace)
    return indices


def topk_on_grid(
    uncertainty: Tensor, k: int, workspace: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest cells of each map, as in `topk`.

    Args:
        uncertainty: [N, 1, H, W] fp32, fp16 or bf16; copied where the cells are not one row.
        k: at least 0.
        workspace: as in `topk`, for n = H * W.

    Returns:
        flat cell indices int64 [N, k'] and their centres fp32 [N, k', 2], k' = min(k, H * W).
    """
    height, width = uncertainty.shape[2:]
    values = uncertainty.reshape(len(uncertainty), height * width)
    if values.stride(1) != 1:
        values = values.contiguous()
    k = min(k, height * width)
    indices = torch.empty((len(values), k), dtype=torch.int64, device=values.device)
    coords = torch.empty((len(values), k, 2), dtype=torch.float32, device=values.device)
    _topk(values, indices, coords, height, width, workspace)
    return indices, coords


def workspace_shape(rows: int, n: int) -> tuple[int, int]:
    """The counters that rows of n values need: none for short ones."""
    return rows, BINS.value + 1 if n > SHORT_LIMIT else 0


def select_points(scores: Tensor, candidates: Tensor, random: Tensor, num_uncertain: int) -> Tensor:
    """The candidates of the largest scores, then the random points.

    Args:
        scores: [N, K] fp32, unit stride along a row.
        candidates: [N, K, 2] fp32.
        random: [N, R, 2] fp32.
        num_uncertain: 0 to K.

    Returns:
        fp32 [N, num_uncertain + R, 2].
    """
    n, num_candidates = scores.shape
    num_random = random.shape[1]
    if num_candidates > SHORT_LIMIT and num_uncertain > 0:
        chosen = topk(scores, num_uncertain).unsqueeze(2).expand(-1, -1, 2)
        return torch.cat([candidates.gather(1, chosen), random], dim=1)
    shape = (n, num_uncertain + num_random, 2)
    coords = torch.empty(shape, dtype=torch.float32, device=scores.device)
    POINTS(
        lambda constants: (n,),
        scores,
        candidates.contiguous(),
        random.contiguous(),
        coords,
        scores.stride(0),
        num_candidates,
        num_uncertain,
        num_random,
        size=(n,),
        BLOCK=max(triton.next_power_of_2(num_candidates), 32),
    )
    return coords


def _topk(
    values: Tensor,
    indices: Tensor,
    coords: Tensor | None,
    height: int,
    width: int,
    workspace: Tensor | None,
) -> None:
    """Writes the indices and, unless None, the centres of the k = indices.shape[1] largest."""
    rows, n = values.shape
    k = indices.shape[1]
    if indices.numel() == 0:
        return
    cells = (width, 1.0 / width, 1.0 / height)
    span = triton.next_power_of_2(n)
    if n <= SHORT_LIMIT:
        SHORT(
            lambda constants: (rows,),
            values,
            indices,
            coords,
            values.stride(0),
            n,
            k,
            *cells,
            size=(rows,),
            BLOCK=max(span, 32),
        )
        return
    device = values.device
    counters = workspace
    if counters is None:
        counters = torch.zeros(workspace_shape(rows, n), dtype=torch.int64, device=device)
    listed = torch.empty((rows, n), dtype=torch.int64, device=device)
    HISTOGRAM(
        lambda constants: (rows * triton.cdiv(n, constants["BLOCK"] * constants["STEPS"]),),
        values,
        counters,
        values.stride(0),
        n,
        size=(rows * n,),
    )
    FILTER(
        lambda constants: (rows * triton.cdiv(n, constants["BLOCK"]),),
        values,
        counters,
        listed,
        indices,
        coords,
        values.stride(0),
        n,
        k,
        *cells,
        size=(rows * n,),
        SPAN=span,
    )
    FINISH(
        lambda constants: (rows,),
        counters,
        listed,
        indices,
        coords,
        n,
        k,
        *cells,
        size=(rows,),
        SPAN=span,
    )
