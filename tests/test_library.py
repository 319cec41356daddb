"""The kernels as PyTorch operators: contracts, compilers, autocast, export, choice of backend."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_models import draw, lively, small
from tolerance import assert_within
from torch._dynamo.testing import CompileCounterWithBackend

from pointrend_triton import library, ops, reference

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def kernels():
    with ops.backend("triton"):
        yield
    torch._dynamo.reset()


def layers(fine=5, classes=3, hidden=16, outputs=3, requires_grad=False):
    widths = [(hidden, fine + classes), (hidden, hidden + classes), (outputs, hidden + classes)]
    weights = [torch.randn(*width, device=DEVICE) for width in widths]
    biases = [torch.randn(width[0], device=DEVICE) for width in widths]
    for parameter in (*weights, *biases):
        parameter.requires_grad_(requires_grad)
    return weights, biases


def maps(requires_grad=False, **options):
    fine = torch.randn(2, 5, 6, 7, device=DEVICE, **options)
    coarse = torch.randn(2, 3, 4, 5, device=DEVICE, **options)
    return fine.requires_grad_(requires_grad), coarse.requires_grad_(requires_grad)


def permuted(tensor):
    """The same values and shape, channels last in memory."""
    detached = tensor.detach().to(memory_format=torch.channels_last)
    return detached.requires_grad_(tensor.requires_grad)


def arguments_of(form):
    """Arguments of every operator, in compact or in permuted memory."""
    fine, coarse = maps(requires_grad=True)
    weights, biases = layers(requires_grad=True)
    coords = torch.rand(2, 9, 2, device=DEVICE)
    saved = library.point_head(fine, coarse, coords, weights, biases, True, torch.float32, True)[1]
    random, scores = torch.rand(2, 4, 2, device=DEVICE), torch.rand(2, 9, device=DEVICE)
    grid, grad = torch.rand(2, 1, 4, 5, device=DEVICE), torch.randn(2, 3, 9, device=DEVICE)
    if form == "permuted":
        fine, coarse, grid = permuted(fine), permuted(coarse), permuted(grid)
        coords = coords.transpose(1, 2).contiguous().transpose(1, 2)
        grad = grad[:, :, :1].expand(2, 3, 9)
    logits, parameters = coarse.detach(), [[p.detach() for p in part] for part in (weights, biases)]
    sampling = ("bilinear", "zeros", False)
    pictures = torch.randint(256, (30, 4), dtype=torch.uint8, device=DEVICE)
    places = torch.tensor([[2, 4, 7, 6, 8, 1, 2, 1]], device=DEVICE)
    colours = torch.tensor([[5.0, 1.1, 0.9, 7.0, 1.2]], device=DEVICE)
    geometry = ([5, 6, 7], [3, 4, 5], torch.float32, torch.float32, [True, False], [True, True])
    return {
        "point_sample": (fine, coords, *sampling, torch.float32),
        "point_sample_backward": (grad, coords, 4, 5, torch.float32, True, *sampling),
        "sampled_uncertainty": (logits, coords, "top2_margin"),
        "upsample_uncertainty": (logits, 2, "top2_margin", True, True),
        "select_points": (scores, coords, random, 5),
        "topk_on_grid": (grid, 7),
        "point_head": (fine, coarse, coords, weights, biases, True, torch.float32, True),
        "point_head_backward": (grad, saved.detach(), coords, *parameters, True, *geometry),
        "augment": (pictures, places, colours, [5, 9], [9.0, 8.0, 7.0], [3.0, 2.0, 1.0]),
        "decode": (logits, None, [7, 9]),
        "refine": (
            *(logits, fine.detach(), *parameters, 2, 11, True, "top2_margin", True),
            *(None, [15, 19], torch.float32),
        ),
    }


OPERATORS = [name for name in library.__all__ if hasattr(getattr(library, name), "_opoverload")]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["compact", "permuted"])
@pytest.mark.parametrize("name", OPERATORS)
def test_contracts(name, form):
    """Schema, fake results (shapes, types, strides), registration of autograd, dynamic shapes."""
    torch.library.opcheck(getattr(library, name), arguments_of(form)[name])


def branch(fine, coarse, labels, weights, biases, draws):
    """The point branch of a training step."""
    coords = ops.select_uncertain_points(coarse.detach(), draws[1].shape[1] * 4, draws=draws)
    logits = ops.point_head(fine, coarse, coords, weights, biases)
    truth = ops.point_sample(labels, coords, mode="nearest")[:, 0]
    return F.cross_entropy(logits.float(), truth)


def branch_inputs(num_points=16):
    fine, coarse = maps(requires_grad=True)
    weights, biases = layers(requires_grad=True)
    labels = torch.randint(0, 3, (2, 1, 24, 28), device=DEVICE)
    draws = tuple(torch.rand(2, n, 2, device=DEVICE) for n in (num_points * 3, num_points // 4))
    return fine, coarse, labels, weights, biases, draws


def gradients(loss, inputs):
    fine, coarse, _, weights, biases, _ = inputs
    return torch.autograd.grad(loss, (fine, coarse, *weights, *biases))


def test_training_branch_equals_the_reference():
    inputs = branch_inputs()
    ours = gradients(branch(*inputs), inputs)
    with ops.backend("reference"):
        theirs = gradients(branch(*inputs), inputs)
        fine, coarse, labels, weights, biases, draws = inputs
        wide = (
            *(t.detach().double().requires_grad_() for t in (fine, coarse)),
            labels,
            *([p.detach().double().requires_grad_() for p in group] for group in (weights, biases)),
            draws,  # the same points: the choice among them is compared elsewhere
        )
        exact = gradients(branch(*wide), wide)
    for mine, plain, truth in zip(ours, theirs, exact, strict=True):
        assert_within(mine, plain, truth)


@pytest.mark.slow
def test_training_branch_compiles_whole():
    inputs = branch_inputs()
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(*inputs), branch(*inputs)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_a_changing_number_of_points_compiles_once_more():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(branch, fullgraph=True, backend=counter)
    counts = []
    for num_points in (16, 24, 40, 64, 16):
        compiled(*branch_inputs(num_points)).backward()
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


@pytest.mark.slow
def test_a_changing_number_of_masks_compiles_once_more():
    def sample(masks, coords):
        return ops.point_sample(masks, coords, mode="nearest")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample, fullgraph=True, backend=counter)
    counts = []
    for n in (3, 5, 2, 7, 1, 0, 1, 0):
        masks = torch.rand(n, 1, 6, 7, device=DEVICE) > 0.5
        coords = torch.rand(1, 9, 2, device=DEVICE)
        assert torch.equal(compiled(masks, coords), sample(masks, coords))
        counts.append(counter.frame_count)
    assert counts[:4] == [1, 2, 2, 2]
    assert counts[-1] <= 4, "0 and 1 are compiled apart, once each"


@pytest.mark.slow
def test_marked_dynamic_compiles_once():
    def sample(masks, coords):
        return ops.point_sample(masks, coords, mode="nearest")

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sample, fullgraph=True, backend=counter)
    for n in (3, 5, 7):
        masks = torch.rand(n, 1, 6, 7, device=DEVICE) > 0.5
        torch._dynamo.mark_dynamic(masks, 0)
        compiled(masks, torch.rand(1, 9, 2, device=DEVICE))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_model_compiles_whole(training):
    """In one graph, and to what it computes uncompiled."""
    model = lively(small()).to(DEVICE).train(training)
    images, labels = (t.to(DEVICE) for t in draw(size=(32, 48)))
    call = (lambda: model(images, labels)["loss"]) if training else (lambda: model.predict(images))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = call()
    model.load_state_dict(state)
    torch.manual_seed(1)
    ours = torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_model_equals_the_reference():
    model = lively(small()).to(DEVICE).eval()
    images = draw(size=(37, 50))[0].to(DEVICE)
    ours = model(images)
    with ops.backend("reference"):
        theirs, exact = model(images), model.double()(images.double())
    assert_within(ours, theirs, exact)


# the interpreter cuts bfloat16 off where a GPU rounds
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_autocast_computes_in_its_type(dtype):
    """As a convolution: maps and weights as they come, the MLP in autocast's type."""
    fine, coarse = maps(requires_grad=True, dtype=dtype)
    weights, biases = layers(requires_grad=True)
    coords = torch.rand(2, 9, 2, device=DEVICE)
    with torch.autocast(DEVICE, dtype=dtype):
        ours = ops.point_head(fine, coarse, coords, weights, biases)
        with ops.backend("reference"):
            theirs = ops.point_head(fine, coarse, coords, weights, biases)
    wide = [[p.double() for p in group] for group in (weights, biases)]
    exact = reference.point_head(fine.double(), coarse.double(), coords.double(), *wide)
    assert ours.dtype == theirs.dtype == dtype
    assert_within(ours, theirs, exact)
    grad = torch.randn_like(ours)
    inputs = (fine, coarse, *weights, *biases)
    ours = torch.autograd.grad(ours, inputs, grad)
    theirs = torch.autograd.grad(theirs, inputs, grad)
    exact = torch.autograd.grad(exact, inputs, grad.double())
    for mine, plain, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == plain.dtype
        assert_within(mine, plain, truth)


