"""ops.point_sample against a scalar twin: one point, one channel and one tap at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_within

from pointrend_triton import ops

MODES = ("bilinear", "nearest")
PADDINGS = ("zeros", "border")
NAN, INF = math.nan, math.inf


def position(coordinate, size, align_corners, real):
    """Where on the axis of cell indices a coordinate lies, rounded as grid_sample rounds it."""
    grid = real(2) * real(coordinate) - real(1)
    if align_corners:
        return (grid + real(1)) / real(2) * real(size - 1)
    return ((grid + real(1)) * real(size) - real(1)) / real(2)


def scalar_sample(cells, x, y, mode, padding_mode, align_corners, real):
    """One point of one channel: `cells` is a list of rows."""
    height, width = len(cells), len(cells[0])
    x, y = position(x, width, align_corners, real), position(y, height, align_corners, real)
    if padding_mode == "border":
        x = 0.0 if math.isnan(x) else min(max(x, 0), width - 1)
        y = 0.0 if math.isnan(y) else min(max(y, 0), height - 1)

    def cell(i, j):
        inside = 0 <= i < height and 0 <= j < width
        return cells[int(i)][int(j)] if inside else 0

    if mode == "nearest":
        return cell(np.rint(y), np.rint(x))  # halves to even
    left, top = math.floor(x), math.floor(y)
    right, bottom = x - left, y - top
    return (1 - bottom) * ((1 - right) * cell(top, left) + right * cell(top, left + 1)) + bottom * (
        (1 - right) * cell(top + 1, left) + right * cell(top + 1, left + 1)
    )


def slow_sample(input, coords, mode="bilinear", padding_mode="zeros", align_corners=False):
    """[N, C, P] in fp64; the cells of nearest points are found in the precision of `coords`."""
    exact = mode == "bilinear" or coords.dtype == torch.float64
    real = float if exact else np.float32
    out = torch.empty(*input.shape[:2], coords.shape[1], dtype=torch.float64)
    for n, points in enumerate(coords.expand(input.shape[0], -1, -1).tolist()):
        for c, cells in enumerate(input[n].tolist()):
            for p, (x, y) in enumerate(points):
                out[n, c, p] = scalar_sample(cells, x, y, mode, padding_mode, align_corners, real)
    return out


def torch_sample(input, coords, mode="bilinear", padding_mode="zeros", align_corners=False):
    grid = 2 * coords.expand(input.shape[0], -1, -1).unsqueeze(2) - 1
    return F.grid_sample(input, grid, mode, padding_mode, align_corners)[..., 0]


def numbered(n, c, height, width):
    """A map whose cells are all different and none zero."""
    return torch.arange(1.0, n * c * height * width + 1).view(n, c, height, width)


def awkward_points(height, width):
    """Every cell centre, edge and corner, points outside, and random ones: [1, P, 2]."""
    x = torch.arange(-3, 2 * width + 4) / (2 * width)
    y = torch.arange(-3, 2 * height + 4) / (2 * height)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2).flatten(0, 1)
    return torch.cat([grid, torch.rand(20, 2) * 1.6 - 0.3, torch.tensor([[-9.0, 9.0]])])[None]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5), (6, 7)])
def test_equals_the_scalar_twin(size, padding_mode, align_corners):
    input, coords = numbered(2, 2, *size), awkward_points(*size)
    how = {"padding_mode": padding_mode, "align_corners": align_corners}
    assert_within(
        ops.point_sample(input, coords, **how),
        torch_sample(input, coords, **how),
        slow_sample(input, coords, **how),
    )
    for dtype in (torch.float32, torch.float64, torch.int64, torch.uint8):
        cells, points = input.to(dtype), coords.double() if dtype == torch.float64 else coords
        out = ops.point_sample(cells, points, mode="nearest", **how)
        assert out.dtype == dtype
        assert torch.equal(out.double(), slow_sample(cells, points, "nearest", **how))


@pytest.mark.parametrize("size", [3, 7, 19, 255, 2048])
def test_nearest_ties_in_every_precision(size):
    """Cell edges k / W are ties; the float and the integer path pick the cell of the formula."""
    k = torch.arange(size + 1)
    coords = torch.stack([k / size, torch.full((size + 1,), 0.5)], dim=1)[None]
    grid = np.float32(2) * coords[0, :, 0].numpy() - np.float32(1)
    nearest = np.rint(((grid + np.float32(1)) * np.float32(size) - np.float32(1)) / np.float32(2))
    cells = torch.arange(1, size + 1)
    inside = torch.from_numpy((nearest >= 0) & (nearest < size))
    expected = torch.where(inside, torch.from_numpy(nearest).long() + 1, 0)
    for dtype in (torch.int64, torch.float32):
        out = ops.point_sample(cells.view(1, 1, 1, size).to(dtype), coords, mode="nearest")
        assert torch.equal(out[0, 0].long(), expected)


def test_exact_ties_go_to_the_even_cell():
    coords = torch.tensor([[[k / 4, 0.5] for k in range(5)]])
    cells = torch.arange(10, 14, dtype=torch.uint8).view(1, 1, 1, 4)
    out = ops.point_sample(cells, coords, mode="nearest")
    assert out.tolist() == [[[10, 10, 12, 12, 0]]]  # -0.5, 0.5, 1.5, 2.5, 3.5 -> 0, 0, 2, 2, 4


@given(data=st.data())
@settings(max_examples=80)
def test_property(data):
    n, c = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    number = st.floats(-0.5, 1.5, width=32) | st.sampled_from([k / 12 for k in range(-1, 14)])
    points = data.draw(st.lists(st.tuples(number, number), max_size=6))
    mode, padding_mode = data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from(PADDINGS))
    how = {"padding_mode": padding_mode, "align_corners": data.draw(st.booleans())}
    input = torch.randn(n, c, height, width)
    coords = torch.tensor(points).view(1, -1, 2)
    ours = ops.point_sample(input, coords, mode=mode, **how)
    exact = slow_sample(input, coords, mode, **how)
    if mode == "nearest":
        assert torch.equal(ours.double(), exact)
    else:
        assert_within(ours, torch_sample(input, coords, mode, **how), exact)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, -1e30])
def test_points_that_are_nowhere(value, mode):
    """Zero padding: zero, as with grid_sample on CUDA. Border: NaN is the first cell."""
    input = numbered(1, 1, 3, 4).requires_grad_()
    coords = torch.tensor([[[value, 0.5]]])
    zeros = ops.point_sample(input, coords, mode=mode)
    assert zeros.item() == 0
    assert torch.autograd.grad(zeros.sum(), input)[0].count_nonzero() == 0
    edge = 8 if value > 0 else 5
    assert ops.point_sample(input, coords, mode=mode, padding_mode="border").item() == edge
    labels = input.detach().to(torch.int64)
    for map in (input, labels):  # with aligned corners every number lies on a side's only cell
        column = ops.point_sample(map[..., :1], coords, mode=mode, align_corners=True).item()
        assert column == (5 if math.isfinite(value) else 0)
    assert ops.point_sample(labels, coords, mode="nearest").item() == 0
    border = ops.point_sample(labels, coords, mode="nearest", padding_mode="border")
    assert border.item() == edge


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_labels_keep_their_type(dtype):
    labels = torch.tensor([[[[0, 1, 255], [7, 255, 3]]]])
    labels = (labels if dtype != torch.bool else labels == 255).to(dtype)
    centres = torch.tensor([[[(j + 0.5) / 3, (i + 0.5) / 2] for i in range(2) for j in range(3)]])
    inside = ops.point_sample(labels, centres, mode="nearest")
    assert inside.dtype == dtype
    assert torch.equal(inside, labels.flatten(2))
    assert ops.point_sample(labels, centres + 1, mode="nearest").tolist() == [[[0] * 6]]
    soft = ops.point_sample(labels, centres + 0.1)
    assert soft.dtype == torch.float32
    assert torch.equal(soft, ops.point_sample(labels.float(), centres + 0.1))
    # coordinates in fp64 do not change the type of the result
    assert ops.point_sample(labels, centres.double()).dtype == torch.float32


def test_large_labels_are_exact():
    labels = torch.tensor([[[[2**53 + 1, -(2**60) + 1]]]])
    out = ops.point_sample(labels, torch.tensor([[[0.25, 0.5], [0.75, 0.5]]]), mode="nearest")
    assert torch.equal(out, labels[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_maps_are_promoted(dtype):
    input, coords = torch.randn(2, 3, 5, 7).to(dtype), torch.rand(2, 11, 2)
    out = ops.point_sample(input, coords)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    exact = slow_sample(input, coords)
    assert_within(out, torch_sample(input.to(out.dtype), coords.to(out.dtype)), exact)
    for wanted in (torch.float16, torch.bfloat16, torch.float64):
        cast = ops.point_sample(input, coords, out_dtype=wanted)
        assert torch.equal(cast, out.to(wanted))
    assert ops.point_sample(input, coords.double()).dtype == torch.float64
    for half in (torch.float16, torch.bfloat16):
        wide = ops.point_sample(input, coords.to(half))
        assert torch.equal(wide, ops.point_sample(input, coords.to(half).float()))


def test_autocast_changes_nothing():
    input, coords = torch.randn(1, 3, 5, 7).bfloat16(), torch.rand(1, 11, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.point_sample(input, coords)
    assert torch.equal(out, ops.point_sample(input, coords))


def strided_maps():
    yield "channels last", torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    yield "sliced", torch.randn(2, 6, 9, 13)[:, 1::2, 2:7, ::2]
    yield "expanded batch", torch.randn(1, 3, 5, 7).expand(2, -1, -1, -1)
    yield "expanded cells", torch.randn(2, 3, 1, 1).expand(-1, -1, 5, 7)
    yield "permuted", torch.randn(7, 5, 2, 3).permute(2, 3, 1, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "input"),
    list(strided_maps()),
    ids=lambda value: value if isinstance(value, str) else "input",
)
def test_any_strides(name, input, mode):
    coords = torch.rand(2, 20, 2) * 1.2 - 0.1
    assert not input.is_contiguous(), name
    expected = ops.point_sample(input.contiguous(), coords, mode=mode)
    strided_coords = torch.stack([coords[..., 1], coords[..., 0]], 0).permute(1, 2, 0).flip(2)
    for points in (coords, coords.transpose(0, 1).contiguous().transpose(0, 1), strided_coords):
        assert torch.equal(ops.point_sample(input, points, mode=mode), expected)
    labels = input.mul(100).long()
    assert torch.equal(
        ops.point_sample(labels, coords, mode="nearest"),
        ops.point_sample(labels.contiguous(), coords, mode="nearest"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("mode", MODES)
def test_shapes_of_coordinates(mode, dtype):
    input = torch.randn(3, 2, 5, 7).mul(50).to(dtype)
    grid = torch.rand(3, 4, 6, 2)
    expected = torch.stack(
        [
            ops.point_sample(input[i : i + 1], grid[i : i + 1].flatten(1, 2), mode=mode)[0]
            for i in range(3)
        ]
    )
    assert torch.equal(ops.point_sample(input, grid.flatten(1, 2), mode=mode), expected)
    assert torch.equal(ops.point_sample(input, grid, mode=mode), expected.view(3, 2, 4, 6))
    shared = ops.point_sample(input, grid[:1].flatten(1, 2), mode=mode)
    repeated = grid[:1].flatten(1, 2).repeat(3, 1, 1)
    assert torch.equal(shared, ops.point_sample(input, repeated, mode=mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "points", "expected"),
    [
        ((0, 2, 3, 3), (0, 4, 2), (0, 2, 4)),
        ((0, 2, 3, 3), (1, 4, 2), (0, 2, 4)),
        ((2, 0, 3, 3), (2, 4, 2), (2, 0, 4)),
        ((2, 2, 3, 3), (2, 0, 2), (2, 2, 0)),
        ((2, 2, 3, 3), (2, 0, 5, 2), (2, 2, 0, 5)),
    ],
)
def test_nothing_to_sample(shape, points, expected, mode, dtype):
    out = ops.point_sample(torch.zeros(shape, dtype=dtype), torch.rand(points), mode=mode)
    assert out.shape == expected


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("mode", MODES)
def test_gradient_to_the_map(mode, padding_mode, align_corners):
    input = torch.randn(2, 2, 3, 4, dtype=torch.float64).transpose(2, 3).requires_grad_()
    coords = torch.rand(1, 6, 2, dtype=torch.float64) * 1.4 - 0.2

    def sample(input):
        return ops.point_sample(
            input, coords, mode=mode, padding_mode=padding_mode, align_corners=align_corners
        )

    assert torch.autograd.gradcheck(sample, (input,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_has_the_maps_type(dtype):
    coords, weights = torch.rand(2, 9, 2), torch.randn(2, 3, 9)
    input = torch.randn(2, 3, 5, 7).to(dtype).requires_grad_()
    (ops.point_sample(input, coords) * weights).sum().backward()
    assert input.grad.dtype == dtype
    wide = input.detach().float().requires_grad_()
    (torch_sample(wide, coords) * weights).sum().backward()
    exact = input.detach().double().requires_grad_()
    (torch_sample(exact, coords.double()) * weights.double()).sum().backward()
    assert_within(input.grad, wide.grad.to(dtype), exact.grad)


def test_zero_padding_halves_the_border():
    """mmsegmentation's points on the border see zeros: half at an edge, a quarter at a corner."""
    coords = torch.tensor([[[0.0, 0.5], [0.5, 1.0], [0.0, 0.0], [1.0, 1.0], [0.5, 0.5]]])
    ones = torch.ones(1, 1, 3, 5)
    assert ops.point_sample(ones, coords).tolist() == [[[0.5, 0.5, 0.25, 0.25, 1.0]]]
    border = ops.point_sample(ones, coords, padding_mode="border")
    assert border.tolist() == [[[1.0] * 5]]
