"""The point MLP's kernels against the reference, in the same precision and in fp64."""

from typing import NamedTuple

import pytest
import torch
from tolerance import assert_within
from torch import Tensor

from pointrend_triton import reference
from pointrend_triton.kernels import launch, point_head

# the interpreter rounds to bf16 towards zero
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
NAN, INFINITY = float("nan"), float("inf")


class Drawn(NamedTuple):
    fine_map: Tensor
    coarse_map: Tensor
    coords: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    each: bool

    def pack(self, dtype, precision="ieee"):
        return point_head.pack(
            self.weights,
            self.biases,
            fine_channels=self.fine_map.shape[1],
            classes=self.coarse_map.shape[1],
            coarse_each_layer=self.each,
            dtype=dtype,
            precision=precision,
        )

    def forward(self, dtype=torch.float32, save=False):
        packed = self.pack(dtype)
        maps = self.fine_map, self.coarse_map, self.coords
        return (*point_head.forward(*maps, packed, save=save), packed)

    def reference(self, dtype, maps=None):
        """In `dtype`, or, with maps, with weights rounded to `dtype` and all else in `maps`."""
        weights = [w.to(dtype).to(maps or dtype) for w in self.weights]
        biases = [b.to(dtype).to(maps or dtype) for b in self.biases]
        points = [t.to(maps) if maps else t for t in (self.fine_map, self.coarse_map, self.coords)]
        return reference.point_head(*points, weights, biases, coarse_each_layer=self.each)


def draw(
    device, fine=5, classes=3, hidden=20, depth=2, outputs=None, n=2, points=9, each=True, conv=True
):
    """Values near one; a tenth of the points lies outside, others on borders, two are the same."""
    fine_map = torch.randn(n, fine, 6, 7)
    coarse_map = torch.randn(n, classes, 3, 4)
    coords = torch.rand(n, points, 2) * 1.1 - 0.05
    special = [[0, 0], [1, 1], [0, 1], [0.5, 0.5], [0.5, 0.5], [-3, 0.5], [1.01, 2]]
    special = torch.tensor(special, dtype=torch.float32)[:points]
    coords[:, : len(special)] = special
    outs = [hidden] * depth + [outputs or classes]
    ins = [fine + classes] + [hidden + (classes if each else 0)] * depth
    weights = [torch.randn(o, i) / i**0.5 for o, i in zip(outs, ins, strict=True)]
    biases = [torch.randn(o) for o in outs]
    return Drawn(
        fine_map.to(device),
        coarse_map.to(device),
        coords.to(device),
        [(w.unsqueeze(2) if conv else w).to(device) for w in weights],
        [b.to(device) for b in biases],
        each,
    )


def check_forward(drawn, dtype=torch.float32):
    ours, *_ = drawn.forward(dtype)
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_within(ours, drawn.reference(dtype), drawn.reference(dtype, torch.float64))


WIDTHS = {
    "one": {"fine": 1, "classes": 1, "hidden": 1, "depth": 1},
    "no hidden layer": {"depth": 0, "points": 3},
    "no hidden layer, once": {"depth": 0, "each": False, "fine": 256, "points": 3},
    "2 classes": {"classes": 2, "hidden": 64, "depth": 3, "each": False},
    "19 classes": {"fine": 48, "classes": 19, "hidden": 32, "depth": 3},
    "80 classes": {"fine": 33, "classes": 80, "hidden": 64, "depth": 1},
    "150 classes": {"fine": 5, "classes": 150, "hidden": 32, "depth": 2},
    "150 classes, once": {
        "fine": 5,
        "classes": 150,
        "hidden": 20,
        "depth": 1,
        "each": False,
        "conv": False,
    },
    "other outputs": {"fine": 70, "classes": 3, "hidden": 20, "outputs": 65},
    "published": {"fine": 256, "classes": 19, "hidden": 256, "depth": 3, "n": 1, "points": 3},
}


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_widths(device, widths):
    check_forward(draw(device, **widths))


@pytest.mark.parametrize("n, points", [(1, 1), (2, 63), (3, 64), (2, 65), (1, 130)])
def test_points(device, n, points):
    """Tiles that are full, begun and just one row."""
    check_forward(draw(device, n=n, points=points, depth=1))


