"""Which network a state dict belongs to, read off the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pointrend_triton.config import ModelConfig, PointHeadConfig
from pointrend_triton.models.resnet import BLOCKS
from pointrend_triton.serialization import CheckpointError


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Drops `prefix` from the names that begin with it.

    Raises:
        CheckpointError: two tensors would get the same name.
    """
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if short in stripped:
            raise CheckpointError(f"there are two tensors {short}, with and without '{prefix}'")
        stripped[short] = tensor
    return stripped


def model_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as PointRend has them: no "module." before, and also Semantic FPN's head in a list."""
    return {
        re.sub(r"^decode_head\.(?=conv_seg\.|scale_heads\.)", "decode_head.0.", name): tensor
        for name, tensor in strip_prefix(tensors, "module.").items()
    }


def backbone_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a ResNet as ResNetV1c has them, where they are timm's (resnet50c)."""
    if "conv1.0.weight" not in tensors:
        return dict(tensors)
    # timm calls the stem conv1, except for its last norm
    return {
        re.sub(r"^conv1\.", "stem.", re.sub(r"^bn1\.", "stem.7.", name)): tensor
        for name, tensor in tensors.items()
    }


def infer_model_config(state_dict: Mapping[str, Tensor]) -> ModelConfig:
    """Depth, widths, classes and point head from the tensors; all else keeps its default.

    Raises:
        CheckpointError: the tensors are not of a PointRend or Semantic FPN on a ResNetV1c.
    """
    tensors = model_names(state_dict)
    if "backbone.conv1.weight" in tensors:
        raise CheckpointError(other_stem(tensors["backbone.conv1.weight"]))
    num_classes, head_channels = _shape(tensors, "decode_head.0.conv_seg.weight", 4)[:2]
    return ModelConfig(
        depth=infer_depth(tensors, "backbone."),  # type: ignore[arg-type]
        num_classes=num_classes,
        base_channels=_shape(tensors, "backbone.layer1.0.conv1.weight", 4)[0],
        fpn_channels=_shape(tensors, "neck.lateral_convs.0.conv.weight", 4)[0],
        head_channels=head_channels,
        point_head=_point_head(tensors, num_classes),
    )


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields of a configuration that fix names and shapes."""
    fields: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("depth", "num_classes", "base_channels", "fpn_channels", "head_channels")
    }
    for name in ("channels", "num_layers", "coarse_each_layer"):
        fields[f"point_head.{name}"] = getattr(config.point_head, name, None)
    return fields


def infer_depth(tensors: Mapping[str, Tensor], prefix: str = "") -> int:
    """18, 34, 50 or 101, by the number and kind of the residual blocks.

    Raises:
        CheckpointError: no such ResNet has these blocks.
    """
    block = re.compile(re.escape(prefix) + r"layer([1-4])\.\d+\.conv1\.weight")
    counted = Counter(found[1] for found in map(block.fullmatch, tensors) if found)
    counts = tuple(counted[level] for level in "1234")
    bottleneck = f"{prefix}layer1.0.conv3.weight" in tensors
    for depth, blocks in BLOCKS.items():
        if counts == blocks and bottleneck == (depth >= 50):
            return depth
    raise CheckpointError(
        f"{counts} {'bottleneck' if bottleneck else 'basic'} blocks in {prefix}layer1 to layer4 "
        f"make no ResNet of depth {', '.join(map(str, BLOCKS))}"
    )


def describe(tensors: Mapping[str, Tensor]) -> str:
    """A segmenter or a backbone in words, such as "R-50 with 19 classes".

    Raises:
        CheckpointError: see `infer_model_config` and `infer_depth`.
    """
    if not any(name.startswith("backbone.") for name in tensors):
        return f"R-{infer_depth(tensors)}"
    config = infer_model_config(tensors)
    point_head = "" if config.point_head else " and no point head"
    return f"R-{config.depth} with {config.num_classes} classes{point_head}"


def other_stem(weight: Tensor) -> str:
    size = "x".join(map(str, weight.shape[2:]))
    return (
        f"this is a ResNet whose stem is one {size} convolution; "
        "the stem of ResNetV1c is three 3x3 convolutions"
    )


def _point_head(tensors: Mapping[str, Tensor], num_classes: int) -> PointHeadConfig | None:
    if not any(name.startswith("decode_head.1.") for name in tensors):
        return None
    channels = _shape(tensors, "decode_head.1.fcs.0.conv.weight", 3)[0]
    hidden = re.compile(r"decode_head\.1\.fcs\.\d+\.conv\.weight")
    # the predictor is the last layer that coarse logits are given to, if they go to each
    width = _shape(tensors, "decode_head.1.fc_seg.weight", 3)[1]
    if width not in (channels, channels + num_classes):
        raise CheckpointError(
            f"decode_head.1.fc_seg.weight takes {width} channels: behind {channels} hidden ones "
            f"and with {num_classes} classes it must be {channels} or {channels + num_classes}"
        )
    return PointHeadConfig(
        channels=channels,
        num_layers=len([name for name in tensors if hidden.fullmatch(name)]),
        coarse_each_layer=width != channels,
    )


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int) -> torch.Size:
    if name not in tensors:
        raise CheckpointError(f"there is no tensor {name}, which every such model has")
    shape = tensors[name].shape
    if len(shape) != dims:
        raise CheckpointError(f"{name} must have {dims} dimensions, its shape is {tuple(shape)}")
    return shape
