"""A trained model made ready to run: images in, labels out, as fast as the device allows."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pointrend_triton import ops
from pointrend_triton.models.fpn import ConvModule
from pointrend_triton.models.pointrend import PointRend


class Predictor:
    """A frozen copy of a model, prepared for inference.

    Args:
        model: stays as it is; the copy is in evaluation mode, on the same device.
        dtype: float32, bfloat16 or float16, of weights and activations; margins, interpolation and
            the choice of points stay in fp32.
        fold: merge each BatchNorm into the convolution before it.
        channels_last: keep maps channels-last, which is what tensor cores and oneDNN read fastest.
        compile: `torch.compile` the network and the refinement.
    """

    def __init__(
        self,
        model: PointRend,
        *,
        dtype: torch.dtype = torch.float32,
        fold: bool = True,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        model = copy.deepcopy(model).eval().requires_grad_(False)
        if fold:
            fold_batch_norm(model)
        self.model: PointRend = model.to(dtype=dtype)
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self._run = torch.compile(self._forward) if compile else self._forward

    @torch.inference_mode()
    def __call__(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        *,
        steps: int | None = None,
        num_points: int | None = None,
        refine: bool = True,
    ) -> Tensor:
        """Normalised images [B, 3, H, W] on any device -> labels [B, h, w] on the predictor's.

        Args:
            images: float.
            size, steps, num_points: as in `PointRend.predict`.
            refine: False enlarges the coarse logits, as the same network without point head does.
        """
        images = images.to(self.device, self.dtype, non_blocking=True)
        images = images.contiguous(memory_format=self.memory_format)
        return self._run(images, size, steps, num_points, refine)

    def _forward(
        self,
        images: Tensor,
        size: tuple[int, int] | None,
        steps: int | None,
        num_points: int | None,
        refine: bool,
    ) -> Tensor:
        fine_map, coarse = self.model.maps(images)
        image_size = (images.shape[2], images.shape[3])
        if not refine:
            return ops.decode(coarse, image_size=image_size, size=size)
        return self.model.refine(
            fine_map, coarse, "labels", image_size, size, steps=steps, num_points=num_points
        )


def fold_batch_norm(model: nn.Module) -> None:
    """Merges, in place, each BatchNorm of a model in evaluation mode into the convolution before it.

    "Before" is the order in which modules were registered, which in this network is the order in
    which they run.
    """
    for module in model.modules():
        names = list(module._modules)
        for name, after in itertools.pairwise(names):
            conv, norm = module._modules[name], module._modules[after]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module._modules[name] = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
                module._modules[after] = nn.Identity()
