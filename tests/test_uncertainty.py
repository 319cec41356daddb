"""Margins and labels of enlarged logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within

from pointrend_triton import ops, reference

NAN, INF = math.nan, math.inf


def enlarge(logits, scale=2):
    return F.interpolate(logits, scale_factor=scale, mode="bilinear", align_corners=False)


def slow_enlarge(cells, scale):
    """Rows of one channel, in fp64: half-pixel centres, border cells repeated."""

    def taps(i, size):
        where = max((i + 0.5) / scale - 0.5, 0)
        low = math.floor(where)
        return low, min(low + 1, size - 1), where - low

    height, width = len(cells), len(cells[0])
    out = []
    for i in range(scale * height):
        top, bottom, v = taps(i, height)
        out.append([])
        for j in range(scale * width):
            left, right, h = taps(j, width)
            upper = (1 - h) * cells[top][left] + h * cells[top][right]
            lower = (1 - h) * cells[bottom][left] + h * cells[bottom][right]
            out[-1].append((1 - v) * upper + v * lower)
    return out


def slow_score(values):
    """The uncertainty of one cell from its logits."""
    if len(values) == 1:
        return -abs(values[0])
    first, second = sorted(values, reverse=True)[:2]
    return second - first


def slow(logits, scale):
    """fp64 logits, scores and labels, cell by cell."""
    large = torch.tensor(
        [[slow_enlarge(channel, scale) for channel in image] for image in logits.tolist()],
        dtype=torch.float64,
    )
    cells = large.movedim(1, -1).flatten(0, 2).tolist()
    shape = (len(logits), 1, *large.shape[2:])
    scores = torch.tensor([slow_score(cell) for cell in cells], dtype=torch.float64).view(shape)
    if logits.shape[1] == 1:
        labels = [int(cell[0] > 0) for cell in cells]
    else:
        labels = [max(range(len(cell)), key=cell.__getitem__) for cell in cells]
    return scores, large, torch.tensor(labels).view(len(logits), *large.shape[2:])


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_equals_the_slow_twin(classes, size, scale):
    logits = torch.randn(2, classes, *size)
    scores, large, labels = ops.upsample_uncertainty(logits, scale, return_labels=True)
    exact_scores, exact_large, exact_labels = slow(logits, scale)
    assert_within(large, enlarge(logits, scale), exact_large)
    top = enlarge(logits, scale).sort(dim=1, descending=True).values
    theirs = -top.abs() if classes == 1 else top[:, 1:2] - top[:, :1]
    assert_within(scores, theirs, exact_scores)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), exact_labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 7])
def test_margin_comes_before_rounding(classes, dtype):
    """Half maps: scores and labels are those of the fp32 values, the stored logits rounded."""
    logits = (100 + torch.randn(1, classes, 6, 7)).to(dtype)
    scores, large, labels = ops.upsample_uncertainty(logits, return_labels=True)
    wide = ops.upsample_uncertainty(logits.float(), return_labels=True)
    assert scores.dtype == torch.float32
    assert large.dtype == dtype
    assert torch.equal(scores, wide[0])
    assert torch.equal(large, wide[1].to(dtype))
    assert torch.equal(labels, wide[2])
    assert not torch.equal(scores, reference.score(large.float())), "rounding must matter here"


def test_double_precision_is_kept():
    logits = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    scores, large, _ = ops.upsample_uncertainty(logits)
    assert scores.dtype == large.dtype == torch.float64
    assert torch.equal(large, enlarge(logits))


def test_what_is_returned():
    logits = torch.randn(1, 3, 4, 4)
    scores, large, labels = ops.upsample_uncertainty(logits)
    assert large is not None
    assert labels is None
    again, large, labels = ops.upsample_uncertainty(logits, return_logits=False, return_labels=True)
    assert large is None
    assert labels.shape == (1, 8, 8)
    assert torch.equal(again, scores)
    assert not ops.upsample_uncertainty(logits.requires_grad_())[1].requires_grad


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (300, torch.int64)])
def test_many_classes(classes, dtype):
    logits = torch.randn(1, classes, 3, 3)
    logits[:, -1] += 100
    labels = ops.upsample_uncertainty(logits, return_labels=True)[2]
    assert labels.dtype == dtype
    assert labels.unique().tolist() == [classes - 1]
    assert torch.equal(labels, ops.decode(enlarge(logits)))


def test_not_finite():
    """A margin of NaN is the most uncertain of all; infinity beside infinity has one, too."""
    cells = torch.tensor([[NAN, 1, 2], [INF, 1, 2], [INF, INF, 2], [-INF, 1, 4]])
    logits = cells.T.reshape(1, 3, 2, 2)
    margins = reference.score(logits).flatten().tolist()
    assert math.isnan(margins[0])
    assert math.isnan(margins[2])
    assert margins[1] == -INF
    assert margins[3] == -3
    assert reference.logits_to_labels(logits).tolist() == [[[0, 0], [0, 2]]]
    logits = torch.randn(1, 3, 5, 5)
    logits[0, 1, 2, 2] = NAN
    scores, _, labels = ops.upsample_uncertainty(logits, return_labels=True)
    spoilt = scores[0, 0].isnan()
    assert spoilt.sum() == 16, "a bilinear neighbour of four by four cells"
    assert (labels[0][spoilt] == 1).all()
    chosen, _ = ops.topk_on_grid(scores, 16)
    assert sorted(chosen[0].tolist()) == spoilt.flatten().nonzero().flatten().tolist()


def test_named_and_callable_rules():
    logits = torch.randn(2, 3, 4, 5)
    large = enlarge(logits)
    scores = ops.upsample_uncertainty(logits, uncertainty="neg_abs")[0]
    assert torch.equal(scores, -large[:, :1].abs())
    scores = ops.upsample_uncertainty(logits, uncertainty=lambda x: x.mean(1, keepdim=True))[0]
    assert torch.equal(scores, large.mean(1, keepdim=True))
    # of points [N, C, K] as well as of maps
    points = torch.tensor([[[3.0, -1.0], [1.0, -4.0], [2.5, -1.0]]])
    assert reference.score(points).tolist() == [[[-0.5, 0.0]]]
    assert reference.score(points[:, :1]).tolist() == [[[-3.0, -1.0]]]


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(2, 8, 9, 6)[:, ::2, 2:7],
        torch.randn(1, 4, 5, 6).expand(2, -1, -1, -1),
    ],
    ids=["channels_last", "sliced", "expanded"],
)
def test_any_strides(logits):
    ours = ops.upsample_uncertainty(logits, return_labels=True)
    exact = ops.upsample_uncertainty(logits.double(), return_labels=True)
    theirs = ops.upsample_uncertainty(logits.contiguous(), return_labels=True)
    for i in range(2):
        assert_within(ours[i], theirs[i], exact[i])
    assert torch.equal(ours[2], exact[2])


def test_zeros_around_a_map_of_ones():
    """At test time the cells' centres reach over the border, where sampling mixes in zeros."""
    ones = torch.ones(1, 1, 4, 6)
    rings = {1: (0.75,), 2: (0.625, 0.875)}  # by step, outermost first
    corners = {1: 0.5625, 2: 0.390625}
    for step in (1, 2):
        height, width = 4 * 2**step, 6 * 2**step
        indices, coords = ops.topk_on_grid(torch.zeros(1, 1, height, width), height * width)
        seen = torch.empty(height * width).scatter(
            0, indices[0], ops.point_sample(ones, coords)[0, 0]
        )
        seen = seen.view(height, width)
        assert seen[0, 0].item() == pytest.approx(corners[step], abs=1e-6)
        for depth, value in enumerate(rings[step]):
            middle = torch.stack([seen[depth, width // 2], seen[-1 - depth, width // 2]])
            assert middle.tolist() == pytest.approx([value] * 2, abs=1e-6)
            assert seen[height // 2, depth].item() == pytest.approx(value, abs=1e-6)
        inner = seen[len(rings[step]) : -len(rings[step]), len(rings[step]) : -len(rings[step])]
        assert (inner - 1).abs().max() < 1e-6
        # enlarging repeats the border instead
        assert torch.equal(enlarge(ones, 2**step), torch.ones(1, 1, height, width))
