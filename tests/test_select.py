"""Which points are chosen: random ones to train on, the most uncertain cells to refine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointrend_triton import ops

NAN, INF = float("nan"), float("inf")


def stated(logits, num_points, oversample=3.0, importance=0.75, generator=None):
    """mmsegmentation's rule in words: draw, sample, order by margin, keep the head, draw more."""
    n = len(logits)
    candidates = torch.rand(n, int(num_points * oversample), 2, generator=generator)
    num_uncertain = int(importance * num_points)
    random = torch.rand(n, num_points - num_uncertain, 2, generator=generator)
    rows = []
    for i in range(n):
        sampled = ops.point_sample(logits[i : i + 1], candidates[i : i + 1])[0]
        if len(sampled) == 1:
            scores = -sampled[0].abs()
        else:
            ordered = sampled.sort(dim=0, descending=True).values
            scores = ordered[1] - ordered[0]
        kept = scores.argsort(descending=True)[:num_uncertain]
        rows.append(torch.cat([candidates[i, kept], random[i]]))
    return torch.stack(rows)


@pytest.mark.parametrize("classes", [1, 2, 19])
@pytest.mark.parametrize(
    ("points", "oversample", "importance"),
    [(20, 3.0, 0.75), (7, 2.5, 0.5), (9, 1.0, 0.75), (8, 3.0, 0.0), (8, 3.0, 1.0), (1, 3.0, 0.75)],
)
def test_same_seed_same_points(points, oversample, importance, classes):
    logits = torch.randn(2, classes, 6, 9)
    torch.manual_seed(3)
    expected = stated(logits, points, oversample, importance)
    torch.manual_seed(3)
    coords = ops.select_uncertain_points(
        logits, points, oversample_ratio=oversample, importance_sample_ratio=importance
    )
    assert coords.shape == (2, points, 2)
    assert torch.equal(coords, expected)


