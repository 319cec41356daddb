"""The plain PyTorch twin of every operation: oracle of the kernels, CPU path and export path.

Shapes: N images, C channels or classes, H x W cells of a map, P points.
Coordinates are (x, y) in [0, 1] over the whole map: cell (i, j) has its centre at ((j + 0.5) / W,
(i + 0.5) / H). Nothing here checks its arguments; `pointrend_triton.ops` does, and its docstrings
define the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

Uncertainty = str | Callable[[Tensor], Tensor]


def point_sample(
    input: Tensor,
    coords: Tensor,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    coords = _widen(coords)
    coords = coords.expand(input.shape[0], *coords.shape[1:])
    is_list = coords.dim() == 3
    grid = 2 * (coords.unsqueeze(2) if is_list else coords) - 1  # [N, P, 1, 2] or [N, Hg, Wg, 2]
    if input.is_floating_point():
        common = torch.promote_types(input.dtype, grid.dtype)
        sampled = F.grid_sample(
            input.to(common), grid.to(common), mode, padding_mode, align_corners
        )
    elif mode == "bilinear":
        sampled = F.grid_sample(input.to(grid.dtype), grid, mode, padding_mode, align_corners)
        sampled = sampled.float()
    else:
        sampled = _gather_nearest(input, grid, padding_mode, align_corners)
    sampled = sampled.squeeze(3) if is_list else sampled
    return sampled if out_dtype is None else sampled.to(out_dtype)


def _widen(tensor: Tensor) -> Tensor:
    """Half precision as fp32; fp64 stays, so that what is here can be its own fp64 oracle."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _gather_nearest(input: Tensor, grid: Tensor, padding_mode: str, align_corners: bool) -> Tensor:
    """Nearest sampling of a map that `grid_sample` refuses, such as labels; its arithmetic."""
    n, c, height, width = input.shape

    def index(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
        if align_corners:
            position = (position + 1) / 2 * (size - 1)
        else:
            position = ((position + 1) * size - 1) / 2
        nearest = position.round()  # halves to even, as grid_sample does
        clamped = nearest.nan_to_num(-1).clamp(0, size - 1)
        return clamped.long(), nearest == clamped

    (x, x_inside), (y, y_inside) = index(grid[..., 0], width), index(grid[..., 1], height)
    cells = repeat(y * width + x, "n hg wg -> n c (hg wg)", c=c)
    sampled = rearrange(input, "n c h w -> n c (h w)").gather(2, cells).view(n, c, *x.shape[1:])
    if padding_mode == "zeros":
        sampled = sampled * (x_inside & y_inside).unsqueeze(1).to(sampled.dtype)
    return sampled


def score(logits: Tensor, kind: Uncertainty = "top2_margin") -> Tensor:
    """[N, C, ...] logits -> [N, 1, ...], larger is more uncertain."""
    if callable(kind):
        return kind(logits)
    if kind == "neg_abs" or logits.shape[1] == 1:
        return -logits[:, :1].abs()
    top2 = logits.topk(2, dim=1).values
    return top2[:, 1:2] - top2[:, :1]


def select_uncertain_points(
    logits: Tensor,
    num_points: int,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    uncertainty: Uncertainty = "top2_margin",
    generator: torch.Generator | None = None,
    draws: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    num_uncertain = int(importance_sample_ratio * num_points)
    candidates, random = draws or draw_points(
        logits, num_points, oversample_ratio, num_uncertain, generator
    )
    # scored after the interpolation: the margin of interpolated logits is not the interpolated
    # margin
    scores = score(point_sample(logits, candidates), uncertainty)[:, 0]  # [N, candidates]
    chosen = scores.topk(num_uncertain, dim=1).indices
    uncertain = candidates.gather(1, repeat(chosen, "n k -> n k xy", xy=2))
    return torch.cat([uncertain, random], dim=1)


def draw_points(
    logits: Tensor,
    num_points: int,
    oversample_ratio: float,
    num_uncertain: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Candidates and random points; for a seed those of mmsegmentation and detectron2."""
    n, device = logits.shape[0], logits.device
    num_candidates = int(num_points * oversample_ratio)
    candidates = torch.rand(n, num_candidates, 2, device=device, generator=generator)
    random = torch.rand(n, num_points - num_uncertain, 2, device=device, generator=generator)
    return candidates, random


def topk_on_grid(uncertainty: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, _, height, width = uncertainty.shape
    k = min(k, height * width)
    indices = uncertainty.flatten(1).topk(k, dim=1).indices
    return indices, grid_coords(indices, height, width)


def grid_coords(indices: Tensor, height: int, width: int) -> Tensor:
    """Flat cell indices [N, k] -> fp32 centres [N, k, 2], rounded as mmsegmentation rounds them."""
    step_x, step_y = 1.0 / width, 1.0 / height
    x = step_x / 2.0 + (indices % width).float() * step_x
    y = step_y / 2.0 + (indices // width).float() * step_y
    return torch.stack([x, y], dim=2)


def upsample_uncertainty(
    logits: Tensor,
    scale: int = 2,
    *,
    uncertainty: Uncertainty = "top2_margin",
    return_logits: bool = True,
    return_labels: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # in fp32, and the margin taken before the logits are rounded for storage
    upsampled = F.interpolate(
        _widen(logits), scale_factor=scale, mode="bilinear", align_corners=False
    )
    scores = score(upsampled, uncertainty)
    labels = logits_to_labels(upsampled) if return_labels else None
    return scores, upsampled.to(logits.dtype) if return_logits else None, labels


def point_head(
    fine_map: Tensor,
    coarse_map: Tensor,
    coords: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    coarse_each_layer: bool = True,
) -> Tensor:
    # sampled in fp32, then handed to the MLP in its own precision, so that a half() model works
    fine = point_sample(fine_map, coords, out_dtype=weights[0].dtype)  # [N, 256, P]
    coarse = point_sample(coarse_map, coords, out_dtype=weights[0].dtype)  # [N, C, P]
    x = torch.cat([fine, coarse], dim=1)
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = F.relu(_pointwise(x, weight, bias))
        if coarse_each_layer:
            x = torch.cat([x, coarse.to(x.dtype)], dim=1)
    return _pointwise(x, weights[-1], biases[-1])


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight = weight if weight.dim() == 3 else weight.unsqueeze(2)
    if x.shape[2] == 0:  # no points, which conv1d refuses
        return weight[:, :, 0] @ x + bias[:, None]
    return F.conv1d(x, weight, bias)


def resample(logits: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Bilinear, half-pixel centres; the map itself where the size is already right."""
    if size is None or tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def logits_to_labels(logits: Tensor) -> Tensor:
    """[N, C, H, W] -> classes [N, H, W]: uint8 up to 256 of them, else int64; C = 1: logit > 0."""
    labels = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(dim=1)
    return labels.to(torch.uint8) if logits.shape[1] <= 256 else labels.long()


def decode(
    logits: Tensor,
    *,
    image_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    return logits_to_labels(resample(resample(_widen(logits), image_size), size))


def refine(
    coarse: Tensor,
    fine_map: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    steps: int = 2,
    num_points: int = 8196,
    coarse_each_layer: bool = True,
    uncertainty: str = "top2_margin",
    output: str = "logits",
    image_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    refined = coarse
    for _ in range(steps):
        refined, _ = refine_step(
            refined,
            coarse,
            fine_map,
            weights,
            biases,
            num_points=num_points,
            coarse_each_layer=coarse_each_layer,
            uncertainty=uncertainty,
        )
    if output == "labels":
        return decode(refined, image_size=image_size, size=size)
    return resample(resample(refined, image_size), size)


def refine_step(
    refined: Tensor,
    coarse: Tensor,
    fine_map: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    num_points: int,
    coarse_each_layer: bool,
    uncertainty: str = "top2_margin",
) -> tuple[Tensor, Tensor]:
    """One subdivision: the map enlarged twofold with its most uncertain cells computed again.

    Returns:
        the map [N, C, 2H, 2W] and the coordinates [N, k, 2] of the cells that were computed again.
    """
    scores, upsampled, _ = upsample_uncertainty(refined, uncertainty=uncertainty)
    assert upsampled is not None
    indices, coords = topk_on_grid(scores, num_points)
    # from the original coarse map, not the refined one
    points = point_head(
        fine_map, coarse, coords, weights, biases, coarse_each_layer=coarse_each_layer
    )
    index = repeat(indices, "n k -> n c k", c=points.shape[1])
    cells = rearrange(upsampled, "n c h w -> n c (h w)")
    flat = cells.scatter(2, index, points.to(upsampled.dtype))
    return flat.view_as(upsampled), coords
