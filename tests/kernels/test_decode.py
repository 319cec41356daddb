"""The kernel that resamples logits and takes their labels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointrend_triton import reference
from pointrend_triton.kernels import decode, launch

# NumPy, on which the interpreter runs
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAN = math.nan
# grid -> image -> result: up and down, one axis only, to a single cell, from a single cell
SIZES = [
    ((5, 7), None, None),
    ((5, 7), (5, 7), (5, 7)),
    ((5, 7), (8, 11), None),
    ((5, 7), None, (3, 4)),
    ((5, 7), (5, 6), (8, 9)),
    ((5, 7), (9, 12), (4, 6)),
    ((5, 7), (9, 7), (9, 10)),
    ((1, 1), (3, 2), (2, 5)),
    ((6, 5), (3, 2), (1, 1)),
]


def far(logits, *sizes):
    """By how much an fp32 value may miss the exact one, after these resamplings.

    A place has three roundings, each 2^-24 of the size; the value moves by at most twice the
    largest logit times that. Products and sums of taps add a dozen roundings.
    """
    places = 3 * sum(sum(size) for size in sizes if size is not None)
    return (2 * places + 12) * 2.0**-24 * logits.abs().max().double()


def check(logits, image_size=None, size=None):
    labels = decode.decode(logits, image_size, size)
    theirs = reference.decode(logits, image_size=image_size, size=size)
    assert labels.dtype == theirs.dtype and labels.shape == theirs.shape
    assert labels.is_contiguous()
    exact = reference.resample(reference.resample(logits.double(), image_size), size)
    if logits.shape[1] == 1:
        exact = torch.cat([torch.zeros_like(exact), exact], dim=1)
    chosen = exact.gather(1, labels.long().unsqueeze(1))[:, 0]
    missed = exact.amax(dim=1) - chosen
    # both values may be off: the label's down, the largest one's up
    assert missed.max() <= 2 * far(logits, logits.shape[2:], image_size)
    assert (labels != theirs).float().mean() <= 0.01
    return labels


@pytest.mark.parametrize("grid, image_size, size", SIZES)
@pytest.mark.parametrize("classes", [1, 2, 19])
def test_decode(classes, grid, image_size, size, device):
    check(torch.randn(2, classes, *grid, device=device), image_size, size)


@pytest.mark.parametrize("classes", [150, 300])
def test_many_classes(classes, device):
    logits = torch.randn(1, classes, 3, 4, device=device)
    logits[:, 140] += 2  # a label that a signed byte would not hold
    labels = check(logits, (4, 5))
    assert labels.dtype == (torch.uint8 if classes == 150 else torch.int64)
    assert (labels == 140).any()


def test_more_pixels_than_a_program_takes(device):
    check(torch.randn(1, 2, 2, 70, device=device), (3, 69), (2, 140))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, device):
    check(torch.randn(1, 10, 5, 7, device=device).to(dtype), (6, 9), (8, 8))


def test_the_steps_are_two(device):
    """Labels of a grid that the first step averages away."""
    logits = torch.zeros(1, 1, 1, 4, device=device) - 1
    logits[..., 1] = 4
    assert check(logits, (1, 2), (1, 4)).tolist() == [[[1, 1, 0, 0]]]
    assert check(logits, None, (1, 4)).tolist() == [[[0, 1, 0, 0]]]


def test_any_strides(device):
    logits = torch.randn(2, 9, 2, 5, device=device)
    expected = decode.decode(logits, (3, 6), (4, 8))
    wide = torch.full((2, 10, 4, 10), NAN, device=device)
    wide[:, 1:, 1:-1, ::2] = logits
    for strided in (
        logits.contiguous(memory_format=torch.channels_last),
        wide[:, 1:, 1:-1, ::2],
        logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        assert torch.equal(decode.decode(strided, (3, 6), (4, 8)), expected)
    check(logits[:1, :, :, :1].expand(3, -1, -1, 4), (5, 6))


@pytest.mark.parametrize("step", [5, 8])  # equal ones in several rows of a tile, or in one
def test_the_lowest_of_equal_classes_is_the_label(step, device):
    logits = torch.randn(1, step, 2, 4, device=device)
    logits = torch.cat([logits - 9, logits, logits, logits - 1, logits], dim=1)
    labels = decode.decode(logits, (3, 5), (4, 7))
    assert torch.equal(labels, decode.decode(logits[:, : 2 * step], (3, 5), (4, 7)))
    assert (labels >= step).all() and (labels < 2 * step).all()


@pytest.mark.parametrize("classes", [1, 3, 9])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_not_finite(value, classes, device):
    """Of NaN the first is the label, as with argmax."""
    logits = torch.randn(1, classes, 5, 5, device=device)
    logits[:, classes // 2, 2, 2] = value
    logits[:, classes // 3 :, 4, 1] = value  # several
    labels = decode.decode(logits)
    assert torch.equal(labels, reference.decode(logits))
    assert labels[0, 4, 1] == classes // 3 or value == -math.inf or classes == 1
    assert torch.equal(decode.decode(logits, (7, 8)), reference.decode(logits, image_size=(7, 8)))


def test_no_maps(device):
    logits = torch.randn(0, 4, 3, 5, device=device)
    assert decode.decode(logits, (6, 7)).shape == (0, 6, 7)
    assert decode.decode(logits).dtype == torch.uint8


@settings(max_examples=20)
@given(
    grid=st.tuples(*[st.integers(1, 6)] * 2),
    image_size=st.none() | st.tuples(*[st.integers(1, 6)] * 2),
    size=st.none() | st.tuples(*[st.integers(1, 6)] * 2),
    classes=st.integers(1, 9),
)
def test_any_sizes(grid, image_size, size, classes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(torch.randn(1, classes, *grid, device=device), image_size, size)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", [3, 9])
def test_every_configuration_decides_alike(classes, channels_last, device):
    logits = torch.randn(1, classes, 2, 35, device=device)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    constants = {"C": classes, "CHANNELS_LAST": channels_last}
    expected = decode.decode(logits, (2, 34), (1, 40))
    for number in range(len(decode.RESAMPLE.configs(constants))):
        with launch.pinned(decode.RESAMPLE, number):
            assert torch.equal(check(logits, (2, 34), (1, 40)), expected)


def test_offsets_of_64_bits(monkeypatch, device):
    logits = torch.randn(2, 9, 2, 5, device=device)
    expected = decode.decode(logits, (3, 6), (4, 8))
    monkeypatch.setattr(decode, "layout", lambda _: {"CHANNELS_LAST": False, "WIDE": True})
    assert torch.equal(decode.decode(logits, (3, 6), (4, 8)), expected)
