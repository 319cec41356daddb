"""The point operations of PointRend: argument checks, documentation and the choice of a backend.

On CUDA the fused kernels of `pointrend_triton.kernels` compute, elsewhere plain PyTorch does.

Shapes: N images, C channels or classes, H x W cells of a map, P points.
Every operation takes tensors of any strides and maps in fp32, fp16 or bf16. Coordinates are (x, y)
in [0, 1] over the whole map, in fp32; half precision is widened. Centres are half-pixel: cell
(i, j) lies at ((j + 0.5) / W, (i + 0.5) / H).

Every backend computes what `pointrend_triton.reference` computes; fp64 and gradients to coordinates
are always left to it. Errors name the argument, the rule and what came: ValueError for values,
shapes and devices, TypeError for types.

Under `torch.compile` a number of points or maps that changes from call to call compiles once more,
for any number; 0 and 1 are compiled apart. `torch._dynamo.mark_dynamic(tensor, dimension)` on the
first call avoids even that. Kernels are not tuned again for it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pointrend_triton import reference
from pointrend_triton.reference import Uncertainty

try:
    importlib.import_module("triton")
except ImportError:
    library: Any = None  # as on macOS: the reference computes
else:
    library = importlib.import_module("pointrend_triton.library")

UNCERTAINTIES = ("top2_margin", "neg_abs")
BACKENDS = ("auto", "triton", "reference")
_KERNEL_DEVICES = ("cuda",)  # where "auto" takes the kernels
_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_LABEL_TYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def point_sample(
    input: Tensor,
    coords: Tensor,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Samples a map at points, as detectron2's and mmcv's `point_sample`.

    Beyond the border the map is zero ("zeros"), so points within half a cell of it are blended with
    zeros; that is part of PointRend's numbers.

    Args:
        input: [N, C, H, W], floating point, or integer or bool (labels and masks).
        coords: [N, P, 2], [1, P, 2] shared by all maps, or [N, Hg, Wg, 2]; may lie outside [0, 1].
            What is not finite lies beyond the map: 0 with "zeros"; with "border" infinity is the
            last cell, NaN the first. So CUDA's `grid_sample` has it, and here every device.
        mode: "bilinear" or "nearest" (ties go to the even cell, as in `grid_sample`).
        padding_mode: "zeros" or "border".
        align_corners: True puts 0 and 1 on the centres of the outermost cells.
        out_dtype: None promotes map and coordinates (so fp32 for half maps, as under autocast);
            integer and bool maps keep their type where nearest and give fp32 where bilinear.

    Returns:
        [N, C, P], or [N, C, Hg, Wg].
    """
    _check_map("input", input)
    _check_coords(coords, input.shape[0])
    _check_choice("mode", mode, ("bilinear", "nearest"))
    _check_choice("padding_mode", padding_mode, ("zeros", "border"))
    _check_devices(input=input, coords=coords)
    if not _uses_kernels(input, coords) or _needs_gradient(coords):
        return reference.point_sample(
            input,
            coords,
            mode=mode,
            padding_mode=padding_mode,
            align_corners=align_corners,
            out_dtype=out_dtype,
        )
    keeps_type = mode == "nearest" and not input.is_floating_point()
    natural = input.dtype if keeps_type else torch.float32
    stored = out_dtype if out_dtype in _KERNEL_TYPES and not keeps_type else natural
    points = coords.flatten(1, -2)  # [N, P, 2]
    sampled = library.point_sample(input, points, mode, padding_mode, align_corners, stored)
    sampled = sampled if out_dtype is None else sampled.to(out_dtype)
    return sampled if coords.dim() == 3 else sampled.unflatten(2, coords.shape[1:3])


