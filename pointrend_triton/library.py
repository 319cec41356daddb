"""The kernels as PyTorch operators: what each returns to a compiler, and how gradients pass.

An operator is opaque to `torch.compile`, so kernels keep their tuned configurations there, and
`torch.library.opcheck` holds each to its contract. Arguments are checked in `pointrend_triton.ops`.
"""

# no "from __future__ import annotations": operators take their schema from the annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from pointrend_triton import precision
from pointrend_triton.kernels import augment as augment_kernels
from pointrend_triton.kernels import decode as decode_kernels
from pointrend_triton.kernels import point_head as head_kernels
from pointrend_triton.kernels import point_sample as sample_kernels
from pointrend_triton.kernels import refine as refine_kernels
from pointrend_triton.kernels import select as select_kernels
from pointrend_triton.kernels import uncertainty as uncertainty_kernels
from pointrend_triton.kernels.launch import INTERPRETED, INTERPRETER_FAULT
from pointrend_triton.kernels.point_head import unsupported as unsupported_head

__all__ = [
    "INTERPRETED",
    "INTERPRETER_FAULT",
    "augment",
    "decode",
    "point_head",
    "point_head_backward",
    "point_sample",
    "point_sample_backward",
    "refine",
    "sampled_uncertainty",
    "select_points",
    "topk_on_grid",
    "unsupported_head",
    "upsample_uncertainty",
]


