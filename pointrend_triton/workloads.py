"""Calls of every kernel at the sizes that matter: for tuning, the compile table and the tests.

On the "meta" device nothing is computed, and with `launch.recording()` every launch can be seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Workload = Callable[[torch.device, torch.dtype], None]


def refinement(
    classes: int,
    coarse_size: tuple[int, int],
    *,
    return_labels: bool = True,
    image_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    channels_last: bool = True,
) -> Workload:
    """Inference: two steps of 8196 points, with features as large as the coarse logits."""

    def run(device: torch.device, dtype: torch.dtype) -> None:
        from pointrend_triton.kernels import refine

        weights, biases = _layers(classes, device, dtype)
        refine.refine(
            _map(1, classes, coarse_size, device, dtype, channels_last),
            _map(1, 256, coarse_size, device, dtype, channels_last),
            weights,
            biases,
            steps=2,
            num_points=8196,
            coarse_each_layer=True,
            kind="top2_margin" if classes > 1 else "neg_abs",
            return_labels=return_labels,
            image_size=image_size,
            size=size,
            dtype=dtype,
            precision="ieee",
        )

    return run


def training(
    classes: int,
    batch: int,
    crop: tuple[int, int],
    *,
    deterministic: bool = False,
    precision: str = "ieee",
) -> Workload:
    """Choice of 2048 points, point head forward and backward, labels at the points."""

    def run(device: torch.device, dtype: torch.dtype) -> None:
        from pointrend_triton.kernels import point_head, point_sample, select, uncertainty

        size = (crop[0] // 4, crop[1] // 4)
        fine = _map(batch, 256, size, device, dtype)
        coarse = _map(batch, classes, size, device, dtype)
        labels = torch.randint(classes + 1, (batch, 1, *crop), device=device)
        candidates = torch.rand(batch, 3 * 2048, 2, device=device)
        scores = uncertainty.sampled(
            coarse, candidates, kind="top2_margin" if classes > 1 else "neg_abs"
        )
        coords = select.select_points(
            scores, candidates, torch.rand(batch, 512, 2, device=device), 1536
        )
        packed = point_head.pack(
            *_layers(classes, device, torch.float32),
            fine_channels=256,
            classes=classes,
            coarse_each_layer=True,
            dtype=dtype,
            precision=precision,
        )
        logits, saved = point_head.forward(fine, coarse, coords, packed, save=True)
        _sample(labels, coords, "nearest", torch.int64)
        d_fine, d_coarse, _, _ = point_head.mlp_backward(torch.randn_like(logits), saved, packed)
        for d_points, channels in ((d_fine, 256), (d_coarse, classes)):
            point_sample.backward(
                d_points,
                coords,
                shape=(batch, channels, *size),
                channels_last=True,
                dtype=dtype,
                mode="bilinear",
                padding_mode="zeros",
                align_corners=False,
                deterministic=deterministic,
            )

    return run


def masks(device: torch.device, dtype: torch.dtype) -> None:
    """Mask2Former: 12544 points of 100 masks, chosen from three times as many, and of the truth."""
    from pointrend_triton.kernels import point_sample, select, uncertainty

    logits = _map(100, 1, (256, 256), device, dtype)
    truth = torch.rand(100, 1, 1024, 1024, device=device) > 0.5
    candidates = torch.rand(100, 37632, 2, device=device)
    scores = uncertainty.sampled(logits, candidates, kind="neg_abs")
    random = torch.rand(100, 3136, 2, device=device)
    coords = select.select_points(scores, candidates, random, 9408)
    _sample(logits, coords, "bilinear", torch.float32)
    _sample(truth, coords, "bilinear", torch.float32)
    point_sample.backward(
        torch.randn(100, 1, 12544, device=device),
        coords,
        shape=(100, 1, 256, 256),
        channels_last=False,
        dtype=dtype,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
        deterministic=False,
    )
    # the matching costs: the same points for all masks
    shared = torch.rand(1, 12544, 2, device=device)
    _sample(logits, shared, "bilinear", torch.float32)
    _sample(truth, shared, "nearest", torch.bool)


def dense(device: torch.device, dtype: torch.dtype) -> None:
    """Labels and enlarged logits without a point head."""
    from pointrend_triton.kernels import decode, uncertainty

    grid = _map(1, 19, (1024, 2048), device, dtype, channels_last=False)
    decode.decode(grid)
    small = _map(1, 150, (128, 171), device, dtype)
    decode.decode(small, (512, 683))
    decode.decode(small, (512, 683), (768, 1024))
    uncertainty.upsample(small, 4, kind="top2_margin", return_logits=True, return_labels=True)


def rows(device: torch.device, dtype: torch.dtype) -> None:
    """The largest of short rows, and of the cells of small maps."""
    from pointrend_triton.kernels import select

    select.topk(torch.rand(8, 6144, device=device, dtype=dtype), 1536)
    select.topk_on_grid(torch.rand(16, 1, 56, 56, device=device, dtype=dtype), 784)


def features(device: torch.device, dtype: torch.dtype) -> None:
    """Sampling of feature maps alone, in both layouts and all modes, and its backward."""
    from pointrend_triton.kernels import point_sample

    coords = torch.rand(8, 65536, 2, device=device)
    for channels_last in (True, False):
        input = _map(8, 256, (128, 256), device, dtype, channels_last)
        for mode in ("bilinear", "nearest"):
            _sample(input, coords, mode, dtype)
        point_sample.backward(
            torch.randn(8, 256, 65536, device=device, dtype=dtype),
            coords,
            shape=(8, 256, 128, 256),
            channels_last=channels_last,
            dtype=dtype,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
            deterministic=False,
        )


def crops(device: torch.device, dtype: torch.dtype) -> None:
    """A training batch of Cityscapes, cut from pictures in device memory."""
    from pointrend_triton.kernels import augment

    pictures = torch.randint(256, (8 * 1024 * 2048, 4), dtype=torch.uint8, device=device)
    place = torch.tensor([0, 1024, 2048, 1331, 2662, 300, 900, 1], device=device).repeat(8, 1)
    place[:, 0] += torch.arange(8, device=device) * (1024 * 2048)
    colours = torch.tensor([11.0, 1.2, 0.8, 7.0, 1.0], device=device).repeat(8, 1)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    augment.augment(pictures, place, colours, (512, 1024), mean, std)


WORKLOADS: dict[str, Workload] = {
    "cityscapes": refinement(19, (256, 512)),
    "cityscapes logits": refinement(19, (256, 512), return_labels=False),
    "cityscapes contiguous": refinement(19, (256, 512), channels_last=False),
    "ade20k": refinement(150, (128, 171)),
    "ade20k resized": refinement(150, (128, 171), image_size=(512, 683), size=(768, 1024)),
    "binary": refinement(1, (256, 512)),
    "cityscapes training": training(19, 8, (512, 1024)),
    "cityscapes training tf32": training(19, 8, (512, 1024), precision="tf32"),
    "cityscapes training deterministic": training(19, 8, (512, 1024), deterministic=True),
    "ade20k training": training(150, 16, (512, 512)),
    "binary training": training(1, 8, (512, 512)),
    "masks": masks,
    "dense": dense,
    "rows": rows,
    "features": features,
    "crops": crops,
}


def _map(
    n: int,
    channels: int,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool = True,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(n, channels, *size, device=device, dtype=dtype).to(memory_format=layout)


def _layers(
    classes: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of the published point head."""
    shapes = [(256, 256 + classes)] * 3 + [(classes, 256 + classes)]
    weights = [torch.randn(*shape, device=device, dtype=dtype) / 16 for shape in shapes]
    return weights, [torch.zeros(shape[0], device=device, dtype=dtype) for shape in shapes]


def _sample(input: Tensor, coords: Tensor, mode: str, out_dtype: torch.dtype) -> None:
    from pointrend_triton.kernels import point_sample

    point_sample.forward(
        input,
        coords,
        mode=mode,
        padding_mode="zeros",
        align_corners=False,
        out_dtype=out_dtype,
    )