@torch.no_grad()
def select_uncertain_points(
    logits: Tensor,
    num_points: int,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    uncertainty: Uncertainty = "top2_margin",
    generator: torch.Generator | None = None,
    draws: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Points to train on: the most uncertain of many random ones, then random ones.

    PointRend section 3.1. Draws `torch.rand(N, int(num_points * oversample_ratio), 2)`, keeps the
    `int(importance_sample_ratio * num_points)` most uncertain (in any order), and appends
    `torch.rand` points up to `num_points`: for the same seed the points of mmsegmentation and
    detectron2.

    Args:
        logits: [N, C, H, W].
        num_points: P, at least 1.
        oversample_ratio: candidates per point, at least 1.
        importance_sample_ratio: the share of uncertain points, in [0, 1].
        uncertainty: "top2_margin" (second largest minus largest logit), "neg_abs" (-|logit|, the
            rule where C = 1), or a callable from sampled logits [N, C, K] to [N, 1, K], larger
            being more uncertain.
        generator: for the draws; eager mode only.
        draws: the two draws ready-made, in place of random ones.

    Returns:
        [N, P, 2] coordinates, without gradient.
    """
    _check_logits("logits", logits)
    _check_uncertainty(uncertainty)
    _check_count("num_points", num_points, 1)
    if not oversample_ratio >= 1:
        raise ValueError(f"oversample_ratio must be at least 1, not {oversample_ratio}")
    if not 0 <= importance_sample_ratio <= 1:
        raise ValueError(
            f"importance_sample_ratio must be within 0 and 1, not {importance_sample_ratio}"
        )
    if draws is not None:
        if len(draws) != 2:
            raise ValueError(f"draws must be (candidates, random), not {len(draws)} tensors")
        num_uncertain = int(importance_sample_ratio * num_points)
        expected = (int(num_points * oversample_ratio), num_points - num_uncertain)
        for name, draw, count in zip(("candidates", "random"), draws, expected, strict=True):
            if tuple(draw.shape) != (logits.shape[0], count, 2):
                raise ValueError(
                    f"draws: the {name} must be {(logits.shape[0], count, 2)}, "
                    f"not {tuple(draw.shape)}"
                )
        _check_devices(logits=logits, candidates=draws[0], random=draws[1])
    if not _uses_kernels(logits):
        return reference.select_uncertain_points(
            logits,
            num_points,
            oversample_ratio=oversample_ratio,
            importance_sample_ratio=importance_sample_ratio,
            uncertainty=uncertainty,
            generator=generator,
            draws=draws,
        )
    num_uncertain = int(importance_sample_ratio * num_points)
    candidates, random = draws or reference.draw_points(
        logits, num_points, oversample_ratio, num_uncertain, generator
    )
    if callable(uncertainty):
        scores = uncertainty(point_sample(logits, candidates))[:, 0]
    else:
        scores = library.sampled_uncertainty(logits, candidates, uncertainty)
    return library.select_points(scores, candidates, random, num_uncertain)


@torch.no_grad()
def topk_on_grid(uncertainty: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most uncertain cells of each map; NaN counts as largest.

    Args:
        uncertainty: [N, 1, H, W].
        k: at least 0; at most H * W cells are given.

    Returns:
        flat cell indices int64 [N, k'] in any order, and the cells' centres fp32 [N, k', 2], with
        k' = min(k, H * W).
    """
    _check_map("uncertainty", uncertainty)
    if uncertainty.shape[1] != 1:
        raise ValueError(f"uncertainty must be [N, 1, H, W], not {tuple(uncertainty.shape)}")
    _check_count("k", k, 0)
    if not _uses_kernels(uncertainty):
        return reference.topk_on_grid(uncertainty, k)
    return library.topk_on_grid(uncertainty, k)


@torch.no_grad()
def upsample_uncertainty(
    logits: Tensor,
    scale: int = 2,
    *,
    uncertainty: Uncertainty = "top2_margin",
    return_logits: bool = True,
    return_labels: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Enlarges logits bilinearly (border cells repeated) and scores every cell.

    The score is taken from the fp32 interpolated values, before they are rounded for storage.

    Args:
        logits: [N, C, H, W].
        scale: whole factor, at least 1.
        uncertainty: as in `select_uncertain_points`.

    Returns:
        uncertainty fp32 [N, 1, sH, sW]; the logits [N, C, sH, sW] in their own dtype, or None; the
        labels [N, sH, sW] (uint8 up to 256 classes, else int64), or None.
    """
    _check_logits("logits", logits)
    _check_uncertainty(uncertainty)
    _check_count("scale", scale, 1)
    if not _uses_kernels(logits) or callable(uncertainty):
        return reference.upsample_uncertainty(
            logits,
            scale,
            uncertainty=uncertainty,
            return_logits=return_logits,
            return_labels=return_labels,
        )
    scores, upsampled, labels = library.upsample_uncertainty(
        logits, scale, uncertainty, return_logits, return_labels
    )
    return scores, upsampled if return_logits else None, labels if return_labels else None


def point_head(
    fine_map: Tensor,
    coarse_map: Tensor,
    coords: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    coarse_each_layer: bool = True,
) -> Tensor:
    """The point MLP on fine features and coarse logits sampled at points (PointRend section 3.3).

    Args:
        fine_map: [N, F, H, W].
        coarse_map: [N, C, H', W'], of any size of its own.
        coords: [N, P, 2].
        weights: hidden layers first, the predictor last, each [out, in] or Conv1d's [out, in, 1].
        biases: one [out] for each weight.
        coarse_each_layer: True concatenates the coarse logits again after every hidden layer
            (mmsegmentation), False only before the first (detectron2's semantic head).

    Returns:
        logits [N, out of the predictor, P], differentiable in both maps, weights and biases.
    """
    _check_map("fine_map", fine_map)
    _check_map("coarse_map", coarse_map)
    _check_coords(coords, fine_map.shape[0])
    if coords.dim() != 3:
        raise ValueError(f"coords must be [N, P, 2], not {tuple(coords.shape)}")
    _check_devices(fine_map=fine_map, coords=coords)
    _check_layers(fine_map, coarse_map, weights, biases, coarse_each_layer)
    if not _runs_head_kernels(fine_map, coarse_map, coords, weights) or _needs_gradient(coords):
        return reference.point_head(
            fine_map, coarse_map, coords, weights, biases, coarse_each_layer=coarse_each_layer
        )
    save = _needs_gradient(fine_map, coarse_map, *weights, *biases)
    dtype = _head_type(fine_map, weights)
    logits, _ = library.point_head(
        fine_map, coarse_map, coords, list(weights), list(biases), coarse_each_layer, dtype, save
    )
    return logits


@torch.no_grad()
def decode(
    logits: Tensor,
    *,
    image_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Logits of a grid -> labels of an image, in mmsegmentation's two steps.

    Args:
        logits: [N, C, H, W].
        image_size: (height, width) of the network's input, to which the grid is resampled first.
        size: (height, width) of the result, to which that is resampled next; both bilinear, None
            for none.

    Returns:
        class indices [N, h, w]: uint8 up to 256 classes, else int64; for C = 1, whether the logit
        is positive.
    """
    _check_logits("logits", logits)
    _check_sizes(image_size, size)
    if not _uses_kernels(logits):
        return reference.decode(logits, image_size=image_size, size=size)
    return library.decode(logits, image_size, size)


@torch.no_grad()
def refine(
    coarse: Tensor,
    fine_map: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    steps: int = 2,
    num_points: int = 8196,
    coarse_each_layer: bool = True,
    uncertainty: str = "top2_margin",
    output: str = "logits",
    image_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """PointRend's adaptive subdivision (section 3.1).

    `steps` times: enlarge twofold, then compute the most uncertain cells again.

    Args:
        coarse: [N, C, H, W] logits.
        fine_map: [N, F, H', W'] features.
        weights, biases, coarse_each_layer: as in `point_head`.
        num_points: cells computed again in each step; all of them where the grid has fewer.
        uncertainty: "top2_margin" or "neg_abs".
        output: "logits", or "labels" as `decode` gives them.
        image_size, size: as in `decode`, for logits too.

    Returns:
        logits [N, C, h, w] or labels [N, h, w]; h x w is `size`, else `image_size`, else 2^steps
        times H x W.
    """
    _check_logits("coarse", coarse)
    _check_map("fine_map", fine_map)
    _check_layers(fine_map, coarse, weights, biases, coarse_each_layer)
    _check_choice("uncertainty", uncertainty, UNCERTAINTIES)
    _check_choice("output", output, ("logits", "labels"))
    _check_count("steps", steps, 0)
    _check_count("num_points", num_points, 0)
    _check_sizes(image_size, size)
    if not _runs_head_kernels(fine_map, coarse, None, weights):
        return reference.refine(
            coarse,
            fine_map,
            weights,
            biases,
            steps=steps,
            num_points=num_points,
            coarse_each_layer=coarse_each_layer,
            uncertainty=uncertainty,
            output=output,
            image_size=image_size,
            size=size,
        )
    refined = library.refine(
        coarse,
        fine_map,
        list(weights),
        list(biases),
        steps,
        num_points,
        coarse_each_layer,
        uncertainty,
        output == "labels",
        image_size,
        size,
        _head_type(fine_map, weights),
    )
    if output == "labels":
        return refined
    return reference.resample(reference.resample(refined, image_size), size)


@torch.no_grad()
def augment(
    pictures: Tensor,
    places: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Training crops of 8-bit pictures: resized, cut, flipped, distorted, normalised and padded.

    The steps, their order and every rounding are OpenCV's in mmsegmentation's training pipeline;
    the result is equal to the last bit to that of OpenCV on a processor with AVX2.

    Args:
        pictures: uint8 [pixels, 4], contiguous: blue, green, red and the class, of one picture
            after the other, row by row.
        places: int64 [B, 8], for each crop the number of its picture's first pixel, the picture's
            height and width, those after resizing, the crop's top and left in the resized picture,
            and 1 where it is flipped, else 0. What it names must exist: that is not checked, as it
            would wait for the GPU.
        colours: fp32 [B, 5]: brightness added, contrast as a factor, saturation as a factor (0:
            none), hue added in half degrees 0 to 179 (-1: none), and contrast as a factor again.
        size: (height, width) of the crops; what lies beyond the picture is padding.
        mean, std: three numbers each, in grey levels and the order red, green, blue.

    Returns:
        images fp32 [B, 3, h, w], (grey level - mean) / std in the order red, green, blue, padding
        0; and labels int64 [B, h, w], padding 255.
    """
    _check_crops(pictures, places, colours)
    _check_sizes(None, size)
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != 3:
            raise ValueError(f"{name} must be three numbers, not {len(numbers)}")
    if not _uses_kernels(pictures):
        return reference.augment(pictures, places, colours, size, mean=mean, std=std)
    return library.augment(pictures, places, colours, size, mean, std)


class backend:
    """Who computes: `ops.backend("reference")` chooses, `with ops.backend(...)` for a block.

    "auto" takes the fastest that fits the tensors, "reference" the PyTorch twin, "triton" the
    kernels or an error that says why not. The environment variable POINTREND_BACKEND gives the
    initial choice.
    """

    _chosen: str | None = None

    def __init__(self, name: str) -> None:
        _check_choice("backend", name, BACKENDS)
        self._previous = backend._chosen
        backend._chosen = name

    def __enter__(self) -> backend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        backend._chosen = self._previous

    @staticmethod
    def current() -> str:
        """The choice in force: "auto", "triton" or "reference"."""
        name = backend._chosen or os.environ.get("POINTREND_BACKEND") or "auto"
        _check_choice("POINTREND_BACKEND", name, BACKENDS)
        return name


def _uses_kernels(*tensors: Tensor, unfit: str | None = None) -> bool:
    """The one place that decides who computes.

    Args:
        tensors: the first one's device decides; fp64 is the reference's.
        unfit: why the kernels cannot do this call.

    Raises:
        RuntimeError: the kernels were asked for and cannot run.
    """
    name = backend.current()
    device = tensors[0].device
    if name == "reference" or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    if name == "auto" and (device.type not in _KERNEL_DEVICES or _is_exporting()):
        return False
    reason = unfit or _why_no_kernels(device.type, device.index)
    if reason is not None and name == "triton":
        raise RuntimeError(
            f"backend 'triton' was asked for a tensor on {device}, but {reason}; "
            "use 'auto' or 'reference'"
        )
    return reason is None


def _runs_head_kernels(
    fine_map: Tensor, coarse_map: Tensor, coords: Tensor | None, weights: Sequence[Tensor]
) -> bool:
    tensors = [fine_map, coarse_map, *weights, *([] if coords is None else [coords])]
    unfit = None if library is None else library.unsupported_head(fine_map, coarse_map, weights)
    return _uses_kernels(*tensors, unfit=unfit)


def _head_type(fine_map: Tensor, weights: Sequence[Tensor]) -> torch.dtype:
    """In which type the MLP computes: autocast's, where it is on, as for a convolution."""
    if torch.is_autocast_enabled(fine_map.device.type):
        return torch.get_autocast_dtype(fine_map.device.type)
    return weights[0].dtype


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_exporting() -> bool:
    """What is exported or traced must hold no kernels, so that it runs elsewhere."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or reference.is_exporting() or torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result
def _why_no_kernels(kind: str, index: int | None) -> str | None:
    """Why Triton kernels cannot run on a device, or None where they can."""
    if library is None:
        return "Triton is not installed"
    if library.INTERPRETED:
        return library.INTERPRETER_FAULT  # on the CPU, through Triton's interpreter
    if kind != "cuda":
        return "Triton kernels need a CUDA device (TRITON_INTERPRET=1 interprets them on the CPU)"
    if torch.version.hip is not None:
        return "the kernels have not been made for ROCm"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"they need compute capability 8.0, and this GPU has {major}.{minor}"
    return None


def _check_map(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], not {tuple(value.shape)}")
    if 0 in value.shape[2:]:
        raise ValueError(f"{name} must have at least one cell, not {tuple(value.shape)}")
    if not value.is_floating_point() and not (name == "input" and value.dtype in _LABEL_TYPES):
        rule = "floating point, integer or bool" if name == "input" else "floating point"
        raise TypeError(f"{name} must be {rule}, not {value.dtype}")


def _check_devices(**tensors: Tensor) -> None:
    (first, expected), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != expected.device:
            raise ValueError(
                f"{name} must be on {expected.device} as {first} is, not on {tensor.device}"
            )


def _check_logits(name: str, value: Tensor) -> None:
    _check_map(name, value)
    if value.shape[1] == 0:
        raise ValueError(f"{name} must have at least one class, not {tuple(value.shape)}")


def _check_coords(coords: Tensor, n: int) -> None:
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords must be a tensor, not {type(coords).__name__}")
    if coords.dim() not in (3, 4) or coords.shape[-1] != 2:
        raise ValueError(f"coords must be [N, P, 2] or [N, Hg, Wg, 2], not {tuple(coords.shape)}")
    if coords.shape[0] not in (1, n):
        raise ValueError(f"coords must be for {n} maps or shared (1), not for {coords.shape[0]}")
    if not coords.is_floating_point():
        raise TypeError(f"coords must be floating point in [0, 1], not {coords.dtype}")


def _check_layers(
    fine_map: Tensor,
    coarse_map: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    coarse_each_layer: bool,
) -> None:
    if len(weights) != len(biases) or not weights:
        raise ValueError(
            "weights and biases must be as many, and at least one, "
            f"not {len(weights)} and {len(biases)}"
        )
    if fine_map.shape[0] != coarse_map.shape[0]:
        raise ValueError(
            "fine_map and the coarse map must hold as many images, "
            f"not {fine_map.shape[0]} and {coarse_map.shape[0]}"
        )
    _check_devices(**{"fine_map": fine_map, "the coarse map": coarse_map})
    classes = coarse_map.shape[1]
    width = fine_map.shape[1] + classes
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        for name, value in (("weights", weight), ("biases", bias)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}[{i}] must be a tensor, not {type(value).__name__}")
            _check_devices(**{"fine_map": fine_map, f"{name}[{i}]": value})
        if weight.dim() not in (2, 3) or weight.shape[1] != width or weight.shape[2:].numel() != 1:
            raise ValueError(
                f"weights[{i}] must be [out, {width}] or [out, {width}, 1] for these maps, "
                f"not {tuple(weight.shape)}"
            )
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"biases[{i}] must be {(weight.shape[0],)}, not {tuple(bias.shape)}")
        width = weight.shape[0] + (classes if coarse_each_layer else 0)


def _check_crops(pictures: Tensor, places: Tensor, colours: Tensor) -> None:
    tensors = {"pictures": pictures, "places": places, "colours": colours}
    rules = ((4, torch.uint8), (8, torch.int64), (5, torch.float32))
    for (name, value), (columns, dtype) in zip(tensors.items(), rules, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {value.dtype}")
        if value.dim() != 2 or value.shape[1] != columns:
            raise ValueError(f"{name} must be [n, {columns}], not {tuple(value.shape)}")
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {value.stride()}")
    if pictures.storage_offset() % 4:  # the kernel reads a pixel as one number
        raise ValueError(
            "pictures must begin at a multiple of 4 bytes of its memory, "
            f"not at byte {pictures.storage_offset()}"
        )
    if places.shape[0] != colours.shape[0]:
        raise ValueError(
            "places and colours must be for as many crops, "
            f"not {places.shape[0]} and {colours.shape[0]}"
        )
    _check_devices(**tensors)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _check_sizes(image_size: tuple[int, int] | None, size: tuple[int, int] | None) -> None:
    for name, value in (("image_size", image_size), ("size", size)):
        if value is not None and (len(value) != 2 or not all(side >= 1 for side in value)):
            raise ValueError(f"{name} must be (height, width) of at least 1, not {tuple(value)}")


def _check_uncertainty(value: Uncertainty) -> None:
    if not callable(value):
        _check_choice("uncertainty", value, UNCERTAINTIES)
