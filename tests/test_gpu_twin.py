"""The twin that computes as a GPU does: it differs where a GPU does, and nowhere else."""

import math

import gpu_twin
import pytest
import torch
import torch.nn.functional as F

from pointrend_triton import precision


def test_convolutions_are_in_tf32_where_that_is_allowed():
    input, weight = torch.randn(2, 64, 5), torch.randn(3, 64, 1)
    exact = F.conv1d(input.double(), weight.double())
    error = (gpu_twin.conv1d(input, weight) - exact).abs().max()
    with precision.tf32(True):
        rounded = gpu_twin.conv1d(input, weight)
        half = gpu_twin.conv1d(input.half(), weight.half())
    assert half.dtype == torch.float16
    assert error < 1e-5 < 1e-4 < (rounded - exact).abs().max()


def test_rounding_to_tf32():
    values = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 - 2**-12, -1 - 3 * 2**-12, math.inf])
    expected = [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, math.inf]
    values.requires_grad_()
    rounded = gpu_twin.rounded_to_tf32(values)
    assert rounded.tolist() == expected
    assert torch.autograd.grad(rounded.sum(), values)[0].tolist() == [1] * 6
    assert gpu_twin.rounded_to_tf32(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_places_that_are_not_finite(padding_mode):
    map = torch.arange(1.0, 13.0).view(1, 1, 3, 4)
    grid = torch.tensor([[[[math.nan, 0.0], [math.inf, 0.0], [-math.inf, 0.0], [0.3, 0.2]]]])
    sampled = gpu_twin.grid_sample(map, grid, "bilinear", padding_mode, False).flatten()
    expected = [0, 0, 0] if padding_mode == "zeros" else [5, 8, 5]
    assert sampled[:3].tolist() == expected
    plain = F.grid_sample(map, grid[:, :, 3:], "bilinear", padding_mode, False)
    assert sampled[3] == plain.item()


def test_topk_chooses_other_ones_of_equals():
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 5.0]])
    found = gpu_twin.topk(values, 3, dim=1)
    assert found.values.tolist() == [[5, 3, 2]]
    assert found.indices[0, :2].tolist() == [5, 0] and values[0, found.indices[0, 2]] == 2
    assert found.indices[0, 2] != gpu_twin._topk(values, 3).indices[0, 2]
