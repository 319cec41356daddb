"""The plain PyTorch twin of every operation: oracle of the kernels, CPU path and export path.

Shapes: N images, C channels or classes, H x W cells of a map, P points.
Coordinates are (x, y) in [0, 1] over the whole map: cell (i, j) has its centre at ((j + 0.5) / W,
(i + 0.5) / H). Nothing here checks its arguments; `pointrend_triton.ops` does, and its docstrings
define the operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

# beyond any map, in the coordinates of grid_sample, and yet its place is an int32
_FAR = 1e4

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
        sampled = _grid_sample(input.to(common), grid.to(common), mode, padding_mode, align_corners)
    elif mode == "bilinear":
        sampled = _grid_sample(input.to(grid.dtype), grid, mode, padding_mode, align_corners)
        sampled = sampled.float()
    else:
        sampled = _gather_nearest(input, grid, padding_mode, align_corners)
    sampled = sampled.squeeze(3) if is_list else sampled
    return sampled if out_dtype is None else sampled.to(out_dtype)


def _grid_sample(
    input: Tensor, grid: Tensor, mode: str, padding_mode: str, align_corners: bool
) -> Tensor:
    """`F.grid_sample` with CUDA's rule for places that are not finite, which no CPU keeps to."""
    placed = grid.clamp(-_FAR, _FAR).nan_to_num(nan=-_FAR)
    sampled = F.grid_sample(input, placed, mode, padding_mode, align_corners)
    if align_corners and padding_mode == "zeros" and 1 in input.shape[2:]:
        # where a side is one cell, every number lies on it
        sampled = sampled.where(grid.isfinite().all(3).unsqueeze(1), 0)
    return sampled


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
    if _by_class(logits):
        first, *others = logits.contiguous().unbind(1)
        best, second = first.clone(), torch.full_like(first, -math.inf)
        for plane in others:
            torch.maximum(second, torch.minimum(best, plane), out=second)
            torch.maximum(best, plane, out=best)
        return (second - best).unsqueeze(1)
    top2 = logits.topk(2, dim=1).values
    return top2[:, 1:2] - top2[:, :1]


def _planar(logits: Tensor) -> Tensor:
    """Contiguous on a CPU, which enlarges channels-last maps slowly and rounds them otherwise."""
    return logits.contiguous() if logits.device.type == "cpu" else logits


