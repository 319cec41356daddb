"""ResNet with a stem of three 3x3 convolutions: mmsegmentation's `ResNetV1c`, style "pytorch"."""

from __future__ import annotations

from torch import Tensor, nn

from pointrend_triton.models.init import init_conv, init_norm

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the block of ResNet-18 and -34."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the stride sits on the 3x3 (the block of ResNet-50 and -101)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNetV1c(nn.Module):
    """Images [N, 3, H, W] -> four maps at strides 4, 8, 16, 32, their sizes rounded up.

    `out_channels` gives their widths: base_channels x (1, 2, 4, 8), four times that from depth 50
    on.
    """

    def __init__(self, depth: int = 50, base_channels: int = 64):
        super().__init__()
        block = BasicBlock if depth < 50 else Bottleneck
        half = base_channels // 2
        self.stem = nn.Sequential(
            *_conv_norm_relu(3, half, stride=2),
            *_conv_norm_relu(half, half),
            *_conv_norm_relu(half, base_channels),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = base_channels
        self.out_channels = []
        for level, num_blocks in enumerate(BLOCKS[depth]):
            planes = base_channels * 2**level
            layer = _make_layer(block, channels, planes, num_blocks, stride=1 if level == 0 else 2)
            channels = planes * block.expansion
            self.add_module(f"layer{level + 1}", layer)
            self.out_channels.append(channels)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_conv(module)
            elif isinstance(module, nn.BatchNorm2d):
                init_norm(module)
        # every block starts as the identity (mmsegmentation's zero_init_residual, without
        # pretrained weights)
        for module in self.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.stem(images))
        levels = []
        for level in range(1, 5):
            x = self.get_submodule(f"layer{level}")(x)
            levels.append(x)
        return levels


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


def _make_layer(
    block: type[BasicBlock] | type[Bottleneck],
    in_channels: int,
    planes: int,
    num_blocks: int,
    stride: int,
) -> nn.Sequential:
    out_channels = planes * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    blocks = [block(in_channels, planes, stride, downsample)]
    blocks += [block(out_channels, planes, 1, None) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)