@pytest.mark.parametrize("setting", ["allow_tf32 = True", "fp32_precision = 'tf32'"])
def test_fp32_is_multiplied_as_torch_multiplies_it(setting):
    """By either of torch's names for the setting; in a process of its own, which they change."""
    code = f"""
import torch
from pointrend_triton import library
print(library._precision())
torch.backends.cuda.matmul.{setting}
print(library._precision())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["ieee", "tf32"], done.stderr


@pytest.fixture
def everywhere(monkeypatch):
    """As if the CPU were a GPU: "auto" takes the kernels."""
    monkeypatch.setattr(ops, "_KERNEL_DEVICES", ("cuda", "cpu"))
    with ops.backend("auto"):
        yield


class Sampler(torch.nn.Module):
    def forward(self, input, coords):
        indices, centres = ops.topk_on_grid(input[:, :1], 3)
        return ops.point_sample(input, coords), centres


def test_auto_takes_the_kernels_where_they_run(everywhere, monkeypatch):
    calls = []
    monkeypatch.setattr(library, "point_sample", lambda *args: calls.append(args) or args[0])
    ops.point_sample(maps()[0], torch.rand(2, 9, 2, device=DEVICE))
    assert len(calls) == 1


@pytest.mark.slow
def test_exported_programs_hold_no_kernels(everywhere):
    arguments = maps()[0], torch.rand(2, 9, 2, device=DEVICE)
    module = Sampler().eval()
    exported = torch.export.export(module, arguments)
    assert "pointrend_triton." not in str(exported.graph)
    with ops.backend("reference"):
        expected = module(*arguments)
    for ours, theirs in zip(exported.module()(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    traced = torch.jit.trace(module, arguments, check_trace=False)
    assert "pointrend_triton::" not in str(traced.graph)


def test_compiled_programs_hold_kernels(everywhere):
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    arguments = maps()[0], torch.rand(2, 9, 2, device=DEVICE)
    torch.compile(Sampler(), fullgraph=True, backend=backend)(*arguments)
    assert any("pointrend_triton.point_sample" in target for target in seen)
    assert any("pointrend_triton.topk_on_grid" in target for target in seen)


def test_gradients_of_coordinates_come_from_the_reference():
    coords = torch.rand(2, 9, 2, device=DEVICE, requires_grad=True)
    fine, coarse = maps()
    weights, biases = layers()
    for sampled in (
        ops.point_sample(fine, coords),
        ops.point_head(fine, coarse, coords, weights, biases),
    ):
        (grad,) = torch.autograd.grad(sampled.sum(), coords)
        assert grad.abs().sum() > 0


def test_fp64_comes_from_the_reference(monkeypatch):
    monkeypatch.setattr(library, "point_sample", None)
    fine = maps()[0].double()
    assert ops.point_sample(fine, torch.rand(2, 9, 2, device=DEVICE)).dtype == torch.float64


def test_four_dimensional_coordinates():
    fine, coords = maps(requires_grad=True)[0], torch.rand(2, 3, 4, 2, device=DEVICE)
    sampled = ops.point_sample(fine, coords)
    assert torch.equal(sampled.flatten(2), ops.point_sample(fine, coords.flatten(1, 2)))
    assert sampled.shape == (2, 5, 3, 4)
    assert ops.point_sample(fine, coords, out_dtype=torch.int32).dtype == torch.int32
    assert ops.point_sample(fine.to(torch.uint8), coords, mode="nearest").dtype == torch.uint8


def test_a_callable_uncertainty():
    logits = maps()[1]
    draws = torch.rand(2, 30, 2, device=DEVICE), torch.rand(2, 3, 2, device=DEVICE)

    def first_class(sampled):
        return -sampled[:, :1].abs()

    ours = ops.select_uncertain_points(logits, 10, uncertainty=first_class, draws=draws)
    named = ops.select_uncertain_points(logits, 10, uncertainty="neg_abs", draws=draws)
    assert torch.equal(ours, named)
    scores, upsampled, labels = ops.upsample_uncertainty(logits, uncertainty=first_class)
    assert torch.equal(scores, -upsampled[:, :1].abs())
    assert labels is None


def test_what_is_not_asked_for_is_none():
    logits = maps()[1]
    scores, upsampled, labels = ops.upsample_uncertainty(logits, return_logits=False)
    assert (scores.shape, upsampled, labels) == ((2, 1, 8, 10), None, None)


def test_heads_that_the_kernels_cannot_do():
    fine, coarse = maps()
    weights, biases = layers(hidden=300)
    points = torch.rand(2, 9, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="'triton' was asked for .* but .*300"):
        ops.point_head(fine, coarse, points, weights, biases)
    with ops.backend("auto"):
        assert ops.point_head(fine, coarse, points, weights, biases).shape == (2, 3, 9)


NO_KERNELS = [
    ({"library": None}, "Triton is not installed"),
    ({"INTERPRETED": False}, "Triton kernels need a CUDA device (TRITON_INTERPRET=1 interprets"),
    ({"INTERPRETED": True, "INTERPRETER_FAULT": "NumPy is too new"}, "NumPy is too new"),
]


@pytest.mark.parametrize(
    ("change", "reason"), NO_KERNELS, ids=["without triton", "without a GPU", "interpreter"]
)
def test_the_impossible_explains_itself(change, reason, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(ops if name == "library" else library, name, value)
    message = f"backend 'triton' was asked for a tensor on cpu, but {reason}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.topk_on_grid(torch.zeros(1, 1, 2, 2), 1)
    with ops.backend("auto"):
        assert ops.topk_on_grid(torch.zeros(1, 1, 2, 2), 1)[0].shape == (1, 1)


@pytest.mark.gpu
def test_cuda_graph_of_the_refinement():
    fine, coarse = maps(dtype=torch.bfloat16)
    weights, biases = layers()
    weights, biases = ([p.bfloat16() for p in group] for group in (weights, biases))

    def call():
        return ops.refine(coarse, fine, weights, biases, num_points=50, output="labels")

    call()  # tunes outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels = call()
    coarse.copy_(torch.randn_like(coarse))
    graph.replay()
    assert torch.equal(labels, call())


@pytest.mark.gpu
def test_kernels_run_on_the_device_of_the_tensor():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    fine = maps()[0].to("cuda:1")
    coords = torch.rand(2, 9, 2, device="cuda:1")
    ours = ops.point_sample(fine, coords)
    assert ours.device == fine.device
    with ops.backend("reference"):
        torch.testing.assert_close(ours, ops.point_sample(fine, coords))
