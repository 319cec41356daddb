"""kernels.point_sample against the reference and fp64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_within

from pointrend_triton import reference
from pointrend_triton.kernels import launch
from pointrend_triton.kernels import point_sample as kernels

MODES, PADDINGS = ("bilinear", "nearest"), ("zeros", "border")
FLOATS = (
    torch.float32,
    torch.float16,
    # the interpreter cuts off what it should round
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
)
NAN, INF = math.nan, math.inf
every_way = pytest.mark.parametrize(
    "how",
    [
        {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
        for mode in MODES
        for padding_mode in PADDINGS
        for align_corners in (False, True)
    ],
    ids=lambda how: "-".join(str(value) for value in how.values()),
)


def options(mode="bilinear", padding_mode="zeros", align_corners=False):
    return {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}


def sample(input, coords, out_dtype=None, **how):
    """The kernel, with the type of the result that ops would ask for."""
    how = options(**how)
    if out_dtype is None:
        keeps = how["mode"] == "nearest" and not input.is_floating_point()
        out_dtype = input.dtype if keeps else torch.float32
    return kernels.forward(input, coords, out_dtype=out_dtype, **how)


def gradient(grad, coords, like, deterministic=False, **how):
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return kernels.backward(
        grad,
        coords,
        shape=tuple(like.shape),
        channels_last=channels_last and not like.is_contiguous(),
        dtype=like.dtype,
        deterministic=deterministic,
        **options(**how),
    )


def cells_of(coords, height, width, **how):
    """The flat cells of nearest points [N, P], -1 off the map, found by the integer reference."""
    numbers = torch.arange(1, height * width + 1, device=coords.device).view(1, 1, height, width)
    numbers = numbers.expand(coords.shape[0], -1, -1, -1)
    return reference.point_sample(numbers, coords, **how)[:, 0] - 1


def nearest_reference(input, coords, **how):
    """[N, C, P]; `grid_sample` itself may take the other cell at ties on a GPU."""
    cells = cells_of(coords, *input.shape[2:], **how).expand(input.shape[0], -1)
    index = cells.clamp(min=0)[:, None].expand(-1, input.shape[1], -1)
    return input.flatten(2).gather(2, index).where(cells[:, None] >= 0, 0)


def gradients_by_torch(grad, coords, like, **how):
    """The gradients in the map's own type and in fp64."""

    def run(input, grad, coords):
        input = input.detach().requires_grad_()
        call = nearest_reference if how["mode"] == "nearest" else reference.point_sample
        (call(input, coords, **how) * grad).sum().backward()
        return input.grad

    if how["mode"] == "nearest":  # fp64 would find other cells
        return run(like.float(), grad, coords).to(like.dtype), run(like.double(), grad, coords)
    return run(like, grad, coords), run(like.double(), grad.double(), coords.double())


def awkward_points(height, width, device):
    """Cell centres, edges and corners, points outside, duplicates and random points: [1, P, 2]."""
    x = torch.arange(-2, 2 * width + 3, device=device) / (2 * width)
    y = torch.arange(-2, 2 * height + 3, device=device) / (2 * height)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2).flatten(0, 1)
    outside = torch.tensor([[-9.0, 9.0], [0.5, 1e30]], device=device)
    random = torch.rand(20, 2, device=device) * 1.6 - 0.3
    return torch.cat([grid, random, random[:5], outside])[None]


@every_way
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5), (6, 7)])
def test_forward(size, how, device):
    input, coords = torch.randn(2, 2, *size, device=device), awkward_points(*size, device)
    out = sample(input, coords, **how)
    if how["mode"] == "nearest":
        assert torch.equal(out, nearest_reference(input, coords, **how))
        for dtype in (torch.int64, torch.uint8):
            labels = input.mul(50).to(dtype)
            expected = reference.point_sample(labels, coords, **how)
            assert torch.equal(sample(labels, coords, **how), expected)
    else:
        exact = reference.point_sample(input.double(), coords.double(), **how)
        assert_within(out, reference.point_sample(input, coords, **how), exact)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 2, 19, 144, 150])
def test_channels_and_types(channels, dtype, channels_last, device):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(2, channels, 5, 7, device=device).to(dtype, memory_format=layout)
    coords = torch.rand(2, 33, 2, device=device) * 1.2 - 0.1
    expected = reference.point_sample(input, coords)
    exact = reference.point_sample(input.double(), coords.double())
    assert_within(sample(input, coords), expected, exact)
    assert_within(sample(input, coords, dtype), expected.to(dtype), exact)
    nearest = nearest_reference(input, coords, **options("nearest"))
    assert torch.equal(sample(input, coords, dtype, mode="nearest"), nearest)


