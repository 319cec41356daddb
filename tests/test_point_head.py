"""ops.point_head against an explicit loop over points and layers in fp64."""

import copy

import pytest
import torch
from test_point_sample import slow_sample, torch_sample
from tolerance import assert_within

from pointrend_triton import ops
from pointrend_triton.config import PointHeadConfig
from pointrend_triton.models.point_head import PointHead


def draw_layers(fine, classes, hidden=6, depth=3, coarse_each_layer=True, conv=True):
    """Weights and biases of an MLP whose values stay near one."""
    weights, width = [], fine + classes
    for out in (hidden,) * depth + (classes,):
        weights.append(torch.randn(out, width) / width**0.5)
        width = hidden + (classes if coarse_each_layer else 0)
    biases = [torch.randn(weight.shape[0]) for weight in weights]
    return [weight.unsqueeze(2) if conv else weight for weight in weights], biases


def loop(fine, coarse, weights, biases, coarse_each_layer):
    """Point features [N, F, P] and logits [N, C, P] -> logits, one point at a time."""
    columns = []
    for n in range(fine.shape[0]):
        for p in range(fine.shape[2]):
            x = torch.cat([fine[n, :, p], coarse[n, :, p]])
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                x = weight.flatten(1).mv(x) + bias
                if i < len(weights) - 1:
                    x = x.clamp(min=0)
                    x = torch.cat([x, coarse[n, :, p]]) if coarse_each_layer else x
            columns.append(x)
    return torch.stack(columns).view(fine.shape[0], fine.shape[2], -1).transpose(1, 2)


def draw(fine=5, classes=3, points=9, **layers):
    maps = torch.randn(2, fine, 6, 7), torch.randn(2, classes, 3, 4)
    return (*maps, torch.rand(2, points, 2), *draw_layers(fine, classes, **layers))


@pytest.mark.parametrize("conv", [True, False], ids=["conv1d", "linear"])
@pytest.mark.parametrize("coarse_each_layer", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("classes", [1, 3])
def test_equals_the_loop(classes, depth, coarse_each_layer, conv):
    drawn = draw(classes=classes, depth=depth, coarse_each_layer=coarse_each_layer, conv=conv)
    fine_map, coarse_map, coords, weights, biases = drawn
    ours = ops.point_head(*drawn, coarse_each_layer=coarse_each_layer)
    theirs = loop(
        torch_sample(fine_map, coords),
        torch_sample(coarse_map, coords),
        weights,
        biases,
        coarse_each_layer,
    )
    exact = loop(
        slow_sample(fine_map, coords),
        slow_sample(coarse_map, coords),
        [weight.double() for weight in weights],
        [bias.double() for bias in biases],
        coarse_each_layer,
    )
    assert ours.shape == (2, classes, 9)
    assert_within(ours, theirs, exact)


def leaves(tensors, dtype):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("coarse_each_layer", [True, False])
def test_gradients(coarse_each_layer):
    drawn = draw(coarse_each_layer=coarse_each_layer)
    coords, received = drawn[2], torch.randn(2, 3, 9)
    inputs = (drawn[0], drawn[1], *drawn[3], *drawn[4])

    def gradients(dtype, run):
        fine_map, coarse_map, *layers = tensors = leaves(inputs, dtype)
        count = len(layers) // 2
        points = coords.to(dtype)
        out = run(fine_map, coarse_map, points, layers[:count], layers[count:])
        return torch.autograd.grad(out, tensors, received.to(dtype))

    def ours(*args):
        return ops.point_head(*args, coarse_each_layer=coarse_each_layer)

    def theirs(fine_map, coarse_map, coords, weights, biases):
        fine, coarse = torch_sample(fine_map, coords), torch_sample(coarse_map, coords)
        return loop(fine, coarse, weights, biases, coarse_each_layer)

    for got, torchs, exact in zip(
        gradients(torch.float32, ours),
        gradients(torch.float32, theirs),
        gradients(torch.float64, theirs),
        strict=True,
    ):
        assert exact.abs().max() > 0
        assert_within(got, torchs, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_maps_and_weights(dtype):
    """Sampling in fp32, then the MLP in the weights' precision."""
    fine_map, coarse_map, coords, weights, biases = draw()
    halves = [fine_map.to(dtype), coarse_map.to(dtype), coords]
    halves += [[weight.to(dtype) for weight in weights], [bias.to(dtype) for bias in biases]]
    ours = ops.point_head(*halves)
    assert ours.dtype == dtype
    fine, coarse = (torch_sample(map.float(), coords) for map in halves[:2])
    theirs = loop(fine.to(dtype), coarse.to(dtype), halves[3], halves[4], True)
    exact = loop(
        slow_sample(halves[0], coords),
        slow_sample(halves[1], coords),
        [weight.double() for weight in halves[3]],
        [bias.double() for bias in halves[4]],
        True,
    )
    assert_within(ours, theirs, exact)
    # half maps into a head in fp32: nothing is rounded on the way
    mixed = ops.point_head(*halves[:3], weights, biases)
    wide = ops.point_head(halves[0].float(), halves[1].float(), coords, weights, biases)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, wide)


def test_no_points_and_no_images():
    drawn = draw(points=0)
    fine_map = drawn[0].requires_grad_()
    out = ops.point_head(*drawn)
    assert out.shape == (2, 3, 0)
    out.sum().backward()
    assert not fine_map.grad.any()
    fine_map, coarse_map, coords, weights, biases = draw()
    assert ops.point_head(fine_map[:0], coarse_map[:0], coords[:0], weights, biases).shape[0] == 0


def test_shared_points_and_strides():
    fine_map, coarse_map, coords, weights, biases = draw()
    shared = ops.point_head(fine_map, coarse_map, coords[:1], weights, biases)
    repeated = ops.point_head(fine_map, coarse_map, coords[:1].repeat(2, 1, 1), weights, biases)
    assert torch.equal(shared, repeated)
    strided = ops.point_head(
        fine_map.to(memory_format=torch.channels_last),
        coarse_map.transpose(2, 3).contiguous().transpose(2, 3),
        coords[:1].expand(2, -1, -1),
        weights,
        biases,
    )
    assert torch.equal(strided, shared)


@pytest.mark.parametrize("coarse_each_layer", [True, False])
def test_module_computes_with_its_parameters(coarse_each_layer):
    config = PointHeadConfig(channels=8, num_layers=2, coarse_each_layer=coarse_each_layer)
    head = PointHead(5, 3, config)
    fine_map, coarse_map, coords, *_ = draw()
    layers = [module.conv for module in head.fcs] + [head.fc_seg]
    expected = loop(
        slow_sample(fine_map, coords),
        slow_sample(coarse_map, coords),
        [layer.weight.double() for layer in layers],
        [layer.bias.double() for layer in layers],
        coarse_each_layer,
    )
    exact = copy.deepcopy(head).double()(fine_map.double(), coarse_map.double(), coords.double())
    assert_within(exact, exact, expected)
    assert_within(head(fine_map, coarse_map, coords), exact.float(), expected)
