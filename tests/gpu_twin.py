"""PyTorch on a CPU as it computes on a GPU, for the tests that compare kernels with it.

`pytest --gpu-twin`: what a GPU may decide otherwise is decided otherwise here, so that a test which
holds on a CPU alone is red before it meets a GPU:

- convolutions of float32 in TF32 wherever the settings allow it, as they do by default, and added
  up in another order;
- `grid_sample` at places that are not finite (GridSampler.cuh: they lie beyond the map);
- which of equal values `topk` chooses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_conv1d, _grid_sample, _topk = F.conv1d, F.grid_sample, torch.Tensor.topk


def install() -> None:
    F.conv1d = conv1d
    F.grid_sample = grid_sample
    torch.Tensor.topk = topk
    torch.topk = topk


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    """Ten bits of mantissa; gradients pass as if nothing had been rounded."""
    bits = tensor.detach().contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    rounded = torch.where(tensor.detach().isfinite(), rounded, tensor.detach())
    return tensor + (rounded - tensor.detach()).nan_to_num()


def conv1d(input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    is_float32 = input.dtype == weight.dtype == torch.float32
    if is_float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":
        input, weight = rounded_to_tf32(input), rounded_to_tf32(weight)
    return _conv1d(input.flip(1), weight.flip(1), *args, **options)


def grid_sample(
    input: Tensor,
    grid: Tensor,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Tensor:
    beyond = -1.0 if padding_mode == "border" else -100.0
    placed = torch.where(grid.isnan(), beyond, grid.clamp(-1e4, 1e4))
    if padding_mode == "zeros":
        placed = torch.where(grid.isfinite(), placed, beyond)
    return _grid_sample(input, placed, mode, padding_mode, align_corners)


def topk(
    input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> torch.return_types.topk:
    values, indices = _topk(input.flip(dim), k, dim, largest, sorted)
    return torch.return_types.topk((values, input.shape[dim] - 1 - indices))