def test_bfloat16_maps_and_gradients(device):
    input = torch.randn(2, 19, 5, 7, device=device)
    coords = torch.rand(2, 33, 2, device=device) * 1.2 - 0.1
    assert torch.equal(sample(input.bfloat16(), coords), sample(input.bfloat16().float(), coords))
    grad = torch.randn(2, 19, 33, device=device).bfloat16()
    wide = gradient(grad.float(), coords, input, deterministic=True)
    assert torch.equal(gradient(grad, coords, input, deterministic=True), wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_coordinates_are_widened(dtype, device):
    input, coords = torch.randn(2, 3, 9, 7, device=device), torch.rand(2, 20, 2, device=device)
    half = coords.to(dtype)
    assert torch.equal(sample(input, half), sample(input, half.float()))
    grad = torch.randn(2, 3, 20, device=device)
    wide = gradient(grad, half.float(), input, deterministic=True)
    assert torch.equal(gradient(grad, half, input, deterministic=True), wide)


def strided_maps():
    yield "contiguous", torch.randn(2, 3, 5, 7)
    yield "channels last", torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    yield "sliced", torch.randn(2, 6, 9, 13)[:, 1::2, 2:7, ::2]
    yield "sliced channels last", torch.randn(2, 9, 13, 6).permute(0, 3, 1, 2)[:, 1:4, 2:7, ::2]
    yield "expanded batch", torch.randn(1, 3, 5, 7).expand(2, -1, -1, -1)
    yield "expanded cells", torch.randn(2, 3, 1, 1).expand(-1, -1, 5, 7)
    yield "permuted", torch.randn(7, 5, 2, 3).permute(2, 3, 1, 0)


@pytest.mark.parametrize("name", [name for name, _ in strided_maps()])
def test_any_strides(name, device):
    input = dict(strided_maps())[name].to(device)
    coords = torch.rand(2, 20, 2, device=device) * 1.2 - 0.1
    expected = reference.point_sample(input, coords)
    exact = reference.point_sample(input.double(), coords.double())
    planes = coords.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    points_first = coords.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.rand(2, 40, 5, device=device)
    wide[:, ::2, 1:4:2] = coords
    for points in (coords, planes, points_first, wide[:, ::2, 1:4:2]):
        out = sample(input, points)
        assert out.is_contiguous()
        assert_within(out, expected, exact)
        nearest = nearest_reference(input, coords, **options("nearest"))
        assert torch.equal(sample(input, points, mode="nearest"), nearest)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity minus infinity, interpreted
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, -1e30])
def test_points_that_are_nowhere(value, mode, device):
    """Zero padding: zero, as with grid_sample on CUDA. Border: NaN is the first cell."""
    input = torch.arange(1.0, 13.0, device=device).view(1, 1, 3, 4)
    coords = torch.tensor([[[value, 0.5]]], device=device)
    assert sample(input, coords, mode=mode).item() == 0
    edge = 8 if value > 0 else 5
    assert sample(input, coords, mode=mode, padding_mode="border").item() == edge
    assert sample(input.long(), coords, mode="nearest").item() == 0
    assert sample(input.long(), coords, mode="nearest", padding_mode="border").item() == edge
    grad = torch.ones(1, 1, 1, device=device)
    assert gradient(grad, coords, input, mode=mode).abs().sum() == 0
    border = gradient(grad, coords, input, mode=mode, padding_mode="border").flatten()
    assert border[edge - 1] == 1
    assert border.abs().sum() == 1
    # with aligned corners every number lies on a side's only cell
    column = sample(input[..., :1], coords, mode=mode, align_corners=True).item()
    assert column == (5 if math.isfinite(value) else 0)


def test_logits_that_are_not_finite(device):
    input = torch.randn(2, 3, 6, 7)
    input[0, 0, 2, 3], input[0, 1, 4, 5], input[1, 2, 0, 0] = NAN, INF, -INF
    input, coords = input.to(device), torch.rand(2, 200, 2, device=device)
    for mode in MODES:
        call = reference.point_sample if mode == "bilinear" else nearest_reference
        out, expected = sample(input, coords, mode=mode), call(input, coords, **options(mode))
        assert not expected.isfinite().all()
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
@pytest.mark.parametrize("mode", MODES)
def test_labels_and_masks(mode, dtype, device):
    low, high = (0, 2) if dtype == torch.bool else (torch.iinfo(dtype).min, 120)
    input = torch.randint(low, high, (2, 2, 6, 9), device=device).to(dtype)[..., ::2]
    coords = torch.rand(1, 50, 2, device=device) * 1.4 - 0.2
    how = options(mode)
    expected = reference.point_sample(input, coords, **how)
    out = sample(input, coords, **how)
    assert out.dtype == expected.dtype
    if mode == "nearest":
        assert torch.equal(out, expected)
        wide = sample(input, coords, torch.float32, **how)
        assert torch.equal(wide, expected.float())
    else:
        assert_within(out, expected, reference.point_sample(input, coords.double(), **how))