def test_generator_and_draws():
    logits = torch.randn(2, 5, 6, 9)
    generator = torch.Generator().manual_seed(5)
    expected = stated(logits, 12, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    coords = ops.select_uncertain_points(logits, 12, generator=generator)
    assert torch.equal(coords, expected)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    generator.manual_seed(5)
    draws = tuple(torch.rand(2, count, 2, generator=generator) for count in (36, 3))
    assert torch.equal(ops.select_uncertain_points(logits, 12, draws=draws), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_callable_uncertainty():
    """The candidates furthest right, whatever the logits, and in that order."""
    draws = (torch.rand(2, 30, 2), torch.rand(2, 3, 2))
    logits = torch.linspace(0, 1, 64).expand(2, 1, 64, 64)
    coords = ops.select_uncertain_points(logits, 10, uncertainty=lambda x: x, draws=draws)
    inner = ops.point_sample(logits, draws[0])[:, 0]
    for i in range(2):
        order = sorted(range(30), key=lambda p: -inner[i, p].item())[:7]
        assert torch.equal(coords[i, :7], draws[0][i, order])
        assert torch.equal(coords[i, 7:], draws[1][i])


@pytest.mark.parametrize("classes", [1, 4])
def test_uncertain_set_by_brute_force(classes):
    """No candidate left out is more uncertain than one kept; the random points come last."""
    logits = torch.randn(3, classes, 8, 8).half()
    draws = (torch.rand(3, 60, 2), torch.rand(3, 5, 2))
    coords = ops.select_uncertain_points(logits, 20, draws=draws)
    assert coords.dtype == torch.float32
    assert torch.equal(coords[:, 15:], draws[1])
    sampled = ops.point_sample(logits, draws[0])
    top = sampled.sort(dim=1, descending=True).values
    scores = -sampled[:, 0].abs() if classes == 1 else top[:, 1] - top[:, 0]
    for i in range(3):
        kept = {tuple(point) for point in coords[i, :15].tolist()}
        inside = [tuple(point) in kept for point in draws[0][i].tolist()]
        mask = torch.tensor(inside)
        assert mask.sum() == 15
        assert scores[i][mask].min() >= scores[i][~mask].max()
        of = {tuple(p): s for p, s in zip(draws[0][i].tolist(), scores[i].tolist(), strict=True)}
        ordered = [of[tuple(point)] for point in coords[i, :15].tolist()]
        assert ordered == sorted(ordered, reverse=True), "most uncertain first"


def test_margin_of_interpolated_logits():
    """Between two cells sure of different classes the logits cross: the margin there is zero."""
    logits = torch.tensor([[[[4.0, -4.0]], [[-4.0, 4.0]]]])
    candidates = torch.tensor([[[0.3, 0.5], [0.5, 0.5], [0.7, 0.5]]])
    coords = ops.select_uncertain_points(
        logits, 1, importance_sample_ratio=1.0, draws=(candidates, torch.rand(1, 0, 2))
    )
    assert coords.tolist() == [[[0.5, 0.5]]]


def test_no_gradient_and_no_images():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    assert not ops.select_uncertain_points(logits, 4).requires_grad
    assert ops.select_uncertain_points(torch.randn(0, 3, 4, 4), 5).shape == (0, 5, 2)


def documented_centres(indices, height, width):
    """In float32: the index times the rounded step, rounded, plus half the step, rounded."""
    flat = indices.numpy()
    axes = []
    for index, size in ((flat % width, width), (flat // width, height)):
        step = np.float32(1 / size)
        axes.append(index.astype(np.float32) * step + np.float32(1 / size / 2))
    return torch.from_numpy(np.stack(axes, axis=2))


def rank(value):
    """NaN above infinity above all else."""
    return INF if value != value else value if value != INF else 1e300


@given(data=st.data())
@settings(max_examples=60)
def test_topk_on_grid(data):
    height, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    value = st.floats(width=32) | st.sampled_from([NAN, INF, -INF, 0.0, -1.0])
    cells = height * width
    scores = data.draw(st.lists(value, min_size=cells, max_size=cells))
    k = data.draw(st.integers(0, cells + 3))
    uncertainty = torch.tensor([scores, scores[::-1]]).view(2, 1, height, width)
    indices, coords = ops.topk_on_grid(uncertainty, k)
    count = min(k, cells)
    assert indices.dtype == torch.int64
    assert indices.shape == (2, count)
    assert coords.dtype == torch.float32
    assert torch.equal(coords, documented_centres(indices, height, width))
    for row, chosen in zip(uncertainty.flatten(1).tolist(), indices.tolist(), strict=True):
        assert len(set(chosen)) == count
        ranks = sorted((rank(row[i]) for i in chosen), reverse=True)
        assert ranks == sorted(map(rank, row), reverse=True)[:count]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (256, 7), (11, 683)])
def test_centres_bit_for_bit(size):
    indices, coords = ops.topk_on_grid(torch.zeros(1, 1, *size), 10**6)
    assert sorted(indices[0].tolist()) == list(range(size[0] * size[1]))
    assert torch.equal(coords, documented_centres(indices, *size))
    exact = np.stack([indices.numpy() % size[1] + 0.5, indices.numpy() // size[1] + 0.5], 2)
    assert np.abs(coords.numpy() - exact / np.array(size[::-1])).max() < 2**-23


def test_topk_of_strided_half_maps():
    whole = torch.randperm(2 * 40).view(2, 1, 5, 8).half()
    strided = whole.transpose(2, 3).contiguous().transpose(2, 3)
    indices, coords = ops.topk_on_grid(strided[..., ::2], 6)
    expected, _ = ops.topk_on_grid(whole[..., ::2].contiguous().float(), 6)
    assert torch.equal(indices.sort().values, expected.sort().values)
    assert torch.equal(coords, documented_centres(indices, 5, 4))


def test_topk_without_images():
    indices, coords = ops.topk_on_grid(torch.zeros(0, 1, 3, 4), 5)
    assert indices.shape == (0, 5)
    assert coords.shape == (0, 5, 2)
