"""Initialisation as the published runs had it (mmsegmentation 0.6.0).

Later versions skip parts of it by accident: the heads' logit layers keep PyTorch's default.
"""

from __future__ import annotations

from torch import nn


def init_conv(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Kaiming normal over the outputs with ReLU's gain, zero bias."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def init_norm(norm: nn.BatchNorm2d) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)


def init_predictor(conv: nn.Conv1d | nn.Conv2d, std: float) -> None:
    """A layer that gives logits: small normal weights, zero bias."""
    nn.init.normal_(conv.weight, std=std)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
