"""The network: ResNetV1c, FPN, coarse head, point head, and PointRend made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pointrend_triton.config import Config, load_config
from pointrend_triton.models.pointrend import PointRend


def build_model(source: str | Path | Mapping[str, Any] | Config) -> PointRend:
    """A freshly initialised model, from all that `load_config` takes.

    No weights are read: `load_checkpoint` and `load_backbone` of `pointrend_triton.checkpoint` do
    that.
    """
    return PointRend(load_config(source).model)


__all__ = ["PointRend", "build_model"]
