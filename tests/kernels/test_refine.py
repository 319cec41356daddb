"""The refinement composed of kernels against the reference, step for step the same points."""

import pytest
import torch
from tolerance import assert_within

from pointrend_triton import ops, reference
from pointrend_triton.kernels.refine import refine


def draw(device, classes=3, size=(5, 7), hidden=16, n=2, dtype=torch.float32):
    fine = torch.randn(n, 6, size[0] + 2, size[1], device=device, dtype=dtype)
    coarse = torch.randn(n, classes, *size, device=device, dtype=dtype)
    widths = [(hidden, 6 + classes), (hidden, hidden + classes), (classes, hidden + classes)]
    weights = [torch.randn(*width, device=device, dtype=dtype) / 4 for width in widths]
    biases = [torch.randn(width[0], device=device, dtype=dtype) for width in widths]
    return coarse, fine, weights, biases


def ours(inputs, *, labels=False, steps=2, num_points=20, kind="top2_margin", **sizes):
    return refine(
        *inputs,
        steps=steps,
        num_points=num_points,
        coarse_each_layer=True,
        kind=kind,
        return_labels=labels,
        image_size=sizes.get("image_size"),
        size=sizes.get("size"),
        dtype=inputs[2][0].dtype,
        precision="ieee",
    )


def theirs(inputs, *, labels=False, kind="top2_margin", **options):
    output = "labels" if labels else "logits"
    return reference.refine(*inputs, output=output, uncertainty=kind, **options)


def double(inputs):
    return [
        value.double() if isinstance(value, torch.Tensor) else [part.double() for part in value]
        for value in inputs
    ]


@pytest.mark.parametrize("kind", ops.UNCERTAINTIES)
@pytest.mark.parametrize(
    ("steps", "num_points", "classes", "size"),
    [
        (2, 20, 3, (5, 7)),
        (1, 20, 1, (5, 7)),
        (3, 65, 19, (3, 2)),
        (2, 10**6, 2, (2, 3)),
        (2, 100, 150, (1, 1)),
        (2, 0, 3, (5, 7)),
        (0, 20, 3, (5, 7)),
    ],
)
def test_logits_and_labels(device, steps, num_points, classes, size, kind):
    inputs = draw(device, classes, size)
    options = {"steps": steps, "num_points": num_points, "kind": kind}
    logits = ours(inputs, **options)
    plain, exact = theirs(inputs, **options), theirs(double(inputs), **options)
    assert_within(logits, plain, exact)
    labels = ours(inputs, labels=True, **options)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, theirs(inputs, labels=True, **options))


@pytest.mark.parametrize(
    ("image_size", "size"),
    [
        ((20, 28), None),
        ((19, 27), None),
        (None, (33, 31)),
        ((19, 27), (40, 60)),
        ((20, 28), (9, 9)),
    ],
)
def test_labels_at_other_sizes(device, image_size, size):
    inputs = draw(device)
    sizes = {"image_size": image_size, "size": size}
    labels = ours(inputs, labels=True, **sizes)
    expected = theirs(inputs, labels=True, steps=2, num_points=20, **sizes)
    assert labels.shape == expected.shape
    # where two classes tie within rounding either may win
    assert (labels != expected).float().mean() < 0.002


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy, interpreting
@pytest.mark.parametrize("num_points", [0, 10**6])  # labels of the enlarged map, of the points
@pytest.mark.parametrize("sizes", [{}, {"image_size": (19, 27)}])
def test_the_first_nan_is_the_label(device, sizes, num_points):
    coarse, *others = draw(device, classes=9)
    coarse[0, 4:6, 2, 3] = torch.nan
    coarse[1, 8, 2, 2] = torch.inf
    inputs = coarse, *others
    labels = ours(inputs, labels=True, num_points=num_points, **sizes)
    expected = theirs(inputs, labels=True, steps=2, num_points=num_points, **sizes)
    assert (expected[0] == (4 if num_points == 0 else 0)).sum() > 40
    assert torch.equal(labels, expected)


def test_many_classes_give_int64(device):
    inputs = draw(device, classes=300, size=(2, 2))
    labels = ours(inputs, labels=True)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, theirs(inputs, labels=True, steps=2, num_points=20))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_strides(device, layout):
    coarse, fine, weights, biases = draw(device)
    if layout == "channels_last":
        coarse, fine = (t.to(memory_format=torch.channels_last) for t in (coarse, fine))
        weights = [weight.t().contiguous().t() for weight in weights]
    elif layout == "sliced":
        coarse, fine = coarse[:, :, :, 1:-1], fine[:, :, ::2]
    else:
        coarse, fine = coarse[:1].expand(2, -1, -1, -1), fine[:1].expand(2, -1, -1, -1)
    inputs = coarse, fine, weights, biases
    before = coarse.clone()
    result = ours(inputs)
    options = {"steps": 2, "num_points": 20}
    assert_within(result, theirs(inputs, **options), theirs(double(inputs), **options))
    assert torch.equal(coarse, before), "the input was written to"


def test_no_steps_give_a_copy(device):
    inputs = draw(device)
    result = ours(inputs, steps=0)
    assert torch.equal(result, inputs[0])
    assert result.data_ptr() != inputs[0].data_ptr()


def test_no_images(device):
    inputs = draw(device, n=0)
    assert ours(inputs).shape == (0, 3, 20, 28)
    assert ours(inputs, labels=True).shape == (0, 20, 28)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_half_precision(device, dtype):
    """Other cells may be chosen where two scores tie within rounding, so a share may differ."""
    inputs = draw(device, dtype=dtype)
    logits = ours(inputs)
    exact = theirs(double(inputs), steps=2, num_points=20)
    far = (logits.double() - exact).abs() > 0.05 * exact.abs().max()
    assert logits.dtype == dtype
    assert far.any(dim=1).float().mean() < 0.05
