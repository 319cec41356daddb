"""The coarse head: Semantic FPN (arXiv 1901.02446), as mmsegmentation's `FPNHead`; no dropout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pointrend_triton import reference
from pointrend_triton.models.fpn import ConvModule
from pointrend_triton.models.init import init_predictor

BN_MOMENTUM = 0.1  # PyTorch's default, which mmsegmentation keeps


class CoarseHead(nn.Module):
    """Four pyramid levels at strides 4 to 32 -> logits at stride 4.

    mmsegmentation runs this head twice in a training step of PointRend, with the same result, but
    its BatchNorm statistics move twice. `bn_updates=2` gives the same statistics in one pass: two
    moves by the momentum m are one by 1 - (1 - m)^2.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, bn_updates: int = 1):
        super().__init__()
        self.bn_updates = bn_updates
        self.scale_heads = nn.ModuleList(
            _scale_head(in_channels, channels, level) for level in range(4)
        )
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        init_predictor(self.conv_seg, std=0.01)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and bn_updates > 1:
                module.momentum = 1 - (1 - BN_MOMENTUM) ** bn_updates

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        x = self.scale_heads[0](pyramid[0])
        for head, level in zip(self.scale_heads[1:], pyramid[1:], strict=True):
            # of odd sizes, twice the coarser one is too large
            x = x + reference.resample(head(level), (x.shape[2], x.shape[3]))
        if self.training and self.bn_updates > 1:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    assert module.num_batches_tracked is not None
                    module.num_batches_tracked += self.bn_updates - 1
        return self.conv_seg(x)


def _scale_head(in_channels: int, channels: int, level: int) -> nn.Sequential:
    """Convolutions, each followed by a twofold enlargement (not at level 0), down to stride 4."""
    layers: list[nn.Module] = []
    for i in range(max(1, level)):
        layers.append(ConvModule(in_channels if i == 0 else channels, channels, 3, norm_relu=True))
        if level > 0:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