@pytest.mark.parametrize("dtype", HALVES)
def test_half(device, dtype):
    drawn = draw(device, fine=40, hidden=32, points=70)
    drawn = drawn._replace(fine_map=drawn.fine_map.to(dtype), coarse_map=drawn.coarse_map.to(dtype))
    check_forward(drawn, dtype)
    check_forward(drawn)  # half maps, MLP in fp32


def test_half_mlp_on_wide_maps(device):
    check_forward(draw(device, points=70), torch.float16)


def test_half_coordinates(device):
    drawn = draw(device)
    check_forward(drawn._replace(coords=drawn.coords.half()))


def test_maps_of_one_cell(device):
    drawn = draw(device)
    maps = drawn.fine_map[..., :1, :1], drawn.coarse_map[..., 2:, 3:]
    check_forward(drawn._replace(fine_map=maps[0], coarse_map=maps[1]))


def test_strides(device):
    drawn = draw(device)
    expected, *_ = drawn.forward()
    fine = drawn.fine_map.to(memory_format=torch.channels_last)
    wide = torch.full((2, 9, 12, 7), NAN, device=device)
    wide[:, 2:7, ::2] = drawn.fine_map
    coarse = drawn.coarse_map.transpose(2, 3).contiguous().transpose(2, 3)
    coords = drawn.coords.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = drawn._replace(
        weights=[w.transpose(0, 1).contiguous().transpose(0, 1) for w in drawn.weights],
        biases=[torch.stack([b, b], 1)[:, 0] for b in drawn.biases],
        coarse_map=coarse,
        coords=coords,
    )
    for fine_map in (fine, wide[:, 2:7, ::2]):
        ours, *_ = strided._replace(fine_map=fine_map).forward()
        assert torch.equal(ours, expected)


def test_expanded(device):
    """One map and one set of points for all images, without copies."""
    drawn = draw(device)
    maps = [drawn.fine_map[:1], drawn.coarse_map[:1]]
    repeated = drawn._replace(
        fine_map=maps[0].repeat(2, 1, 1, 1), coarse_map=maps[1].repeat(2, 1, 1, 1)
    )
    shared = drawn.coords[:1]
    expected, *_ = repeated._replace(coords=shared.repeat(2, 1, 1)).forward()
    expanded = drawn._replace(
        fine_map=maps[0].expand(2, -1, -1, -1), coarse_map=maps[1].expand(2, -1, -1, -1)
    )
    for coords in (shared, shared.expand(2, -1, -1)):
        ours, *_ = expanded._replace(coords=coords).forward()
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_values_that_are_not_finite(device, value):
    """They reach the logits of their points as in PyTorch, and no others."""
    drawn = draw(device, points=40)
    drawn.fine_map[0, 1, 2, 3] = value
    drawn.coarse_map[1, 0, 0, 0] = value
    drawn.coords[1, 9:12] = torch.tensor([[value, 0.5], [0.5, value], [value, value]])
    ours, *_ = drawn.forward()
    theirs = drawn.reference(torch.float32)
    exact = drawn.reference(torch.float32, torch.float64)
    assert 0 < theirs.isfinite().sum() < theirs.numel()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(theirs))
    finite = theirs.isfinite()
    assert_within(ours[finite], theirs[finite], exact[finite])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting
def test_a_place_that_is_not_finite_is_beyond_the_map(device):
    drawn = draw(device, points=8)
    for value in (NAN, INFINITY, -INFINITY):
        nowhere = torch.tensor([[value, 0.5], [0.5, value], [value, value]])
        drawn.coords[:, 2:5], drawn.coords[:, 5:] = nowhere, 3.0
        ours, *_ = drawn.forward()
        assert ours.isfinite().all()
        assert torch.equal(ours[..., 2:5], ours[..., 5:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting
def test_infinity_passes_relu(device):
    """Without a second value to be subtracted from, it stays infinity; padding adds no NaN."""
    drawn = draw(device, fine=1, classes=1, hidden=2, points=4, each=False)
    drawn.coarse_map[:] = 0
    drawn.fine_map[:] = INFINITY
    drawn.coords[:] = 0.45  # between cells: infinity times a weight of 0 would be NaN
    for weight in drawn.weights:
        weight.abs_()
    ours, *_ = drawn.forward()
    assert drawn.reference(torch.float32).isposinf().all()
    assert ours.isposinf().all()


@pytest.mark.parametrize("each", [True, False])
def test_what_is_saved(device, each):
    drawn = draw(device, each=each)
    ours, saved, packed = drawn.forward(save=True)
    alone, nothing, _ = drawn.forward(save=False)
    assert torch.equal(ours, alone)
    width = point_head.saved_width(5, 3, drawn.weights)
    assert saved.shape == (18, width) and nothing.shape == (0, width)
    fine = reference.point_sample(drawn.fine_map, drawn.coords).transpose(1, 2).flatten(0, 1)
    coarse = reference.point_sample(drawn.coarse_map, drawn.coords).transpose(1, 2).flatten(0, 1)
    x = torch.cat([fine, coarse], 1)
    expected = [fine]
    for weight, bias in zip(drawn.weights[:-1], drawn.biases[:-1], strict=True):
        y = (x @ weight[:, :, 0].T + bias).relu()
        expected.append(y)
        x = torch.cat([y, coarse], 1) if each else y
    expected.append(coarse)
    for part, columns in zip(expected, saved.split([32, 32, 32, 32], 1), strict=True):
        torch.testing.assert_close(columns[:, : part.shape[1]], part)
        assert not columns[:, part.shape[1] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_pack(device, dtype):
    """Every layer at its place, the rest zero."""
    drawn = draw(device, fine=40, outputs=70)
    packed = drawn.pack(dtype)
    matrix = torch.zeros(32 + 32 + 96, 64 + 32, device=device)
    biases = torch.zeros(32 + 32 + 96, device=device)
    rows = [0, 32, 64]
    for row, own, weight, bias in zip(rows, [40, 20, 20], drawn.weights, drawn.biases, strict=True):
        out = weight.shape[0]
        matrix[row : row + out, :own] = weight[:, :own, 0]
        matrix[row : row + out, 64:67] = weight[:, own:, 0]
        biases[row : row + out] = bias
    assert torch.equal(packed.weights, matrix.to(dtype))
    assert torch.equal(packed.biases, biases)


def gradients(drawn, received, dtype, precise=None):
    """Autograd's: sampled features, sampled logits, weights, biases."""
    kind = precise or dtype
    wide = torch.float64 if precise else torch.float32

    def leaf(tensor):
        return tensor.to(dtype).to(kind).requires_grad_()

    coords = drawn.coords.to(wide)
    fine = leaf(reference.point_sample(drawn.fine_map.to(wide), coords))
    coarse = leaf(reference.point_sample(drawn.coarse_map.to(wide), coords))
    weights, biases = [leaf(w) for w in drawn.weights], [leaf(b) for b in drawn.biases]
    x = torch.cat([fine, coarse], 1)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.conv1d(x, weight, bias).relu()
        x = torch.cat([x, coarse], 1) if drawn.each else x
    out = torch.conv1d(x, weights[-1], biases[-1])
    leaves = [fine, coarse, *weights, *biases]
    return torch.autograd.grad(out, leaves, received.to(kind), allow_unused=True)


def check_backward(drawn, received, dtype=torch.float32):
    _, saved, packed = drawn.forward(dtype, save=True)
    d_fine, d_coarse, d_weights, d_biases = point_head.mlp_backward(received, saved, packed)
    assert {t.dtype for t in (d_fine, d_coarse, *d_weights)} == {dtype}
    assert {t.dtype for t in d_biases} == {torch.float32}
    ours = [d_fine, d_coarse, *(d.unsqueeze(2) for d in d_weights), *d_biases]
    theirs = gradients(drawn, received, dtype)
    exact = gradients(drawn, received, dtype, torch.float64)
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert true.abs().max() > 0
        assert_within(our, their, true)


BACKWARD = {
    "one": {"fine": 1, "classes": 1, "hidden": 3, "depth": 1},
    "no hidden layer": {"depth": 0},
    "no hidden layer, once": {"depth": 0, "each": False},
    "2 classes, once": {"classes": 2, "hidden": 64, "depth": 3, "each": False, "points": 65},
    "19 classes": {"fine": 48, "classes": 19, "hidden": 32, "depth": 3, "points": 40},
    "150 classes": {"fine": 5, "classes": 150, "hidden": 32, "depth": 2},
    "other outputs": {"fine": 70, "classes": 3, "hidden": 20, "outputs": 65},
    "published": {"fine": 256, "classes": 19, "hidden": 256, "depth": 3, "n": 1, "points": 17},
}


@pytest.mark.parametrize("widths", BACKWARD.values(), ids=BACKWARD)
def test_gradients(device, widths):
    drawn = draw(device, **widths)
    outputs = drawn.weights[-1].shape[0]
    n, points, _ = drawn.coords.shape
    check_backward(drawn, torch.randn(n, outputs, points, device=device))


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_in_half(device, dtype):
    received = torch.randn(2, 3, 70, device=device).to(dtype)
    check_backward(draw(device, hidden=32, points=70), received, dtype)


def test_received_gradient_of_any_strides(device):
    drawn = draw(device)
    received = torch.randn(2, 9, 3, device=device)
    check_backward(drawn, received.transpose(1, 2))
    check_backward(drawn, torch.ones((), device=device).expand(2, 3, 9))  # of .sum()
    check_backward(drawn, received[:, :1, :1].expand(2, 3, 9))


def cells(device, n=2, k=40, height=9, width=11):
    """Flat indices, one of them twice, in a grid of the given size; seen through strides."""
    indices = torch.stack([torch.randperm(height * width)[:k] for _ in range(n)])
    indices[:, 1] = indices[:, 0]
    return torch.stack([indices, indices], 2).to(device)[..., 0], (height, width)


def refined(drawn, indices, size, logits, dtype, maps=None):
    """What the map becomes: the reference at the cells' centres, scattered."""
    coords = reference.grid_coords(indices, *size)
    points = drawn._replace(coords=coords).reference(dtype, maps)
    index = indices.unsqueeze(1).expand(-1, points.shape[1], -1)
    flat = logits.to(maps or logits.dtype).flatten(2)
    return flat.scatter(2, index, points.to(flat.dtype)).view(logits.shape)


@pytest.mark.parametrize("outputs", [1, 2, 19, 150])
@pytest.mark.parametrize("label_type", [torch.uint8, torch.int64])
def test_refine_cells(device, outputs, label_type):
    drawn = draw(device, classes=outputs, hidden=32, depth=1)
    indices, size = cells(device)
    before = torch.randn(2, outputs, *size, device=device)
    logits, labels = before.clone(), torch.full((2, *size), 77, dtype=label_type, device=device)
    maps = drawn.fine_map, drawn.coarse_map
    packed = drawn.pack(torch.float32)
    point_head.refine_cells(*maps, indices, size, packed, logits=logits, labels=labels)
    theirs = refined(drawn, indices, size, before, torch.float32)
    exact = refined(drawn, indices, size, before, torch.float32, torch.float64)
    assert_within(logits, theirs, exact)
    chosen = torch.zeros(2, size[0] * size[1], dtype=torch.bool, device=device)
    chosen = chosen.scatter(1, indices, True).view(2, *size)
    kept = ~chosen[:, None]
    assert torch.equal(logits * kept, before * kept)
    expected = reference.logits_to_labels(logits).to(label_type)
    assert torch.equal(labels, torch.where(chosen, expected, 77))
    # each of the two alone
    alone = torch.full_like(labels, 77)
    point_head.refine_cells(*maps, indices, size, packed, labels=alone)
    assert torch.equal(alone, labels)
    alone = before.clone()
    point_head.refine_cells(*maps, indices, size, packed, logits=alone)
    assert torch.equal(alone, logits)


def test_refine_cells_strides_and_types(device):
    drawn = draw(device)
    indices, size = cells(device)
    expected = torch.zeros(2, 3, *size, device=device)
    maps = drawn.fine_map, drawn.coarse_map
    packed = drawn.pack(torch.float32)
    point_head.refine_cells(*maps, indices, size, packed, logits=expected)
    for dtype in (torch.float32, torch.float16):
        for wide in (
            torch.zeros(2, *size, 3, device=device).permute(0, 3, 1, 2),
            torch.zeros(2, 5, 2 * size[0], size[1], device=device)[:, 1:4, ::2],
            torch.zeros(3, size[1], 2, size[0], device=device).permute(2, 0, 3, 1),
        ):
            logits = wide.to(dtype)
            labels = torch.zeros(size[1], 2, size[0], dtype=torch.int64, device=device)
            labels = labels.permute(1, 2, 0)
            point_head.refine_cells(*maps, indices, size, packed, logits=logits, labels=labels)
            assert torch.equal(logits, expected.to(dtype))
            assert torch.equal(labels, expected.to(dtype).argmax(1))


@pytest.mark.parametrize("classes", [4, 70])
def test_labels_of_equals_and_of_what_is_not_finite(device, classes):
    """The bias alone decides: the lowest of equals, 0 equals -0, NaN before infinity."""
    drawn = draw(device, classes=classes, depth=0, n=1)
    drawn.weights[0][:] = 0
    indices, size = torch.zeros(1, 1, dtype=torch.int64, device=device), (1, 1)
    for low, high in (
        (1.0, 1.0),
        (-1e-9, 1e-9),  # -0 and 0 in fp16
        (0.0, -1e-9),
        (1.0, 2.0),
        (2.0, 1.0),
        (-2.0, -1.0),
        (NAN, INFINITY),
        (INFINITY, NAN),
        (-NAN, INFINITY),
        (1.0, -NAN),
        (NAN, -NAN),
        (-INFINITY, -INFINITY),
    ):
        bias = torch.full((classes,), -INFINITY, device=device)
        bias[1], bias[-1] = low, high
        labels = torch.empty(1, 1, 1, dtype=torch.uint8, device=device)
        packed = drawn._replace(biases=[bias]).pack(torch.float16)
        maps = drawn.fine_map, drawn.coarse_map
        point_head.refine_cells(*maps, indices, size, packed, labels=labels)
        assert labels.item() == bias.half().argmax().item()


def test_labels_of_one_output(device):
    drawn = draw(device, classes=1, depth=0, n=1)
    drawn.weights[0][:] = 0
    indices = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for bias, expected in ((0.5, 1), (0.0, 0), (-0.5, 0), (NAN, 0), (INFINITY, 1)):
        labels = torch.empty(1, 1, 1, dtype=torch.uint8, device=device)
        drawn.biases[0][:] = bias
        packed = drawn.pack(torch.float32)
        maps = drawn.fine_map, drawn.coarse_map
        point_head.refine_cells(*maps, indices, (1, 1), packed, labels=labels)
        assert labels.item() == expected


def constants(dtype):
    return {"PRECISION": "ieee" if dtype == torch.float32 else "half", "OUTPUTS_PAD": 32}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_every_config(device, dtype):
    drawn = draw(device, points=70)
    received = torch.randn(2, 3, 70, device=device).to(dtype)
    for number in range(len(point_head._configs(constants(dtype)))):
        with launch.pinned(point_head.POINT_HEAD, number):
            check_forward(drawn, dtype)
        with launch.pinned(point_head.DGRAD, number):
            check_backward(drawn, received, dtype)


def assert_rounded(tensor, exact):
    """To TF32: ten bits of mantissa, and the nearest such number."""
    assert (tensor.view(torch.int32) & 0x1FFF == 0).all()
    half_a_step = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 12)
    assert ((tensor - exact).abs() <= half_a_step).all()


@pytest.mark.parametrize("each", [True, False])
def test_operands_are_rounded_to_tf32(device, each):
    """What the dots read, forward and backward: weights, features, activations, gradients."""
    drawn = draw(device, n=1, points=1, hidden=24, depth=1, each=each)
    drawn.coords[:] = 0.4
    packed, exact = drawn.pack(torch.float32, "tf32"), drawn.pack(torch.float32)
    assert_rounded(packed.weights, exact.weights)
    assert torch.equal(packed.biases, exact.biases)
    logits, saved = point_head.forward(*drawn[:3], packed, save=True)
    assert logits.count_nonzero() and (logits.view(torch.int32) & 0x1FFF).any()
    fine, hidden, coarse = saved.split((32, 32, 32), 1)
    _, saved, _ = drawn.forward(save=True)
    assert_rounded(fine, saved[:, :32])
    assert_rounded(coarse, saved[:, -32:])
    inputs = fine.double() @ packed.weights[:32, :32].double().T
    inputs += coarse.double() @ packed.weights[:32, -32:].double().T
    assert_rounded(hidden, (inputs + packed.biases[:32]).relu().float())
    grad = torch.randn_like(logits)
    *_, d_biases = point_head.mlp_backward(grad, saved, packed)
    assert_rounded(d_biases[1], grad[0, :, 0])
    through = (d_biases[1].double() @ packed.weights[32:35, :24].double()).float()
    assert_rounded(d_biases[0], torch.where(hidden[0, :24] > 0, through, 0))


def test_nan_stays_nan_in_tf32(device):
    """Of any bits: rounded by adding to them, some would become zero."""
    drawn = draw(device)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32, device=device)
    drawn.weights[0][:4, 0, 0] = bits.view(torch.float32)
    drawn.weights[0][4:6, 0, 0] = torch.tensor([INFINITY, -INFINITY], device=device)
    packed = drawn.pack(torch.float32, "tf32").weights[:6, 0]
    assert packed[:4].isnan().all() and packed[4:].tolist() == [INFINITY, -INFINITY]


@pytest.mark.gpu
def test_tf32(device):
    """Ten bits of mantissa, as in fp16, without its range."""
    drawn = draw(device, hidden=64)
    packed = drawn.pack(torch.float32, "tf32")
    exact = drawn.reference(torch.float32, torch.float64)
    for number in range(len(point_head._configs({"PRECISION": "tf32", "OUTPUTS_PAD": 32}))):
        with launch.pinned(point_head.POINT_HEAD, number):
            maps = drawn.fine_map, drawn.coarse_map, drawn.coords
            ours, _ = point_head.forward(*maps, packed, save=False)
        assert_within(ours, drawn.reference(torch.float16), exact)


@pytest.mark.parametrize("n, points", [(0, 4), (2, 0)])
def test_nothing_to_do(device, n, points):
    drawn = draw(device, n=n, points=points)
    packed = drawn.pack(torch.float32)
    maps = drawn.fine_map, drawn.coarse_map
    with launch.recording() as launches:
        out, saved = point_head.forward(*maps, drawn.coords, packed, save=True)
        d_fine, d_coarse, d_weights, d_biases = point_head.mlp_backward(out, saved, packed)
        indices = torch.zeros(n, points, dtype=torch.int64, device=device)
        logits = torch.zeros(n, 3, 2, 2, device=device)
        point_head.refine_cells(*maps, indices, (2, 2), packed, logits=logits)
    assert not launches
    assert out.shape == (n, 3, points)
    assert d_fine.shape == (n, 5, points) and d_coarse.shape == (n, 3, points)
    for gradient, weight in zip(d_weights + d_biases, drawn.weights + drawn.biases, strict=True):
        assert gradient.shape == weight.shape[:2] and not gradient.any()


def test_unsupported():
    maps = torch.zeros(1, 5, 2, 2), torch.zeros(1, 3, 2, 2)
    layers = [torch.zeros(20, 8), torch.zeros(20, 23), torch.zeros(3, 23)]
    assert point_head.unsupported(*maps, layers) is None
    assert point_head.unsupported(*maps, layers[-1:]) is None
    assert "fine_map is torch.float64" in point_head.unsupported(maps[0].double(), maps[1], layers)
    wide = [layers[0].double(), *layers[1:]]
    assert "weights[0] is torch.float64" in point_head.unsupported(*maps, wide)
    assert "[20, 21]" in point_head.unsupported(
        *maps, [layers[0], torch.zeros(21, 23), torch.zeros(3, 24)]
    )
    assert "257" in point_head.unsupported(*maps, [torch.zeros(257, 8), torch.zeros(3, 260)])


def test_recording_needs_no_memory():
    """Real sizes on no device: what the resource table is made from."""
    drawn = draw("meta", fine=256, classes=150, hidden=256, depth=3, n=1, points=8196)
    with launch.recording() as launches:
        out, saved, packed = drawn.forward(torch.bfloat16, save=True)
        point_head.mlp_backward(out, saved, packed)
    assert [recorded.kernel.name for recorded in launches] == [
        "point_head.pack",
        "point_head.forward",
        "point_head.dgrad",
    ]
    assert packed.weights.shape == (3 * 256 + 160, 256 + 160)
