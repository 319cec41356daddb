"""Equality with the real mmsegmentation 1.2.2, whose values tests/golden/make_golden.py wrote."""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

GOLDEN_DIR = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN_DIR))

from drawn import draw_images, draw_labels, draw_points, draw_state  # noqa: E402
from make_golden import (  # noqa: E402
    BATCH,
    GOLDEN,
    SEED,
    count_unexcused,
    injected_rand,
    point_counts,
    probes,
)

from pointrend_triton import reference  # noqa: E402
from pointrend_triton.config import ModelConfig, PointHeadConfig  # noqa: E402
from pointrend_triton.models import PointRend  # noqa: E402


@pytest.fixture(scope="module", params=GOLDEN)
def case(request):
    """The case's settings, its golden values, and our model with the same weights."""
    settings = GOLDEN[request.param]
    with np.load(GOLDEN_DIR / f"{request.param}.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    head = PointHeadConfig(
        num_points=settings["points"], subdivision_num_points=settings["subdivision_points"]
    )
    model = PointRend(
        ModelConfig(depth=settings["depth"], num_classes=settings["classes"], point_head=head)
    )
    return settings, golden, model


@pytest.fixture
def model(case):
    settings, _, model = case
    model.load_state_dict(draw_state(model.state_dict(), SEED))
    model.zero_grad()
    return model.eval()


def at_probes(tensor, name, count):
    flat = tensor.flatten()
    return flat[probes(flat, name, count)]


def assert_close(ours, theirs, limit, what):
    worst = (ours - theirs).abs().max().item()
    assert worst <= limit, f"{what}: off by {worst:.3g}, limit {limit:.3g}"


@torch.no_grad()
def test_inference_with_their_points(case, model):
    settings, golden, _ = case
    images = draw_images(BATCH, settings["size"], SEED)
    for i, level in enumerate(model.features(images)):
        assert_close(
            at_probes(level, f"pyramid{i}", 2048),
            golden[f"pyramid{i}_probes"],
            1e-4,
            f"pyramid {i}",
        )
    assert_close(
        at_probes(model.coarse(images), "coarse", 2048),
        golden["coarse_probes"],
        1e-4,
        "coarse logits",
    )
    steps = iter(range(2))
    original = reference.topk_on_grid

    def their_points(uncertainty, k):
        step = next(steps)
        mine, _ = original(uncertainty, k)
        indices = golden[f"step{step}_indices"].long()
        assert mine.shape == indices.shape
        assert count_unexcused(uncertainty, mine, indices) == 0, f"step {step} chose other cells"
        return indices, reference.grid_coords(indices, *uncertainty.shape[2:])

    with mock.patch.object(reference, "topk_on_grid", their_points):
        final = model(images)
    assert final.shape[2:] == settings["size"]
    assert_close(at_probes(final, "final", 2048), golden["final_probes"], 1e-4, "refined logits")
    assert next(steps, None) is None, "a subdivision step was left out"


def test_one_training_step(case, model):
    settings, golden, _ = case
    images = draw_images(BATCH, settings["size"], SEED)
    labels = draw_labels(BATCH, settings["size"], settings["classes"], SEED)
    with injected_rand(draw_points(BATCH, point_counts(settings["points"]), SEED)):
        losses = model.train()(images, labels)
    for name in ("loss", "loss_coarse", "loss_point"):
        assert_close(losses[name], golden[name], 1e-5 * golden[name].abs().item(), name)
    losses["loss"].backward()
    parameters = dict(model.named_parameters())
    assert {f"grad/{name}" for name in parameters} == {k for k in golden if k.startswith("grad/")}
    for name, parameter in parameters.items():
        largest, norm, *values = golden[f"grad/{name}"]
        grad = parameter.grad.flatten()
        assert_close(grad.abs().max(), largest, 1e-3 * largest, f"largest gradient of {name}")
        assert_close(grad.norm(), norm, 1e-3 * norm, f"norm of the gradient of {name}")
        assert_close(
            grad[probes(grad, name, 6)], torch.stack(values), 1e-3 * largest, f"gradient of {name}"
        )
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            norm, *values = golden[f"buffer/{name}"]
            flat = buffer.flatten()
            assert_close(flat.norm(), norm, 1e-5 * norm, f"norm of {name}")
            limit = 1e-5 * flat.abs().max().item()
            assert_close(flat[probes(flat, name, 3)], torch.stack(values), limit, name)
    head = model.coarse_head.scale_heads[0][0]
    assert head.bn.num_batches_tracked == golden["batches_coarse_head"]
    assert model.backbone.stem[1].num_batches_tracked == golden["batches_backbone"]


@pytest.mark.parametrize(
    ("depth", "classes", "parameters", "tensors"),
    [
        (50, 19, 28715119, 398),
        (50, 150, 28888432, 398),
        (101, 19, 47707247, 704),
        (101, 150, 47880560, 704),
    ],
)
def test_parameter_counts_of_the_published_models(depth, classes, parameters, tensors):
    with torch.device("meta"):
        model = PointRend(ModelConfig(depth=depth, num_classes=classes))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
