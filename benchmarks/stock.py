"""The operations as users of PyTorch write them: the baselines "eager", "autocast" and "compiled".

What `pointrend_triton.reference` computes, without its care for precision: outside autocast,
coordinates take the type of the map, since `grid_sample` wants one type; under autocast it makes an
fp32 copy of the map. Indices are sorted, labels int64, as PyTorch gives them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def point_sample(input: Tensor, coords: Tensor, mode: str = "bilinear") -> Tensor:
    """[N, C, H, W] at [N, P, 2] or, shared, [1, P, 2] -> [N, C, P]; labels and masks as fp32."""
    if not input.is_floating_point():
        input = input.float()
    if not torch.is_autocast_enabled(input.device.type):
        coords = coords.to(input.dtype)
    coords = coords.expand(input.shape[0], -1, -1)
    grid = 2 * coords.unsqueeze(2) - 1
    return F.grid_sample(input, grid, mode=mode, align_corners=False).squeeze(3)


def uncertainty(logits: Tensor) -> Tensor:
    """[N, C, ...] -> [N, 1, ...]: second largest minus largest, for C = 1 minus the absolute."""
    if logits.shape[1] == 1:
        return -logits.abs()
    top2 = logits.topk(2, dim=1).values
    return top2[:, 1:2] - top2[:, :1]


@torch.no_grad()
def select_uncertain_points(logits: Tensor, num_points: int, draws: Sequence[Tensor]) -> Tensor:
    candidates, random = draws
    k = num_points - random.shape[1]
    scores = uncertainty(point_sample(logits, candidates))[:, 0]
    indices = scores.topk(k, dim=1).indices
    chosen = candidates.gather(1, indices.unsqueeze(2).expand(-1, -1, 2))
    return torch.cat([chosen, random], dim=1)


def topk_on_grid(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, _, height, width = scores.shape
    indices = scores.view(n, height * width).topk(min(k, height * width), dim=1).indices
    x = (indices % width + 0.5) / width
    y = (indices // width + 0.5) / height
    return indices, torch.stack([x, y], dim=2)


def upsample_uncertainty(
    logits: Tensor, return_logits: bool, return_labels: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    large = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
    labels = large.argmax(dim=1) if return_labels else None
    return uncertainty(large), large if return_logits else None, labels


def point_head(
    fine_map: Tensor,
    coarse_map: Tensor,
    coords: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    coarse = point_sample(coarse_map, coords)
    x = torch.cat([point_sample(fine_map, coords), coarse], dim=1)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = F.relu(F.conv1d(x, weight, bias))
        x = torch.cat([x, coarse], dim=1)
    return F.conv1d(x, weights[-1], biases[-1])


def resize(logits: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    for size in sizes:
        if tuple(logits.shape[-2:]) != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits


def decode(logits: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    return resize(logits, sizes).argmax(dim=1)


def refine(
    coarse: Tensor,
    fine_map: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    k: int,
    sizes: Sequence[tuple[int, int]],
    output: str,
) -> Tensor:
    refined = coarse
    for _ in range(2):
        refined = F.interpolate(refined, scale_factor=2, mode="bilinear", align_corners=False)
        n, classes, height, width = refined.shape
        indices, coords = topk_on_grid(uncertainty(refined), k)
        points = point_head(fine_map, coarse, coords, weights, biases).to(refined.dtype)
        index = indices.unsqueeze(1).expand(-1, classes, -1)
        cells = refined.reshape(n, classes, height * width)
        refined = cells.scatter(2, index, points).view(n, classes, height, width)
    return decode(refined, sizes) if output == "labels" else resize(refined, sizes)


def point_loss(logits: Tensor, labels: Tensor, coords: Tensor) -> Tensor:
    """Cross entropy of point logits [N, C, P] against labels [N, H, W] at the points."""
    target = point_sample(labels.unsqueeze(1), coords, mode="nearest")[:, 0].long()
    return F.cross_entropy(logits.float(), target, ignore_index=255)


def mask_loss(logits: Tensor, masks: Tensor, coords: Tensor) -> Tensor:
    """Mask2Former's point loss: binary cross entropy of one-class logits [N, 1, H, W] at points."""
    with torch.no_grad():
        target = point_sample(masks.unsqueeze(1), coords)
    return F.binary_cross_entropy_with_logits(point_sample(logits, coords).float(), target)