def test_large_labels_are_exact(device):
    labels = torch.tensor([[[[2**53 + 1, -(2**60) + 1]]]], device=device)
    coords = torch.tensor([[[0.25, 0.5], [0.75, 0.5]]], device=device)
    assert torch.equal(sample(labels, coords, mode="nearest"), labels[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool])
def test_other_types_of_the_result(dtype, device):
    input = torch.rand(1, 3, 5, 6, device=device) * 200
    coords = torch.rand(1, 40, 2, device=device) * 1.4 - 0.2
    for mode in MODES:
        out = sample(input, coords, dtype, mode=mode)
        assert torch.equal(out, sample(input, coords, mode=mode).to(dtype))


@pytest.mark.parametrize("size", [3, 7, 19, 255, 2048])
def test_nearest_ties(size, device):
    """Cell edges k / W are ties in some roundings and not in others."""
    k = torch.arange(size + 1, device=device)
    coords = torch.stack([k / size, torch.full_like(k / size, 0.5)], dim=1)[None]
    grid = np.float32(2) * coords[0, :, 0].cpu().numpy() - np.float32(1)
    nearest = np.rint(((grid + np.float32(1)) * np.float32(size) - np.float32(1)) / np.float32(2))
    inside = (nearest >= 0) & (nearest < size)
    expected = torch.from_numpy(np.where(inside, nearest + 1, 0))
    numbers = torch.arange(1.0, size + 1, device=device).view(1, 1, 1, size)
    assert torch.equal(sample(numbers, coords, mode="nearest")[0, 0].cpu(), expected)


@pytest.mark.parametrize("axis", range(4))
def test_offsets_beyond_32_bits(axis, device):
    far = 1_200_000_000
    strides = [27, 9, 3, 1]
    strides[axis] = far
    # on a CPU only what is touched takes memory
    memory = torch.from_numpy(np.zeros(2 * far + 100, np.uint8)).to(device)
    map = memory.as_strided((3, 3, 3, 3), strides)
    map.copy_(torch.arange(1, 82).view(3, 3, 3, 3))
    centres = torch.tensor([[[(j + 0.5) / 3, (i + 0.5) / 3] for i in range(3) for j in range(3)]])
    assert torch.equal(sample(map, centres.to(device), mode="nearest"), map.flatten(2))
    assert torch.equal(sample(map, centres.to(device)).round(), map.flatten(2).float())


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_property(data, device):
    n, c = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 3, 9]))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    number = st.floats(-0.5, 1.5, width=32) | st.sampled_from([k / 12 for k in range(-1, 14)])
    points = data.draw(st.lists(st.tuples(number, number), max_size=6))
    how = options(
        data.draw(st.sampled_from(MODES)),
        data.draw(st.sampled_from(PADDINGS)),
        data.draw(st.booleans()),
    )
    input = torch.randn(n, c, height, width, device=device)
    if data.draw(st.booleans()):
        input = input.to(memory_format=torch.channels_last)
    coords = torch.tensor(points, device=device).view(1, -1, 2)
    ours = sample(input, coords, **how)
    if how["mode"] == "nearest":
        assert torch.equal(ours, nearest_reference(input, coords, **how))
    else:
        exact = reference.point_sample(input.double(), coords.double(), **how)
        assert_within(ours, reference.point_sample(input, coords, **how), exact)

    # the gradient is the transpose: <sampled, g> = <map, gradient of g>, channel by channel
    grad = torch.randn_like(ours)
    grad_input = gradient(grad, coords, input, data.draw(st.booleans()), **how)
    ones = torch.ones_like(input)
    for map in (input, ones):
        sampled = sample(map, coords, **how)
        left = (sampled.double() * grad.double()).sum(2)
        right = (map.double() * grad_input.double()).sum((2, 3))
        scale = (sampled.double() * grad.double()).abs().sum() + 1
        assert (left - right).abs().max() <= 1e-5 * scale * input.abs().max().clamp(min=1)