def _by_class(logits: Tensor) -> bool:
    """Whether the classes are gone through one by one, with the same result.

    A CPU is several times faster at that than at reductions over them; compiled and exported
    programs, gradients and other devices are not.
    """
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return (
        logits.device.type == "cpu"
        and not (tracing or torch.compiler.is_compiling())
        and not (logits.requires_grad and torch.is_grad_enabled())
    )


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
    rows = indices // width
    columns = indices - rows * width  # the remainder by a symbolic width does not export to ONNX
    x = step_x / 2.0 + columns.float() * step_x
    y = step_y / 2.0 + rows.float() * step_y
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
    if size is None or _is_size(logits, size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` is at work, asked for real: traced, PyTorch 2.11 always says yes."""
    return torch.compiler.is_exporting()


def _is_size(map: Tensor, size: tuple[int, int]) -> bool:
    if is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

        # what is exported for many sizes may leave out only what none of them needs
        return all(statically_known_true(a == b) for a, b in zip(map.shape[-2:], size, strict=True))
    return tuple(map.shape[-2:]) == tuple(size)


def logits_to_labels(logits: Tensor) -> Tensor:
    """[N, C, H, W] -> classes [N, H, W]: uint8 up to 256 of them, else int64; C = 1: logit > 0."""
    labels = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(dim=1)
    return labels.to(label_type(logits))


def label_type(logits: Tensor) -> torch.dtype:
    return torch.uint8 if logits.shape[1] <= 256 else torch.int64


def decode(
    logits: Tensor,
    *,
    image_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    logits = _planar(_widen(logits))
    # to a small size PyTorch rounds many classes otherwise than one, and three in any case
    small = any(sum(to) <= 128 for to in (image_size, size) if to is not None)
    few = logits.shape[1] <= 3 or small
    # argmax knows the first NaN, which a comparison does not
    if few or not _by_class(logits) or not logits.isfinite().all():
        return logits_to_labels(resample(resample(logits, image_size), size))
    # never a map of all classes at the size of the image
    planes = (resample(resample(p, image_size), size)[:, 0] for p in logits.split(1, dim=1))
    best = next(planes).clone()
    labels = torch.zeros_like(best, dtype=label_type(logits))
    for number, plane in enumerate(planes, 1):
        labels.masked_fill_(plane > best, number)
        torch.maximum(best, plane, out=best)
    return labels


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
    refined = coarse = _planar(coarse)
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
    select: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """One subdivision: the map enlarged twofold with its most uncertain cells computed again.

    `select` is another `topk_on_grid`, as exporting needs one.

    Returns:
        the map [N, C, 2H, 2W] and the coordinates [N, k, 2] of the cells that were computed again.
    """
    scores, upsampled, _ = upsample_uncertainty(refined, uncertainty=uncertainty)
    assert upsampled is not None
    indices, coords = (select or topk_on_grid)(scores, num_points)
    # from the original coarse map, not the refined one
    points = point_head(
        fine_map, coarse, coords, weights, biases, coarse_each_layer=coarse_each_layer
    )
    index = repeat(indices, "n k -> n c k", c=points.shape[1])
    cells = rearrange(upsampled, "n c h w -> n c (h w)")
    flat = cells.scatter_(2, index, points.to(upsampled.dtype))
    return flat.view_as(upsampled), coords


def augment(
    pictures: Tensor,
    places: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    # of a picture: first pixel, height, width, resized height and width, top, left, whether flipped
    start, height, width, whole_height, whole_width, top, left, flip = places.T[:, :, None]
    y = torch.arange(size[0], device=places.device)[None]
    x = torch.arange(size[1], device=places.device)[None]
    used_height, used_width = whole_height - top, (whole_width - left).clamp(max=size[1])
    inside = (y < used_height)[:, :, None] & (x < used_width)[:, None]  # [B, h, w]
    row = (top + y).minimum(whole_height - 1)
    column = left + torch.where(flip == 1, used_width - 1 - x, x).clamp(min=0)
    column = column.minimum(whole_width - 1)

    def pixels(at_y: Tensor, at_x: Tensor) -> Tensor:
        return pictures[start[:, :, None] + (at_y * width)[:, :, None] + at_x[:, None]]

    upper, lower, *weights_y = _linear_taps(row, height, whole_height)
    before, after, *weights_x = _linear_taps(column, width, whole_width)
    # beyond the first and the last column OpenCV repeats that, with its whole weight
    low, high = weights_x
    low = torch.where(before == after, 2048, low)
    high = torch.where(before == after, 0, high)
    mixed = torch.full((1, 1, 1, 1), 2, dtype=torch.int32, device=pictures.device)
    for at_y, weight_y in zip((upper, lower), weights_y, strict=True):
        line = low[:, None, :, None] * pixels(at_y, before)[..., :3].int()
        line = line + high[:, None, :, None] * pixels(at_y, after)[..., :3].int()
        mixed = mixed + ((line >> 4) * weight_y[:, :, None, None] >> 16)
    blue, green, red = (mixed >> 2).unbind(3)
    planes = _distort((blue, green, red), colours, used_width)
    values = torch.stack(planes[::-1], dim=1).float()  # RGB [B, 3, h, w]
    mean_, std_ = (
        torch.tensor(numbers, dtype=torch.float32, device=pictures.device).view(3, 1, 1)
        for numbers in (mean, std)
    )
    images = torch.where(inside[:, None], (values - mean_) / std_, 0.0)
    labels = pixels(
        _nearest_tap(row, height, whole_height), _nearest_tap(column, width, whole_width)
    )[..., 3]
    return images, torch.where(inside, labels.long(), 255)


def _linear_taps(at: Tensor, size: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
    """Pixels of a line resized bilinearly -> the two cells of each, and weights of 1/2048."""
    # the inverse of the factor, as OpenCV computes it
    place = ((at.double() + 0.5) * (1.0 / (whole.double() / size.double())) - 0.5).float()
    low = place.floor()
    share = place - low
    weights = [(2048 * part).round().int() for part in (1 - share, share)]  # halves to even
    cells = low.long()
    return (
        cells.clamp(min=0).minimum(size - 1),
        (cells + 1).clamp(min=0).minimum(size - 1),
        *weights,
    )


def _nearest_tap(at: Tensor, size: Tensor, whole: Tensor) -> Tensor:
    return (at.double() * (1.0 / (whole.double() / size.double()))).long().minimum(size - 1)


Planes = tuple[Tensor, Tensor, Tensor]


def _distort(planes: Planes, colours: Tensor, used_width: Tensor) -> Planes:
    """B, G, R in grey levels int32 [B, h, w], distorted; `used_width` of each row is picture."""
    brightness, early, saturation, hue, late = colours.T[:, :, None, None]
    planes = _each(planes, lambda grey: _truncated(_truncated(grey + brightness) * early))
    h, s, v = _to_hsv(*planes)
    saturated = _to_bgr(h, _truncated(s * saturation), v, used_width)
    planes = _chosen(saturation > 0, saturated, planes)
    h, s, v = _to_hsv(*planes)
    planes = _chosen(hue >= 0, _to_bgr((h + hue.int()) % 180, s, v, used_width), planes)
    return _each(planes, lambda grey: _truncated(grey * late))


def _each(planes: Planes, function: Callable[[Tensor], Tensor]) -> Planes:
    blue, green, red = planes
    return function(blue), function(green), function(red)


def _chosen(condition: Tensor, planes: Planes, others: Planes) -> Planes:
    blue, green, red = (torch.where(condition, *pair) for pair in zip(planes, others, strict=True))
    return blue, green, red


def _truncated(values: Tensor) -> Tensor:
    return values.clamp(0, 255).int()


def _to_hsv(blue: Tensor, green: Tensor, red: Tensor) -> Planes:
    """OpenCV's 8-bit HSV: hue in half degrees; fixed point with 12 bits of fraction."""
    value = blue.maximum(green).maximum(red)
    spread = value - blue.minimum(green).minimum(red)
    saturation = spread * _divided(255 << 12, value) + 2048 >> 12
    hue = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = torch.where(value == red, green - blue, hue)
    hue = hue * _divided(30 << 12, spread) + 2048 >> 12
    return torch.where(hue < 0, hue + 180, hue), saturation, value


def _divided(number: int, by: Tensor) -> Tensor:
    by = by.clamp(min=1)
    return (2 * number + by) // (2 * by)


def _to_bgr(hue: Tensor, saturation: Tensor, value: Tensor, used_width: Tensor) -> Planes:
    """OpenCV's way back from 8-bit HSV, to the last bit where it has AVX2.

    It cuts the fraction off in its groups of 32 pixels, and rounds the pixels that are left.
    """
    turn = hue.float() * (6 / 180)
    sector = turn.floor()
    share = turn - sector
    sector = sector.int()
    weight, top = saturation.float() * (1 / 255), value.float() * (1 / 255)
    bottom = top * (1 - weight)
    # rounded once, as by a fused multiply-add: the product is exact in double precision
    share = torch.where(sector % 2 == 1, share, 1 - share)
    middle = top * (1 - weight.double() * share.double()).float()
    x = torch.arange(hue.shape[2], device=hue.device)
    is_cut = (x < used_width - used_width % 32)[:, None]

    def plane(highest: tuple[int, int], between: tuple[int, int]) -> Tensor:
        part = torch.where((sector == between[0]) | (sector == between[1]), middle, bottom)
        part = torch.where((sector == highest[0]) | (sector == highest[1]), top, part) * 255
        return torch.where(is_cut, part.trunc(), part.round()).clamp(max=255).int()

    return plane((3, 4), (2, 5)), plane((1, 2), (0, 3)), plane((0, 5), (1, 4))
