"""Every operation once, at small, odd sizes: what `sanitize` runs and `smoke` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import inputs
from pointrend_triton import ops, reference
from pointrend_triton.data import MEAN, STD

Inputs = dict[str, Any]  # tensors, or lists of tensors
Results = list[Tensor]

# classes, height, width: 7 x 5 maps lie wholly in one block, 33 x 41 do not; 1, 2 and 19 classes
# take different paths
MAPS = [(1, 7, 5), (2, 7, 5), (19, 33, 41)]
ALL = 10**6  # points: more than there are cells
SEED = 119  # where a choice ends, no two scores are closer than 1e-5 of the largest logit


class Operation(NamedTuple):
    """What it computes, and how that is compared.

    Attributes:
        run: inputs -> results. Floats may miss the exact ones by a tolerance, all else is equal;
            what may come in any order is sorted.
        logits: of labels: the logits [N, C, H, W] of which they are the largest. A label may be
            another where two classes are closer than the tolerance.
        chooses: its own 16-bit scores decide which cells it takes, and of tied ones any may win:
            compared in 32 bits only.
    """

    run: Callable[[Inputs], Results]
    logits: Callable[[Inputs], Tensor] | None = None
    chooses: bool = False


def drawn(dtype: torch.dtype, classes: int, height: int, width: int) -> Inputs:
    """The inputs of all operations, on the CPU, where a seed gives the same on any machine."""
    torch.manual_seed(SEED)
    cpu = torch.device("cpu")
    shape = (2, classes, height, width)
    sizes = {"C": classes, "F": 21, "D": 32, "L": 2}
    crops = [[0, 5, 7, 9, 13, 2, 3, 1], [0, 5, 7, 5, 7, 0, 0, 0]]  # one ends in the last corner
    return {
        "coarse": inputs.logits(shape, dtype, cpu),
        "fine": inputs.features((2, 21, 2 * height, width), dtype, cpu),
        **inputs.layers(sizes, dtype, cpu),
        "coords": inputs.coords(2, 70, cpu) * 1.2 - 0.1,  # beyond the map too
        "draws": inputs.draws(2, 70, cpu),
        "classes": torch.randint(classes, (2, 1, height, width)),
        "scores": torch.randn(2, 1, 2 * height, 2 * width),
        "d_points": torch.randn(2, classes, 70).to(dtype),
        "d_sampled": torch.randn(2, 21, 70).to(dtype),
        "pictures": torch.randint(256, (35, 4), dtype=torch.uint8),
        "places": torch.tensor(crops),
        "colours": torch.tensor([[5, 1.1, 0.9, 7, 1.2], [0, 1, 0, -1, 1]]),
    }


def each_tensor(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor changed."""
    return {
        name: [change(tensor) for tensor in value] if isinstance(value, list) else change(value)
        for name, value in x.items()
    }


def placed(x: Inputs, device: torch.device, channels_last: bool) -> Inputs:
    """The inputs on a device, the maps in one of the layouts."""
    x = each_tensor(x, lambda tensor: tensor.to(device))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x | {name: x[name].contiguous(memory_format=layout) for name in ("coarse", "fine")}


def dtypes_on(device: torch.device) -> tuple[torch.dtype, ...]:
    """The types of the maps: a CPU is slow with 16 bits, and does without them."""
    return (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)


def _points(x: Inputs) -> Results:
    coords = ops.select_uncertain_points(x["coarse"], 70, draws=tuple(x["draws"]))
    chosen, random = coords.split([52, 18], dim=1)
    order = chosen[..., :1].argsort(dim=1)
    return [chosen.gather(1, order.expand(-1, -1, 2)), random]


def _largest(x: Inputs) -> Results:
    indices, centres = ops.topk_on_grid(x["scores"], 37)
    indices, order = indices.sort(dim=1)
    return [indices, centres.gather(1, order.unsqueeze(2).expand(-1, -1, 2))]


def _sampled(x: Inputs) -> Results:
    fine = x["fine"].detach().requires_grad_()
    sampled = ops.point_sample(fine, x["coords"])
    return [sampled, *torch.autograd.grad(sampled, fine, x["d_sampled"])]


def _sampled_in_order(x: Inputs) -> Results:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return _sampled(x)
    finally:
        torch.use_deterministic_algorithms(before)


def _nearest(x: Inputs) -> Results:
    labels, coords = x["classes"], x["coords"]
    # a bool map at points that all images share
    return [
        ops.point_sample(labels, coords, mode="nearest"),
        ops.point_sample(labels > 0, coords[:1]),
    ]


def _head(x: Inputs) -> Results:
    leaves = [x["fine"], x["coarse"], *x["weights"], *x["biases"]]
    fine, coarse, *layers = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    depth = len(x["weights"])
    points = ops.point_head(fine, coarse, x["coords"], layers[:depth], layers[depth:])
    return [points, *torch.autograd.grad(points, leaves, x["d_points"])]


def _upsampled(x: Inputs) -> Results:
    scores, logits, _ = ops.upsample_uncertainty(x["coarse"])
    assert logits is not None
    return [scores, logits]


def _upsampled_labels(x: Inputs) -> Results:
    labels = ops.upsample_uncertainty(x["coarse"], return_logits=False, return_labels=True)[2]
    assert labels is not None
    return [labels]


def _refined(x: Inputs, output: str = "logits", **options: Any) -> Tensor:
    maps = x["coarse"], x["fine"]
    return ops.refine(*maps, x["weights"], x["biases"], output=output, **options)


def _resized(x: Inputs) -> dict[str, tuple[int, int]]:
    height, width = x["coarse"].shape[2:]
    return {"image_size": (4 * height - 1, 3 * width), "size": (41, 50)}


def _widened(x: Inputs) -> Tensor:
    logits = x["coarse"]
    return logits if logits.dtype == torch.float64 else logits.float()


def _crops(x: Inputs) -> Results:
    tensors = x["pictures"], x["places"], x["colours"].float()
    return list(ops.augment(*tensors, (9, 41), mean=MEAN, std=STD))


OPERATIONS = {
    "select_uncertain_points": Operation(_points),
    "topk_on_grid": Operation(_largest),
    "point_sample and its gradient": Operation(_sampled),
    "point_sample and its gradient, deterministic": Operation(_sampled_in_order),
    "point_sample of labels and masks": Operation(_nearest),
    "point_head and its gradients": Operation(_head),
    "upsample_uncertainty": Operation(_upsampled),
    "upsample_uncertainty, labels": Operation(
        _upsampled_labels,
        logits=lambda x: reference.upsample_uncertainty(_widened(x))[1],
    ),
    "decode": Operation(lambda x: [ops.decode(x["coarse"])], logits=_widened),
    "decode, resized": Operation(
        lambda x: [ops.decode(x["coarse"], **_resized(x))],
        logits=lambda x: _resampled(_widened(x), **_resized(x)),
    ),
    "refine": Operation(lambda x: [_refined(x, num_points=40)], chooses=True),
    "refine, all cells": Operation(lambda x: [_refined(x, num_points=ALL)]),
    "refine, labels": Operation(
        lambda x: [_refined(x, "labels", num_points=40)],
        logits=lambda x: _refined(x, num_points=40),
        chooses=True,
    ),
    "refine, labels of all cells, resized": Operation(
        lambda x: [_refined(x, "labels", num_points=ALL, **_resized(x))],
        logits=lambda x: _refined(x, num_points=ALL, **_resized(x)),
    ),
    "augment": Operation(_crops),
}


def _resampled(logits: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return reference.resample(reference.resample(logits, image_size), size)
