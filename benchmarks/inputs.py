"""What the benchmarks compute on: sizes, and tensors that look like a network's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointrend_triton.config import ModelConfig
from pointrend_triton.models.pointrend import PointRend

Sizes = Mapping[str, int]

# sides of maps are divided by this, points by its square
SHRINK = {"full": 1, "cpu": 4, "quick": 64}
# channels, classes, hidden width and layers: what a kernel is written for
CHANNELS = ("C", "F", "D", "L")
MOST = {"full": {}, "cpu": {"N": 4}, "quick": {"N": 2, "C": 5, "F": 16, "D": 16}}


def scaled(sizes: Sizes, level: str) -> dict[str, int]:
    """The sizes at a level: "full", "cpu" (seconds on a CPU) or "quick" (milliseconds).

    N counts maps, P and k count points, C, F, D and L are a network's; all others are sides.
    """
    by = SHRINK[level]
    result = {}
    for name, size in sizes.items():
        if name in ("P", "k"):
            size = max(min(size, 16), size // by**2)
        elif name != "N" and name not in CHANNELS:
            size = max(min(size, 8), size // by)
        result[name] = min(size, MOST[level].get(name, size))
    return result


def features(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def logits(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, C, H, W] with regions of one class and curved borders between them, as networks give."""
    n, classes, height, width = shape
    blobs = torch.randn(n, classes, max(height // 16, 2), max(width // 16, 2), device=device)
    smooth = F.interpolate(6 * blobs, size=(height, width), mode="bilinear", align_corners=False)
    return (smooth + 0.2 * torch.randn(shape, device=device)).to(dtype)


def coords(n: int, points: int, device: torch.device) -> Tensor:
    return torch.rand(n, points, 2, device=device)


def draws(
    n: int, points: int, device: torch.device, oversample: float = 3.0, importance: float = 0.75
) -> list[Tensor]:
    """The random candidates and random points of a selection, drawn once for all variants."""
    others = points - int(importance * points)
    return [coords(n, int(oversample * points), device), coords(n, others, device)]


def layers(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, list[Tensor]]:
    """Weights [out, in, 1] and biases of a point head: L hidden layers of width D, C classes."""
    classes, width = sizes["C"], sizes["F"] + sizes["C"]
    weights, biases = [], []
    for out in [sizes["D"]] * sizes["L"] + [classes]:
        weights.append((torch.randn(out, width, 1, device=device) / width**0.5).to(dtype))
        biases.append((0.1 * torch.randn(out, device=device)).to(dtype))
        width = out + classes
    return {"weights": weights, "biases": biases}


def images(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Normalised fp32 images [N, 3, H, W] with regions and borders, the same each time."""
    torch.manual_seed(1)
    return logits(shape, torch.float32, device) / 4


@torch.no_grad()
def network(config: ModelConfig) -> PointRend:
    """A network of random weights, the same each time, whose class maps have regions.

    Its BatchNorm statistics are those of `images`, its coarse logits of each class have a mean of 0
    and a deviation of 2, and its point head changes them by about half as much.
    """
    torch.manual_seed(0)
    model = PointRend(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    pictures = images((2, 3, 128, 256), torch.device("cpu"))
    model.maps(pictures)  # in training mode
    fine, coarse = model.eval().maps(pictures)
    _spread(model.coarse_head.conv_seg, coarse, 2.0)
    if model.point_head is not None:
        coarse = model.coarse_head(model.features(pictures))
        change = model.point_head(fine, coarse, coords(2, 512, fine.device))
        last = model.point_head.fc_seg
        _spread(last, change, 1.0)
        classes = last.weight.shape[0]
        # the last columns read the coarse logits
        last.weight[:, -classes:, 0] += torch.eye(classes)
    return model


def _spread(layer: nn.Conv1d | nn.Conv2d, output: Tensor, deviation: float) -> None:
    """Changes a layer so that what it gave as `output` has that deviation and a mean of 0."""
    assert layer.bias is not None
    flat = output.transpose(0, 1).flatten(1)
    scale = deviation / flat.std(dim=1)
    layer.weight *= scale.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.bias.copy_(scale * (layer.bias - flat.mean(dim=1)))
