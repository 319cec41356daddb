"""Feature pyramid network (arXiv 1612.03144), as mmsegmentation's `FPN` with four levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pointrend_triton.models.init import init_conv


class ConvModule(nn.Module):
    """Convolution, then BatchNorm and ReLU where asked for; its parts are named as mmcv's."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm_relu: bool = False,
        kind: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv2d,
    ):
        super().__init__()
        self.conv = kind(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm_relu
        )
        self.bn = nn.BatchNorm2d(out_channels) if norm_relu else None
        init_conv(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)


class FPN(nn.Module):
    """The backbone's maps -> as many of `out_channels` channels, enriched by the coarser ones."""

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(c, out_channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3) for _ in in_channels
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        laterals = [conv(level) for conv, level in zip(self.lateral_convs, levels, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            # to the exact size: of odd sizes, twice the coarser one is too large
            size = laterals[i - 1].shape[-2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(
                laterals[i], size=size, mode="nearest"
            )
        return [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=True)]
