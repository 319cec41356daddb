"""The adaptive subdivision and the decoding of its result."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_point_head import draw_layers
from torch import nn

from pointrend_triton import ops, reference


def enlarge(logits):
    return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


def resize(logits, size):
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def draw(classes=3, size=(4, 6), **layers):
    maps = torch.randn(2, classes, *size), torch.randn(2, 5, *size)
    return (*maps, *draw_layers(5, classes, **layers))


def centres(height, width):
    """Of all cells in row order, [1, H * W, 2]."""
    indices, coords = ops.topk_on_grid(torch.zeros(1, 1, height, width), height * width)
    return coords[:, indices[0].argsort()]


@pytest.mark.parametrize("coarse_each_layer", [True, False])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_all_cells_refined(steps, classes, coarse_each_layer):
    """Then it is the point head at every cell, fed with the original coarse map."""
    coarse, fine_map, weights, biases = draw(classes, coarse_each_layer=coarse_each_layer)
    how = {"coarse_each_layer": coarse_each_layer}
    height, width = 4 * 2**steps, 6 * 2**steps
    refined = ops.refine(
        coarse, fine_map, weights, biases, steps=steps, num_points=height * width, **how
    )
    coords = centres(height, width)
    everywhere = ops.point_head(fine_map, coarse, coords, weights, biases, **how)
    # the order of points does not matter to the result of one, up to how a matrix is blocked
    exact = ops.point_head(
        fine_map.double(),
        coarse.double(),
        coords.double(),
        [weight.double() for weight in weights],
        [bias.double() for bias in biases],
        **how,
    )
    error = (everywhere - exact).abs().max()
    assert refined.shape == (2, classes, height, width)
    assert (refined.flatten(2) - exact).abs().max() <= 2 * error + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("classes", [1, 3])
def test_step_by_step(classes):
    """Uncertain cells are those of the enlarged, already refined map; all others stay."""
    coarse, fine_map, weights, biases = draw(classes)
    refined = coarse
    for step in (1, 2):
        large = enlarge(refined)
        top = large.sort(dim=1, descending=True).values
        scores = -large.abs() if classes == 1 else top[:, 1:2] - top[:, :1]
        chosen = scores.flatten(1).argsort(dim=1, descending=True)[:, :10]
        coords = centres(*large.shape[2:]).expand(2, -1, -1)
        coords = coords.gather(1, chosen.unsqueeze(2).expand(-1, -1, 2))
        points = ops.point_head(fine_map, coarse, coords, weights, biases)
        flat = large.flatten(2)
        for n in range(2):
            flat[n, :, chosen[n]] = points[n]
        refined = flat.view_as(large)
        ours = ops.refine(coarse, fine_map, weights, biases, steps=step, num_points=10)
        assert torch.equal(ours, refined)


def test_no_steps_and_no_points():
    drawn = coarse, *_ = draw()
    assert torch.equal(ops.refine(*drawn, steps=0), coarse)
    assert torch.equal(ops.refine(*drawn, num_points=0), enlarge(enlarge(coarse)))
    empty = ops.refine(coarse[:0], drawn[1][:0], *drawn[2:])
    assert empty.shape == (0, 3, 16, 24)


def test_neg_abs_rule():
    """It looks at the first class alone."""
    coarse, fine_map, weights, biases = draw()
    refined = ops.refine(
        coarse, fine_map, weights, biases, steps=1, num_points=5, uncertainty="neg_abs"
    )
    large = enlarge(coarse)
    changed = (refined != large).any(dim=1).flatten(1)
    expected = large[:, 0].abs().flatten(1).argsort(dim=1)[:, :5]
    assert [set(row.nonzero().flatten().tolist()) for row in changed] == [
        set(row.tolist()) for row in expected
    ]


SIZES = [(None, None), ((15, 23), None), (None, (9, 40)), ((15, 23), (31, 7)), ((16, 24), (16, 24))]


@pytest.mark.parametrize(("image_size", "size"), SIZES)
@pytest.mark.parametrize("classes", [1, 3])
def test_labels_are_the_argmax_of_logits(classes, image_size, size):
    drawn = draw(classes)
    how = {"num_points": 30, "image_size": image_size, "size": size}
    logits = ops.refine(*drawn, **how)
    labels = ops.refine(*drawn, output="labels", **how)
    expected = ops.refine(*drawn, num_points=30)
    for target in (image_size, size):  # in two steps, as mmsegmentation does
        expected = expected if target is None else resize(expected, target)
    assert torch.equal(logits, expected)
    assert labels.dtype == torch.uint8
    assert labels.shape == (2, *(size or image_size or (16, 24)))
    argmax = logits[:, 0] > 0 if classes == 1 else logits.argmax(1)
    assert torch.equal(labels.long(), argmax.long())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_decode_takes_the_first_nan(value):
    """As argmax; infinities become NaN where they are interpolated with weight 0."""
    logits = torch.randn(1, 6, 20, 30)
    logits[0, 3, 5, 5] = logits[0, 4, 5, 6] = logits[0, 0, 12, 12] = value
    for sizes in ((None, None), ((80, 120), None), ((80, 120), (101, 131))):
        expected = logits
        for target in sizes:
            expected = expected if target is None else resize(expected, target)
        labels = ops.decode(logits, image_size=sizes[0], size=sizes[1])
        assert torch.equal(labels.long(), expected.argmax(1))


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (300, torch.int64)])
def test_decode_many_classes(classes, dtype):
    logits = torch.randn(1, classes, 3, 4)
    logits[:, -1, 1] += 50
    labels = ops.decode(logits)
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), logits.argmax(1))
    assert (labels[:, 1] == classes - 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_interpolates_in_fp32(dtype):
    logits = (torch.randn(1, 5, 6, 7) + 100).to(dtype)
    labels = ops.decode(logits, image_size=(13, 17), size=(20, 29))
    assert torch.equal(labels, ops.decode(logits.float(), image_size=(13, 17), size=(20, 29)))
    expected = resize(resize(logits.float(), (13, 17)), (20, 29)).argmax(1)
    assert torch.equal(labels.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    coarse, fine_map, weights, biases = draw()
    refined = ops.refine(
        coarse.to(dtype),
        fine_map.to(dtype),
        [weight.to(dtype) for weight in weights],
        [bias.to(dtype) for bias in biases],
        num_points=40,
    )
    assert refined.dtype == dtype
    assert refined.isfinite().all()


def test_no_gradient():
    coarse, *rest = draw()
    assert not ops.refine(coarse.requires_grad_(), *rest).requires_grad


class Refine(nn.Module):
    """The operations alone: compiling a whole model takes longer and shows no more."""

    def __init__(self, output):
        super().__init__()
        self.output = output
        self.weights, self.biases = (nn.ParameterList(part) for part in draw_layers(5, 3))

    def forward(self, coarse, fine_map):
        return ops.refine(
            coarse,
            fine_map,
            list(self.weights),
            list(self.biases),
            num_points=30,
            output=self.output,
            image_size=(15, 23),
        )


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_torch_compile_in_one_graph(output):
    module, maps = Refine(output), draw()[:2]
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*maps), module(*maps))


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_torch_export(output):
    module, maps = Refine(output), draw()[:2]
    exported = torch.export.export(module, maps).module()
    assert torch.equal(exported(*maps), module(*maps))
    other = draw()[:2]
    assert torch.equal(exported(*other), module(*other))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("classes", "sizes"),
    [
        (2, [(9, 7)]),
        (3, [(75, 181)]),
        (19, [(33, 35), (80, 90)]),
        (19, [(61, 68), (97, 130)]),
        (300, [(71, 58)]),
    ],
)
def test_class_by_class_is_as_all_at_once(classes, sizes, layout):
    """A CPU compares the classes one by one; coarse values make ties, of which the first wins."""
    logits = (4 * torch.randn(2, classes, 9, 7)).round() / 4
    dense = logits
    for size in sizes:
        dense = resize(dense, size) if size != (9, 7) else dense
    image_size, size = [None, *sizes][-2:]
    given = logits.contiguous(memory_format=layout)
    labels = ops.decode(given, image_size=image_size, size=size)
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int64)
    assert torch.equal(labels.long(), dense.argmax(dim=1))
    top2 = given.topk(2, dim=1).values
    assert torch.equal(reference.score(given), top2[:, 1:] - top2[:, :1])