@custom_op("pointrend_triton::point_sample", mutates_args=())
def point_sample(
    input: Tensor,
    coords: Tensor,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return sample_kernels.forward(
        input,
        coords,
        mode=mode,
        padding_mode=padding_mode,
        align_corners=align_corners,
        out_dtype=out_dtype,
    )


@point_sample.register_fake
def _(input, coords, mode, padding_mode, align_corners, out_dtype):
    return input.new_empty(*input.shape[:2], coords.shape[1], dtype=out_dtype)


@custom_op("pointrend_triton::point_sample_backward", mutates_args=())
def point_sample_backward(
    grad: Tensor,
    coords: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    channels_last: bool,
    mode: str,
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    return sample_kernels.backward(
        grad,
        coords,
        shape=(grad.shape[0], grad.shape[1], height, width),
        dtype=dtype,
        channels_last=channels_last,
        mode=mode,
        padding_mode=padding_mode,
        align_corners=align_corners,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@point_sample_backward.register_fake
def _(grad, coords, height, width, dtype, channels_last, mode, padding_mode, align_corners):
    shape = (*grad.shape[:2], height, width)
    return _empty_map(grad, shape, dtype, channels_last)


def _point_sample_setup(ctx, inputs, output):
    input, coords, mode, padding_mode, align_corners, _ = inputs
    ctx.save_for_backward(coords)
    ctx.map = (*input.shape[2:], input.dtype, _is_channels_last(input))
    ctx.options = (mode, padding_mode, align_corners)


def _point_sample_backward(ctx, grad):
    (coords,) = ctx.saved_tensors
    grad_input = None
    if ctx.needs_input_grad[0]:
        grad_input = point_sample_backward(grad, coords, *ctx.map, *ctx.options)
    return grad_input, None, None, None, None, None


point_sample.register_autograd(_point_sample_backward, setup_context=_point_sample_setup)


@custom_op("pointrend_triton::sampled_uncertainty", mutates_args=())
def sampled_uncertainty(logits: Tensor, coords: Tensor, kind: str) -> Tensor:
    return uncertainty_kernels.sampled(logits, coords, kind=kind)


@sampled_uncertainty.register_fake
def _(logits, coords, kind):
    return logits.new_empty(logits.shape[0], coords.shape[1], dtype=torch.float32)


@custom_op("pointrend_triton::upsample_uncertainty", mutates_args=())
def upsample_uncertainty(
    logits: Tensor, scale: int, kind: str, return_logits: bool, return_labels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What is not asked for is an empty tensor."""
    scores, upsampled, labels = uncertainty_kernels.upsample(
        logits, scale, kind=kind, return_logits=return_logits, return_labels=return_labels
    )
    return (
        scores,
        logits.new_empty(0) if upsampled is None else upsampled,
        logits.new_empty(0, dtype=_label_type(logits)) if labels is None else labels,
    )


@upsample_uncertainty.register_fake
def _(logits, scale, kind, return_logits, return_labels):
    n, c, height, width = logits.shape
    height, width = height * scale, width * scale
    return (
        logits.new_empty(n, 1, height, width, dtype=torch.float32),
        logits.new_empty((n, c, height, width) if return_logits else 0),
        logits.new_empty((n, height, width) if return_labels else 0, dtype=_label_type(logits)),
    )


@custom_op("pointrend_triton::select_points", mutates_args=())
def select_points(scores: Tensor, candidates: Tensor, random: Tensor, num_uncertain: int) -> Tensor:
    return select_kernels.select_points(scores, candidates, random, num_uncertain)


@select_points.register_fake
def _(scores, candidates, random, num_uncertain):
    n, num_random, _ = random.shape
    return scores.new_empty(n, num_uncertain + num_random, 2, dtype=torch.float32)


@custom_op("pointrend_triton::topk_on_grid", mutates_args=())
def topk_on_grid(uncertainty: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return select_kernels.topk_on_grid(uncertainty, k)


@topk_on_grid.register_fake
def _(uncertainty, k):
    n, _, height, width = uncertainty.shape
    k = min(k, height * width)
    return (
        uncertainty.new_empty(n, k, dtype=torch.int64),
        uncertainty.new_empty(n, k, 2, dtype=torch.float32),
    )


@custom_op("pointrend_triton::point_head", mutates_args=())
def point_head(
    fine_map: Tensor,
    coarse_map: Tensor,
    coords: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    coarse_each_layer: bool,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Logits, and what the backward pass reads (empty unless `save`)."""
    packed = head_kernels.pack(
        weights,
        biases,
        fine_channels=fine_map.shape[1],
        classes=coarse_map.shape[1],
        coarse_each_layer=coarse_each_layer,
        dtype=dtype,
        precision=_precision(),
    )
    return head_kernels.forward(fine_map, coarse_map, coords, packed, save=save)


@point_head.register_fake
def _(fine_map, coarse_map, coords, weights, biases, coarse_each_layer, dtype, save):
    n, num_points = fine_map.shape[0], coords.shape[1]
    out = fine_map.new_empty(n, weights[-1].shape[0], num_points, dtype=dtype)
    pitch = head_kernels.saved_width(fine_map.shape[1], coarse_map.shape[1], weights)
    rows = n * num_points
    return out, fine_map.new_empty((rows, pitch) if save else 0, dtype=dtype)


@custom_op("pointrend_triton::point_head_backward", mutates_args=())
def point_head_backward(
    grad: Tensor,
    saved: Tensor,
    coords: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    coarse_each_layer: bool,
    fine: Sequence[int],
    coarse: Sequence[int],
    fine_dtype: torch.dtype,
    coarse_dtype: torch.dtype,
    channels_last: Sequence[bool],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Gradients to the fine map, the coarse map, weights and biases.

    Args:
        fine, coarse: (channels, height, width) of the maps.
        fine_dtype, coarse_dtype: of the maps.
        channels_last, needed: for the fine and the coarse map; what is not needed is empty.
    """
    dtype = saved.dtype
    packed = head_kernels.pack(
        weights,
        biases,
        fine_channels=fine[0],
        classes=coarse[0],
        coarse_each_layer=coarse_each_layer,
        dtype=dtype,
        precision=_precision(),
    )
    d_fine, d_coarse, d_weights, d_biases = head_kernels.mlp_backward(grad, saved, packed)
    maps = []
    for points, (_, height, width), map_dtype, is_channels_last, is_needed in zip(
        (d_fine, d_coarse),
        (fine, coarse),
        (fine_dtype, coarse_dtype),
        channels_last,
        needed,
        strict=True,
    ):
        if is_needed:
            maps.append(
                sample_kernels.backward(
                    points,
                    coords,
                    shape=(*points.shape[:2], height, width),
                    dtype=map_dtype,
                    channels_last=is_channels_last,
                    mode="bilinear",
                    padding_mode="zeros",
                    align_corners=False,
                    deterministic=torch.are_deterministic_algorithms_enabled(),
                )
            )
        else:
            maps.append(points.new_empty(0, dtype=map_dtype))
    return (
        maps[0],
        maps[1],
        [
            d.to(weight.dtype).view(weight.shape)
            for d, weight in zip(d_weights, weights, strict=True)
        ],
        # copied: they are parts of one tensor, and what an operator returns must not be
        [d.to(bias.dtype, copy=True) for d, bias in zip(d_biases, biases, strict=True)],
    )


@point_head_backward.register_fake
def _(
    grad,
    saved,
    coords,
    weights,
    biases,
    coarse_each_layer,
    fine,
    coarse,
    fine_dtype,
    coarse_dtype,
    channels_last,
    needed,
):
    maps = [
        _empty_map(grad, (grad.shape[0], *shape), dtype, is_channels_last)
        if is_needed
        else grad.new_empty(0, dtype=dtype)
        for shape, dtype, is_channels_last, is_needed in zip(
            (fine, coarse), (fine_dtype, coarse_dtype), channels_last, needed, strict=True
        )
    ]
    # contiguous whatever the parameters' strides
    d_weights = [weight.new_empty(weight.shape) for weight in weights]
    return *maps, d_weights, [bias.new_empty(bias.shape) for bias in biases]


def _point_head_setup(ctx, inputs, output):
    fine_map, coarse_map, coords, weights, biases, coarse_each_layer, _, _ = inputs
    ctx.save_for_backward(output[1], coords, *weights, *biases)
    ctx.set_materialize_grads(False)  # none for what was saved
    ctx.maps = (
        [*fine_map.shape[1:]],
        [*coarse_map.shape[1:]],
        fine_map.dtype,
        coarse_map.dtype,
        [_is_channels_last(fine_map), _is_channels_last(coarse_map)],
    )
    ctx.coarse_each_layer = coarse_each_layer


def _point_head_backward(ctx, grad, _):
    saved, coords, *layers = ctx.saved_tensors
    weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    if grad is None:
        return None, None, None, [None] * len(weights), [None] * len(biases), None, None, None
    needed = [*ctx.needs_input_grad[:2]]
    d_fine, d_coarse, d_weights, d_biases = point_head_backward(
        grad, saved, coords, weights, biases, ctx.coarse_each_layer, *ctx.maps, needed
    )
    return (
        d_fine if needed[0] else None,
        d_coarse if needed[1] else None,
        None,
        d_weights,
        d_biases,
        None,
        None,
        None,
    )


point_head.register_autograd(_point_head_backward, setup_context=_point_head_setup)


@custom_op("pointrend_triton::decode", mutates_args=())
def decode(logits: Tensor, image_size: Sequence[int] | None, size: Sequence[int] | None) -> Tensor:
    return decode_kernels.decode(logits, _pair(image_size), _pair(size))


@decode.register_fake
def _(logits, image_size, size):
    target = size or image_size or logits.shape[2:]
    return logits.new_empty(logits.shape[0], *target, dtype=_label_type(logits))


@custom_op("pointrend_triton::refine", mutates_args=())
def refine(
    coarse: Tensor,
    fine_map: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    steps: int,
    num_points: int,
    coarse_each_layer: bool,
    kind: str,
    return_labels: bool,
    image_size: Sequence[int] | None,
    size: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Logits of the refined grid, or labels at `size`, `image_size` or of that grid."""
    return refine_kernels.refine(
        coarse,
        fine_map,
        weights,
        biases,
        steps=steps,
        num_points=num_points,
        coarse_each_layer=coarse_each_layer,
        kind=kind,
        return_labels=return_labels,
        image_size=_pair(image_size),
        size=_pair(size),
        dtype=dtype,
        precision=_precision(),
    )


@refine.register_fake
def _(
    coarse,
    fine_map,
    weights,
    biases,
    steps,
    num_points,
    coarse_each_layer,
    kind,
    return_labels,
    image_size,
    size,
    dtype,
):
    n, c, height, width = coarse.shape
    grid = (height * 2**steps, width * 2**steps)
    if return_labels:
        return coarse.new_empty(n, *(size or image_size or grid), dtype=_label_type(coarse))
    return coarse.new_empty(n, c, *grid)


@custom_op("pointrend_triton::augment", mutates_args=())
def augment(
    pictures: Tensor,
    places: Tensor,
    colours: Tensor,
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    return augment_kernels.augment(pictures, places, colours, (size[0], size[1]), mean, std)


@augment.register_fake
def _(pictures, places, colours, size, mean, std):
    n = places.shape[0]
    return colours.new_empty(n, 3, *size), places.new_empty(n, *size)


def _precision() -> str:
    """How fp32 is multiplied: as torch multiplies matrices."""
    return "tf32" if precision.matmul_is_tf32() else "ieee"


def _is_channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _empty_map(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def _label_type(logits: Tensor) -> torch.dtype:
    return torch.uint8 if logits.shape[1] <= 256 else torch.int64


def _pair(size: Sequence[int] | None) -> tuple[int, int] | None:
    return None if size is None else (size[0], size[1])
