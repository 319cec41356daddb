"""Kernels that score logits: everywhere on an enlarged map, and at points."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_within
from torch.testing import assert_close

from pointrend_triton import reference
from pointrend_triton.kernels import decode, launch, uncertainty

# NumPy, on which the interpreter runs
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAN, INF = math.nan, math.inf
KINDS = ("top2_margin", "neg_abs")
HALF = (torch.float16, torch.bfloat16)
# the interpreter cuts bits off instead of rounding to bf16
ROUNDED = (torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu))


def upsample(logits, scale=2, kind="top2_margin", return_logits=True, return_labels=True):
    return uncertainty.upsample(
        logits, scale, kind=kind, return_logits=return_logits, return_labels=return_labels
    )


def upsample_twin(logits, scale=2, kind="top2_margin"):
    return reference.upsample_uncertainty(logits, scale, uncertainty=kind, return_labels=True)


def sampled_twin(logits, coords, kind="top2_margin"):
    return reference.score(reference.point_sample(logits, coords), kind)[:, 0]


def assert_labels(labels, exact, off):
    """Each label is of a class whose exact value [N, C, H, W] is at most `off` from the largest."""
    assert labels.dtype == (torch.uint8 if exact.shape[1] <= 256 else torch.int64)
    assert labels.shape == (exact.shape[0], *exact.shape[2:])
    if exact.shape[1] == 1:
        exact = torch.cat([torch.zeros_like(exact), exact], dim=1)
    chosen = exact.gather(1, labels.long().unsqueeze(1))
    assert (exact.amax(dim=1, keepdim=True) - chosen).max() <= off


def check_upsample(logits, scale=2, kind="top2_margin"):
    scores, values, labels = upsample(logits, scale, kind)
    their_scores, their_values, _ = upsample_twin(logits, scale, kind)
    exact_scores, exact_values, _ = upsample_twin(logits.double(), scale, kind)
    assert scores.dtype == torch.float32
    assert values.dtype == logits.dtype and values.is_contiguous()
    assert_within(scores, their_scores, exact_scores)
    assert_within(values, their_values, exact_values)
    # two values may each be off by some ulp: 16 * 2^-24 of the largest
    assert_labels(labels, exact_values, 1e-6 * logits.abs().max())
    return scores, values, labels


def check_sampled(logits, coords, kind="top2_margin"):
    ours = uncertainty.sampled(logits, coords, kind=kind)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    theirs = sampled_twin(logits, coords, kind)
    assert_within(ours, theirs, sampled_twin(logits.double(), coords.double(), kind))
    return ours


def spots(n, points, device):
    """Points on the map, beyond it, on its border, corners and centre, and twice the same."""
    special = torch.tensor([[0, 0], [1, 1], [0, 0.5], [0.5, 0.5], [0.5, 0.5], [1.4, -0.3], [-9, 2]])
    coords = torch.rand(n, points, 2) * 1.4 - 0.2
    coords[:, : len(special)] = special[:points]
    return coords.to(device)


def layouts(logits):
    """The same values in other strides."""
    n, c, h, w = logits.shape
    wide = torch.full((n, c + 1, h + 2, 2 * w), NAN, dtype=logits.dtype, device=logits.device)
    wide[:, 1:, 1:-1, ::2] = logits
    return {
        "channels_last": logits.contiguous(memory_format=torch.channels_last),
        "sliced": wide[:, 1:, 1:-1, ::2],
        "permuted": logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    }


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_upsample(classes, size, scale, device):
    check_upsample(torch.randn(2, classes, *size, device=device), scale)


@pytest.mark.parametrize("classes", [150, 300])
def test_upsample_of_many_classes(classes, device):
    logits = torch.randn(1, classes, 2, 3, device=device)
    logits[:, 140] += 2  # a label that a signed byte would not hold
    check_upsample(logits)


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("classes", [1, 9])
def test_upsample_by_distance_from_zero(classes, scale, device):
    logits = torch.randn(2, classes, 3, 4, device=device)
    scores, values, _ = check_upsample(logits, scale, "neg_abs")
    assert torch.equal(scores, -values[:, :1].abs())
    alone, _, _ = upsample(logits, scale, "neg_abs", return_logits=False, return_labels=False)
    assert torch.equal(alone, scores)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("scale", [2, 3])
def test_upsample_of_half_precision(dtype, scale, device):
    check_upsample((torch.randn(1, 10, 3, 5, device=device) * 4).to(dtype), scale)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [2, 3])
def test_scores_of_half_precision_are_of_values_not_yet_rounded(dtype, scale, device):
    logits = torch.randn(1, 10, 3, 5, device=device).to(dtype)
    scores, _, labels = upsample(logits, scale)
    for ours, theirs in ((scores, 0), (labels, 2)):
        assert_close(ours, upsample_twin(logits.float(), scale)[theirs])


def test_upsample_of_more_pixels_than_a_program_takes(device):
    check_upsample(torch.randn(1, 2, 2, 150, device=device))


@pytest.mark.parametrize("scale", [2, 3])
def test_upsample_of_any_strides(scale, device):
    logits = torch.randn(2, 9, 3, 5, device=device)
    expected = upsample(logits, scale)
    for strided in layouts(logits).values():
        for ours, theirs in zip(upsample(strided, scale), expected, strict=True):
            assert torch.equal(ours, theirs)
    row = logits[:1, :, :, :1]
    check_upsample(row.expand(3, -1, -1, 4), scale)


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("scale", [2, 3])
def test_upsample_gives_what_was_asked_for(scale, wanted, device):
    logits = torch.randn(1, 9, 2, 3, device=device)
    expected = upsample(logits, scale)
    given_back = upsample(logits, scale, "top2_margin", *wanted)
    for ours, theirs, is_wanted in zip(given_back, expected, (True, *wanted), strict=True):
        assert torch.equal(ours, theirs) if is_wanted else ours is None


@pytest.mark.parametrize("step", [5, 8])  # equal ones in several rows of a tile, or in one
@pytest.mark.parametrize("scale", [2, 3])
def test_the_lowest_of_equal_classes_is_the_label(scale, step, device):
    logits = torch.randn(1, step, 2, 3, device=device)
    logits = torch.cat([logits - 9, logits, logits, logits - 1, logits], dim=1)
    scores, _, labels = upsample(logits, scale)
    assert (scores == 0).all()
    assert torch.equal(labels, upsample(logits[:, : 2 * step], scale)[2])
    assert (labels >= step).all() and (labels < 2 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2, 3])
def test_the_largest_numbers_do_not_overflow(dtype, scale, device):
    largest = torch.finfo(dtype).max
    logits = torch.full((1, 2, 3, 4), largest, dtype=dtype, device=device)
    logits[:, 1] = largest / 2
    scores, values, _ = upsample(logits, scale)
    assert values.isfinite().all() and scores.isfinite().all()
    assert (values[:, 0].float() >= 0.99 * largest).all()


@pytest.mark.parametrize("classes", [1, 3, 9])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("scale", [2, 3])
def test_upsample_of_what_is_not_finite(scale, value, classes, device):
    logits = torch.randn(1, classes, 5, 5, device=device)
    logits[:, classes // 2, 2, 2] = value
    logits[:, classes // 3 :, 1, 3] = value  # several: the first NaN is the label
    scores, values, labels = upsample(logits, scale)
    their_scores, their_values, their_labels = upsample_twin(logits, scale)
    inner = (..., slice(scale, -scale), slice(scale, -scale))
    # outside, torch multiplies the border's taps with zero, which is NaN for infinity
    assert_close(scores[inner], their_scores[inner], equal_nan=True)
    assert_close(values[inner], their_values[inner], equal_nan=True)
    assert torch.equal(labels[inner], their_labels[inner])
    assert value == value or scores.isnan().any()


def test_all_classes_at_minus_infinity(device):
    logits = torch.full((1, 9, 2, 2), -INF, device=device)
    scores, _, labels = upsample(logits)
    assert scores.isnan().all()
    assert (labels == 0).all()


@pytest.mark.parametrize("scale", [2, 3])
def test_upsample_of_no_maps(scale, device):
    scores, values, labels = upsample(torch.randn(0, 4, 3, 5, device=device), scale)
    assert scores.shape == (0, 1, 3 * scale, 5 * scale)
    assert values.shape == (0, 4, 3 * scale, 5 * scale)
    assert labels.shape == (0, 3 * scale, 5 * scale)


@settings(max_examples=20)
@given(
    size=st.tuples(*[st.integers(1, 6)] * 2),
    classes=st.integers(1, 12),
    scale=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    magnitude=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_upsample_of_any_shape(size, classes, scale, kind, magnitude):
    check_upsample(magnitude * torch.randn(1, classes, *size, device=where()), scale, kind)


def where():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (4, 7)])
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_sampled(classes, size, kind, device):
    check_sampled(torch.randn(2, classes, *size, device=device), spots(2, 33, device), kind)


def test_sampled_of_many_classes(device):
    check_sampled(torch.randn(1, 150, 3, 5, device=device), spots(1, 9, device))


@pytest.mark.parametrize("dtype", HALF)
def test_sampled_of_half_precision(dtype, device):
    logits = torch.randn(2, 9, 4, 5, device=device).to(dtype)
    check_sampled(logits, spots(2, 20, device))
    check_sampled(logits, spots(2, 20, device).to(dtype))


def test_sampled_of_any_strides(device):
    logits, coords = torch.randn(2, 9, 3, 5, device=device), spots(2, 20, device)
    expected = uncertainty.sampled(logits, coords, kind="top2_margin")
    flipped = coords.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for strided in layouts(logits).values():
        assert torch.equal(uncertainty.sampled(strided, flipped, kind="top2_margin"), expected)
    check_sampled(logits[:1, :, :, :1].expand(2, -1, -1, 4), coords[:, ::3])


def test_sampled_at_shared_points(device):
    logits, coords = torch.randn(3, 2, 4, 5, device=device), spots(1, 20, device)
    ours = check_sampled(logits, coords)
    assert torch.equal(ours, check_sampled(logits, coords.expand(3, -1, -1)))


def test_sampled_at_equal_points_is_equal(device):
    logits = torch.randn(1, 9, 4, 5, device=device)
    ours = uncertainty.sampled(logits, spots(1, 1, device).expand(1, 70, 2), kind="top2_margin")
    assert (ours == ours[0, 0]).all()


@pytest.mark.parametrize("classes", [1, 9])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_sampled_of_what_is_not_finite(value, classes, device):
    logits = torch.randn(1, classes, 5, 5, device=device)
    logits[:, 0, 2, 2] = value
    coords = torch.rand(1, 40, 2, device=device)
    ours = uncertainty.sampled(logits, coords, kind="top2_margin")
    assert_close(ours, sampled_twin(logits, coords), equal_nan=True)
    assert value == -INF and classes > 1 or not ours.isfinite().all()


def test_sampled_at_what_is_not_a_place(device):
    """Beyond the map all classes are zero: as uncertain as can be."""
    coords = torch.tensor([[[NAN, 0.5], [0.5, INF], [-INF, 0.5], [1e30, 0.5], [0.5, 0.5]]])
    scores = uncertainty.sampled(
        torch.rand(1, 3, 4, 4, device=device), coords.to(device), kind="top2_margin"
    )
    assert scores[0, :4].tolist() == [0, 0, 0, 0]
    assert scores[0, 4] < 0


@pytest.mark.parametrize("n, points", [(0, 5), (2, 0)])
def test_sampled_of_nothing(n, points, device):
    logits, coords = torch.rand(n, 3, 4, 4, device=device), torch.rand(1, points, 2, device=device)
    assert uncertainty.sampled(logits, coords, kind="top2_margin").shape == (n, points)


@settings(max_examples=20)
@given(
    size=st.tuples(*[st.integers(1, 6)] * 2),
    classes=st.integers(1, 12),
    points=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
)
def test_sampled_of_any_shape(size, classes, points, kind):
    check_sampled(torch.randn(2, classes, *size, device=where()), spots(2, points, where()), kind)


def configs_of(kernel):
    """Calls that differ in the list of configurations, with the number of each list."""
    return [
        (classes, channels_last, number)
        for classes in (3, 19)
        for channels_last in (False, True)
        for number in range(len(kernel.configs({"C": classes, "CHANNELS_LAST": channels_last})))
    ]


def logits_of(classes, channels_last, device):
    logits = torch.randn(1, classes, 2, 35, device=device)
    return logits.contiguous(memory_format=torch.channels_last) if channels_last else logits


@pytest.mark.parametrize("classes, channels_last, number", configs_of(uncertainty.DOUBLE))
def test_every_configuration_enlarges_alike(classes, channels_last, number, device):
    logits = logits_of(classes, channels_last, device)
    with launch.pinned(uncertainty.DOUBLE, number):
        _, _, labels = check_upsample(logits)
    assert torch.equal(labels, upsample(logits)[2])


@pytest.mark.parametrize("classes, channels_last, number", configs_of(uncertainty.SAMPLED))
def test_every_configuration_samples_alike(classes, channels_last, number, device):
    logits = logits_of(classes, channels_last, device)
    with launch.pinned(uncertainty.SAMPLED, number):
        check_sampled(logits, spots(1, 40, device))


def distant(device):
    """Logits [1, 3, 2, 3] whose columns lie 2^30 elements apart, the last 2^31 from the first."""
    step = 1 << 30
    count = 2 * step + 6
    if device == "cpu":
        memory = torch.from_numpy(np.zeros(count, np.float16))  # only what is touched is there
    else:
        memory = torch.zeros(count, dtype=torch.float16, device=device)
    logits = memory.as_strided((1, 3, 2, 3), (0, 1, 3, step))
    return logits.copy_(torch.randn(1, 3, 2, 3))


def test_offsets_of_more_than_31_bits(device):
    logits = distant(device)
    check_upsample(logits)
    check_upsample(logits, 3)
    check_sampled(logits, spots(1, 9, device))


def test_only_far_offsets_are_wide():
    near = torch.empty(1, 150, 1024, 2048, device="meta")
    assert decode.layout(near) == {"CHANNELS_LAST": False, "WIDE": False}
    last = near.to(memory_format=torch.channels_last)
    assert decode.layout(last) == {"CHANNELS_LAST": True, "WIDE": False}
    assert decode.layout(torch.empty(1, 2, 8192, 16384, device="meta"))["WIDE"]