@every_way
@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
def test_backward(size, how, device):
    coords = awkward_points(*size, device)
    coords = coords[:, torch.randperm(coords.shape[1], device=device)[:25]]
    coords = torch.cat([coords, coords.flip(1)], dim=1)
    for channels, deterministic in ((3, False), (1, True)):
        input = torch.randn(1, channels, *size, device=device)
        grad = torch.randn(1, channels, coords.shape[1], device=device)
        theirs, exact = gradients_by_torch(grad, coords, input, **how)
        assert_within(gradient(grad, coords, input, deterministic, **how), theirs, exact)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 2, 19, 144, 150])
def test_backward_channels_and_types(channels, dtype, channels_last, device):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(2, channels, 5, 7, device=device).to(dtype, memory_format=layout)
    coords = torch.rand(2, 33, 2, device=device) * 1.2 - 0.1
    grad = torch.randn(2, channels, 33, device=device)
    theirs, exact = gradients_by_torch(grad, coords, input, **options())
    ours = gradient(grad, coords, input)
    assert ours.dtype == dtype
    if channels > 1:
        assert ours.stride() == input.stride()
    assert_within(ours, theirs, exact)
    if dtype != torch.float32:
        half = gradient(grad.to(dtype), coords, input)
        theirs, exact = gradients_by_torch(grad.to(dtype), coords, input, **options())
        assert_within(half, theirs, exact)


@pytest.mark.parametrize("name", ["points", "channels", "sliced", "zeros", "batch"])
def test_gradients_of_any_strides(name, device):
    input = torch.randn(2, 3, 4, 5, device=device)
    coords = torch.rand(2, 21, 2, device=device) * 1.2 - 0.1
    grad = {
        "points": lambda: torch.randn(2, 3, 21),
        "channels": lambda: torch.randn(2, 21, 3).transpose(1, 2),
        "sliced": lambda: torch.randn(2, 6, 42)[:, ::2, 1::2],
        "zeros": lambda: torch.tensor(1.5).expand(2, 3, 21),  # from .sum().backward()
        "batch": lambda: torch.randn(1, 3, 21).expand(2, -1, -1),
    }[name]().to(device)
    theirs, exact = gradients_by_torch(grad, coords, input, **options())
    assert_within(gradient(grad, coords, input), theirs, exact)


def test_sums_are_rounded_once(device):
    """4096 and 40 ones: a running sum in fp16, which has steps of 4 there, would stay at 4096."""
    coords = torch.full((1, 41, 2), 0.5, device=device)
    like = torch.zeros(1, 1, 1, 1, dtype=torch.float16, device=device)
    grad = torch.ones(1, 1, 41, device=device)
    grad[0, 0, 0] = 4096
    for deterministic in (False, True):
        assert gradient(grad, coords, like, deterministic).item() == 4136


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_shared_points(deterministic, mode, device):
    input = torch.randn(3, 2, 5, 4, device=device)
    coords = torch.rand(1, 30, 2, device=device) * 1.2 - 0.1
    repeated = coords.repeat(3, 1, 1)
    assert torch.equal(sample(input, coords, mode=mode), sample(input, repeated, mode=mode))
    grad = torch.randn(3, 2, 30, device=device)
    theirs, exact = gradients_by_torch(grad, repeated, input, **options(mode))
    assert_within(gradient(grad, coords, input, deterministic, mode=mode), theirs, exact)


def test_deterministic_sums_are_in_the_order_of_the_points(device):
    coords = torch.full((1, 40, 2), 0.5, device=device)
    like, grad = torch.zeros(1, 2, 1, 1, device=device), torch.randn(1, 2, 40, device=device)
    ours = gradient(grad, coords, like, deterministic=True, mode="nearest")
    in_order = np.cumsum(grad[0].cpu().numpy(), axis=1, dtype=np.float32)[:, -1]
    assert ours.flatten().tolist() == in_order.tolist()
    for mode in MODES:
        runs = [gradient(grad, coords, like, deterministic=True, mode=mode) for _ in range(2)]
        assert torch.equal(*runs)


