"""A trained model made ready to run: images in, labels out, as fast as the device allows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pointrend_triton import ops, reference
from pointrend_triton.graphs import Graphs
from pointrend_triton.models.pointrend import PointRend
from pointrend_triton.padding import STRIDE, PaddedMaps, own_part, pad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# PyTorch gives up after 8, and counts those of all predictors of a process together
COMPILATIONS = 256


class Predictor:
    """A frozen copy of a model, prepared for inference. To be called from one thread and stream.

    Args:
        model: stays as it is; the copy is in evaluation mode, on the same device.
        dtype: float32, bfloat16 or float16, of weights and activations; margins, interpolation and
            the choice of points stay in fp32. Autocast around a call changes nothing.
        fold: merge each BatchNorm into the convolution before it.
        channels_last: keep maps channels-last, which is what tensor cores and oneDNN read fastest.
        compile: `torch.compile` the network, whole; the refinement is kernels already. The first
            size is compiled for itself, the second for any; without `bucket` some more follow, as
            sizes that divide by 8, 16 or 32 or not, and squares, are compiled apart.
        graphs: capture CUDA graphs, one for each size of input (and of result, and `steps` and so
            on), whose first call takes several times as long; the least recently used of more than
            `graphs.LIMIT` is dropped. Network, refinement and labels are one graph; with `bucket`
            the network is, and what follows is launched for each size. PyTorch's settings of
            precision (TF32 and so on) stay those of the capture.
        bucket: pad images to multiples of this, itself a multiple of 32, so that sizes are few. The
            result is that of the unpadded network up to rounding.

    Attributes:
        device, dtype, bucket: where and how it computes.
        model: the copy; with `bucket` not to be called by itself, as it expects padded images.

    Raises ValueError for a dtype, a bucket or graphs that cannot be.
    """

    # whoever makes or calls it in inference mode may call it outside as well
    @torch.inference_mode(False)
    def __init__(
        self,
        model: PointRend,
        *,
        dtype: torch.dtype = torch.float32,
        fold: bool = True,
        channels_last: bool = True,
        compile: bool = False,
        graphs: bool = False,
        bucket: int | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        self.dtype = dtype
        self.bucket = bucket
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._check(graphs)
        model = copy.deepcopy(model).eval().requires_grad_(False).float()
        if fold:
            fold_batch_norm(model)
        self.model = model.to(dtype)
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self._padded = PaddedMaps(self.model) if bucket else None
        self._maps: Callable[..., Any] = self._padded.maps if self._padded else self.model.maps
        if compile:
            self._maps = _compiled(self._maps)
        # no method of its own: a cycle would keep the GPU's memory until Python looks for cycles
        self._whole: Callable[..., Any] = partial(_whole, self.model, self._maps)
        if graphs and bucket:
            self._maps = Graphs(self._maps, self.device)
        elif graphs:
            captured = Graphs(self._whole, self.device)
            # copied: the next call overwrites what a graph returns
            self._whole = lambda *arguments: captured(*arguments).clone()

    def __call__(
        self,
        images: Tensor,
        size: tuple[int, int] | None = None,
        *,
        steps: int | None = None,
        num_points: int | None = None,
        refine: bool = True,
    ) -> Tensor:
        """Normalised images on any device -> labels [B, h, w] on the predictor's.

        Labels are uint8 up to 256 classes, else int64; with one class, 1 where its logit is
        positive. The call does not wait for a GPU.

        Args:
            images: [B, 3, H, W], floating point; from pinned memory they are copied meanwhile.
            size: (h, w) of the result, by default the input's.
            steps, num_points: as in `PointRend.predict`.
            refine: False enlarges the coarse logits, as the same network without point head does.

        Raises ValueError for images of another shape or type.
        """
        return self._predict(images, "labels", size and tuple(size), steps, num_points, refine)

    def logits(
        self,
        images: Tensor,
        *,
        steps: int | None = None,
        num_points: int | None = None,
        refine: bool = True,
    ) -> Tensor:
        """Logits [B, C, H, W] at the input's size, of the predictor's dtype; see `__call__`."""
        return self._predict(images, "logits", None, steps, num_points, refine)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _predict(self, images: Tensor, *how: Any) -> Tensor:
        _check_images(images)
        # moved as they are: a cast on the host would wait, and leave pinned memory
        images = images.to(self.device, non_blocking=True)
        images = images.to(self.dtype).contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, enabled=False):
            if self._padded is None:
                return self._whole(images, *how)
            assert self.bucket is not None
            image_size = (images.shape[2], images.shape[3])
            self._padded.set_size(image_size)
            maps = self._maps(pad(images, self.bucket))
            fine_map, coarse = (own_part(padded, image_size) for padded in maps)
            if coarse.shape[2:] == image_size:
                # of one pixel: it may be the result, and must not be a graph's
                coarse = coarse.clone()
            return _finish(self.model, fine_map, coarse, image_size, *how)

    def _check(self, graphs: bool) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype}")
        bucket = self.bucket
        if bucket is not None and (
            not isinstance(bucket, int) or bucket < STRIDE or bucket % STRIDE
        ):
            raise ValueError(f"bucket must be a multiple of {STRIDE}, not {bucket!r}")
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs need the model on a CUDA device, not on {self.device}")


def fold_batch_norm(model: nn.Module) -> None:
    """Merges, in place, each BatchNorm of a model in evaluation mode into the convolution before.

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


def _whole(model: PointRend, maps: Callable[..., Any], images: Tensor, *how: Any) -> Tensor:
    fine_map, coarse = maps(images)
    return _finish(model, fine_map, coarse, (images.shape[2], images.shape[3]), *how)


def _finish(
    model: PointRend,
    fine_map: Tensor,
    coarse: Tensor,
    image_size: tuple[int, int],
    output: str,
    size: tuple[int, int] | None,
    steps: int | None,
    num_points: int | None,
    refine: bool,
) -> Tensor:
    if refine:
        return model.refine(
            fine_map, coarse, output, image_size, size, steps=steps, num_points=num_points
        )
    if output == "labels":
        return ops.decode(coarse, image_size=image_size, size=size)
    return reference.resample(coarse, image_size)


def _compiled(maps: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo.config  # takes a second, and few compile

    # whole or an error: a part left out, or a size too many, would be slow without a word
    function = torch.compile(maps, fullgraph=True)
    known: set[torch.Size] = set()

    def run(images: Tensor) -> Any:
        if images.shape in known:
            return function(images)
        with torch._dynamo.config.patch(recompile_limit=COMPILATIONS):
            result = function(images)
        known.add(images.shape)
        return result

    return run


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            "images must be normalised floating point [B, 3, H, W], "
            f"not {images.dtype} {tuple(images.shape)}"
        )
    if 0 in images.shape[2:]:
        raise ValueError(f"images must have at least one pixel, not {tuple(images.shape)}")
