"""The whole refinement of inference, composed of the other kernels: no launch of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointrend_triton.kernels import decode, point_head, select, uncertainty


def refine(
    coarse: Tensor,
    fine_map: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    steps: int,
    num_points: int,
    coarse_each_layer: bool,
    kind: str,
    return_labels: bool,
    image_size: tuple[int, int] | None,
    size: tuple[int, int] | None,
    dtype: torch.dtype,
    precision: str,
) -> Tensor:
    """Logits [N, C, 2^steps H, 2^steps W], or labels at `size`, `image_size` or that grid.

    Launches: one for the weights; for each step one to enlarge and score, those of `select`, one
    for the points. Labels of the grid itself are written in the last step in place of logits, so
    that the logits of the finest grid never exist; other sizes are decoded from them.

    Args:
        dtype, precision: in which the MLP computes, as in `point_head`.
    """
    height, width = coarse.shape[2:]
    grid = (height << steps, width << steps)
    is_grid = image_size in (None, grid) and size in (None, grid)
    packed = point_head.pack(
        weights,
        biases,
        fine_channels=fine_map.shape[1],
        classes=coarse.shape[1],
        coarse_each_layer=coarse_each_layer,
        dtype=dtype,
        precision=precision,
    )
    logits: Tensor | None = coarse
    labels = None
    for step in range(steps):
        assert logits is not None
        height, width = 2 * height, 2 * width
        to_labels = return_labels and is_grid and step == steps - 1
        scores, logits, labels = uncertainty.upsample(
            logits, 2, kind=kind, return_logits=not to_labels, return_labels=to_labels
        )
        count = min(num_points, height * width)
        if count > 0:
            indices = select.topk(scores.flatten(1), count)
            point_head.refine_cells(
                fine_map,
                coarse,
                indices,
                (height, width),
                packed,
                logits=logits,
                labels=labels,
            )
    if labels is not None:
        return labels
    assert logits is not None
    if return_labels:
        return decode.decode(logits, image_size, size)
    return logits.clone() if steps == 0 else logits