@pytest.mark.timeout(30)  # a list that leads into the next map's has no end
@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_all_points_of_several_maps_in_one_cell(deterministic, mode, size, device):
    """The lists of a map end with its last tap, also where the next map's first has that cell."""
    input, grad = torch.randn(3, 2, *size, device=device), torch.randn(3, 2, 5, device=device)
    centre = torch.tensor([0.5 / size[1], 0.5 / size[0]], device=device)
    coords = centre.expand(3, 5, 2)
    theirs, exact = gradients_by_torch(grad, coords, input, **options(mode))
    assert_within(gradient(grad, coords, input, deterministic, mode=mode), theirs, exact)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_tap_is_in_its_cells_list(mode, deterministic, device):
    height, width, n = 4, 5, 2
    coords = torch.rand(n, 150, 2, device=device) * 1.6 - 0.3
    where = {"NEAREST": mode == "nearest", "BORDER": False, "ALIGN": False}
    head, next, _ = kernels._lists(coords, height, width, deterministic=deterministic, **where)
    if mode == "nearest":
        cells = cells_of(coords, height, width, **options(mode))
    else:  # the cell of the top left corner, by nearest sampling half a cell further up
        place = coords.cpu().double() * torch.tensor([width, height]) - 0.5
        low = place.floor()[:, :, None] + torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
        x, y = low.long().flatten(1, 2).unbind(2)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        cells = torch.where(inside, y * width + x, -1)
    for i in range(n):
        expected = [[] for _ in range(height * width)]
        for tap, cell in enumerate(cells[i].tolist()):
            if cell >= 0:
                expected[cell].append(tap)
        for cell, taps in enumerate(expected):
            found, tap = [], head[i, cell].item()
            while tap >= 0 and len(found) <= len(taps):
                found.append(tap)
                tap = next[i, tap].item()
            assert (found if deterministic else sorted(found)) == taps


@pytest.mark.parametrize(
    ("shape", "points"),
    [
        ((0, 2, 3, 3), (0, 4, 2)),
        ((0, 2, 3, 3), (1, 4, 2)),
        ((2, 0, 3, 3), (2, 4, 2)),
        ((2, 2, 3, 3), (2, 0, 2)),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_sample(mode, shape, points, device):
    input, coords = torch.randn(shape, device=device), torch.rand(points, device=device)
    out = sample(input, coords, mode=mode)
    assert out.shape == (shape[0], shape[1], points[1])
    for deterministic in (False, True):
        grad = gradient(out, coords, input, deterministic, mode=mode)
        assert torch.equal(grad, torch.zeros_like(input))


def of_every_width(device):
    for channels, layout in ((1, None), (9, None), (19, "last"), (80, "last")):
        input = torch.randn(1, channels, 17, 19, device=device)
        yield input.to(memory_format=torch.channels_last) if layout else input


@pytest.mark.parametrize("number", range(4))
def test_every_configuration(number, device):
    coords = torch.rand(1, 100, 2, device=device) * 1.2 - 0.1
    for input in of_every_width(device):
        expected = reference.point_sample(input, coords)
        exact = reference.point_sample(input.double(), coords.double())
        with launch.pinned(kernels.FORWARD, number):
            assert_within(sample(input, coords), expected, exact)
        with launch.pinned(kernels.NEAREST, number):
            nearest = nearest_reference(input, coords, **options("nearest"))
            assert torch.equal(sample(input, coords, mode="nearest"), nearest)
        grad = torch.randn(1, input.shape[1], 100, device=device)
        theirs, exact = gradients_by_torch(grad, coords, input, **options())
        for kernel in (kernels.BACKWARD, kernels.LINK, kernels.CELLS, kernels.LINK_SORTED):
            if kernel is not kernels.BACKWARD and input.shape[1] > 1:
                continue  # lists do not depend on the channels
            deterministic = kernel not in (kernels.BACKWARD, kernels.LINK)
            with launch.pinned(kernel, number):
                assert_within(gradient(grad, coords, input, deterministic), theirs, exact)


def test_launches_can_be_recorded():
    input = torch.empty(8, 256, 128, 256, dtype=torch.bfloat16, device="meta")
    input = input.to(memory_format=torch.channels_last)
    coords, grad = torch.empty(1, 4096, 2, device="meta"), torch.empty(8, 256, 4096, device="meta")
    with launch.recording() as launches:
        assert sample(input, coords).shape == grad.shape
        sample(input, coords, mode="nearest")
        for deterministic in (False, True):
            out = gradient(grad, coords, input, deterministic)
            assert (out.shape, out.stride(), out.dtype) == (
                input.shape,
                input.stride(),
                input.dtype,
            )
    names = [each.kernel.name.removeprefix("point_sample.") for each in launches]
    lists = ["link", "backward", "cells", "link_sorted", "backward"]
    assert names == ["forward", "nearest", *lists]
