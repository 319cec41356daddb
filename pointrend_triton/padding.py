"""Images of many sizes computed in few: padded, and yet with the result of the unpadded network.

What lies beyond the image in a padded map, after a BatchNorm or a bias no longer zero, must not
reach the image's own part. There are three ways in, and each is closed by a hook: 3x3 windows read
zeros beyond the image, twofold enlargements the last row and column again, as at the border of an
unpadded map; and maps of odd sizes are fitted to each other by those sizes, not the padded ones.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pointrend_triton.models.pointrend import PointRend

STRIDE = 32  # of the coarsest map: what a padded size must be a multiple of
Grid = tuple[int, int]  # stride of the pyramid's map, how often each of its cells was enlarged


class PaddedMaps:
    """`PointRend.maps` of padded images.

    Args:
        model: gets hooks, and is good for padded images only from then on.
    """

    def __init__(self, model: PointRend) -> None:
        self.model = model
        self.own = own = OwnPart(next(model.parameters()).device)
        backbone = model.backbone
        for conv in _windows(backbone.stem[3:]):  # the first reads the image, which is padded by 0
            own.clear_before(conv, (2, 1))
        own.clear_before(backbone.maxpool, (2, 1))  # after a ReLU, 0 is as good as -inf
        for level in range(4):
            stride = 4 << level
            for conv in _windows(backbone.get_submodule(f"layer{level + 1}")):
                own.clear_before(conv, (stride // conv.stride[0], 1))
            for conv in _windows(model.neck.fpn_convs[level]):
                own.clear_before(conv, (stride, 1))
            own.hook_head(model.coarse_head.scale_heads[level], stride)

    def set_size(self, image_size: tuple[int, int]) -> None:
        """The (height, width) of the image's own part, for the runs that follow."""
        for part, side in zip(self.own.size, image_size, strict=True):
            part.fill_(side)  # a number given to a launch: no copy to wait for

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], padded by `pad` -> `PointRend.maps`, to be cut by `own_part`."""
        self.own.outside = {}  # made once in each run, inside a compiled function or a graph
        fine_map, coarse = self.model.maps(images)
        self.own.outside = {}
        return fine_map, coarse


class OwnPart:
    """The image's own part of padded maps, and the hooks that let nothing else into it.

    It does not know the model whose hooks hold it: a cycle would keep both until Python looks for
    cycles.

    Attributes:
        size: (height, width) of the image; a tensor, so that what is compiled or captured reads it
            at each run.
        outside: where the cells of a grid are beyond the image, bool [h, w].
    """

    def __init__(self, device: torch.device) -> None:
        self.size = torch.zeros(2, dtype=torch.int64, device=device)
        self.outside: dict[Grid, Tensor] = {}

    def hook_head(self, head: Any, stride: int) -> None:
        factor = 1
        for module in head:
            if isinstance(module, nn.Upsample):
                module.register_forward_pre_hook(partial(self._repeat_border, (stride, factor)))
                factor *= 2
            else:
                self.clear_before(module.conv, (stride, factor))
        if factor > 1:
            head.register_forward_hook(partial(self._fit, (stride, factor)))

    def clear_before(self, module: nn.Module, grid: Grid) -> None:
        module.register_forward_pre_hook(partial(self._clear, grid))

    def _clear(self, grid: Grid, module: nn.Module, args: tuple[Tensor]) -> None:
        (x,) = args
        if grid not in self.outside:
            rows, columns = self._extent(grid)
            down, across = _indices(x)
            self.outside[grid] = (down[:, None] >= rows) | (across >= columns)
        x.masked_fill_(self.outside[grid], 0)

    def _repeat_border(self, grid: Grid, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        rows, columns = self._extent(grid)
        down, across = _indices(x)
        return (x[:, :, down.minimum(rows - 1)[:, None], across.minimum(columns - 1)],)

    def _fit(self, grid: Grid, module: nn.Module, args: tuple[Tensor], x: Tensor) -> Tensor:
        """As F.interpolate to the size of the finest map; of the right size already, x itself."""
        result = x.to(torch.promote_types(x.dtype, torch.float32))
        for dim, own, wanted in zip((2, 3), self._extent(grid), self._extent((4, 1)), strict=True):
            result = _interpolate(result, dim, own, wanted)
        return result.to(x.dtype)

    def _extent(self, grid: Grid) -> tuple[Tensor, ...]:
        """Rows and columns of the image's own part on a grid."""
        stride, factor = grid
        return ((self.size + (stride - 1)) // stride * factor).unbind()


def pad(images: Tensor, multiple: int) -> Tensor:
    """[B, C, H, W] -> with zeros below and at the right, up to multiples; the layout is kept."""
    height, width = images.shape[2:]
    return nn.functional.pad(images, (0, -width % multiple, 0, -height % multiple))


def own_part(padded: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The part of a map at stride 4 that an image of that size has without padding, a view."""
    height, width = (math.ceil(side / 4) for side in image_size)
    return padded[:, :, :height, :width]


def _windows(module: nn.Module) -> list[nn.Conv2d]:
    convs = [conv for conv in module.modules() if isinstance(conv, nn.Conv2d)]
    return [conv for conv in convs if conv.kernel_size != (1, 1)]


def _indices(x: Tensor) -> tuple[Tensor, ...]:
    """Of the rows and of the columns of a map."""
    return tuple(torch.arange(count, device=x.device) for count in x.shape[2:])


def _interpolate(x: Tensor, dim: int, own: Tensor, wanted: Tensor) -> Tensor:
    """The first `own` cells along a dimension become `wanted`, as bilinear F.interpolate has it."""
    scale = own.to(x.dtype) / wanted.to(x.dtype)
    place = scale * (torch.arange(x.shape[dim], device=x.device).to(x.dtype) + 0.5) - 0.5
    place = place.clamp(min=0)
    low = place.long().minimum(own - 1)
    high = (low + 1).minimum(own - 1)
    share = (place - low).view(-1, 1) if dim == 2 else place - low
    return x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
