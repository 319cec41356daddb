"""A model in the form that is exported, one tensor in, one out, and its trace.

What differs from `PointRend` is what a graph for all sizes needs: the most uncertain cells are
taken by TopK operations whose counts are constants, as TensorRT wants them, and of limited size.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pointrend_triton import reference
from pointrend_triton.data.transforms import MEAN, STD
from pointrend_triton.models.pointrend import PointRend
from pointrend_triton.predictor import fold_batch_norm

OUTPUTS = ("labels", "logits")
# up to 32 the coarsest map has one cell, which PyTorch exports apart; without an upper end
# compilers count in 32 bits
SIDES = (33, 8192)
BATCHES = (1, 1024)


class ExportError(ValueError):
    """What was asked for cannot be exported, or the file does not do what the model does."""


class Exportable(nn.Module):
    """A frozen copy of a model on the same device, BatchNorm folded.

    Args:
        model: stays as it is.
        output: "labels", uint8 up to 256 classes, else int64, or "logits", float32.
        steps, num_points: as in `PointRend.predict`.
        topk_limit: the most cells that one TopK takes; None for no limit.
        normalise: take uint8 RGB pictures, not normalised float32 images.
        dtype: of weights and activations.

    Raises:
        ExportError: an argument is out of its range, or is about the point head that the model
            does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: PointRend,
        *,
        output: str = "labels",
        steps: int | None = None,
        num_points: int | None = None,
        topk_limit: int | None = None,
        normalise: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ExportError(f"output must be one of {', '.join(OUTPUTS)}, not {output!r}")
        given = {"steps": (steps, 0), "num_points": (num_points, 1), "topk_limit": (topk_limit, 2)}
        for name, (value, least) in given.items():
            if value is not None and model.point_head is None:
                raise ExportError(f"{name} is for a point head, which this model does not have")
            if value is not None and value < least:
                raise ExportError(f"{name} must be at least {least}, not {value}")
        model = copy.deepcopy(model).eval().requires_grad_(False)
        fold_batch_norm(model)
        self.model = model.to(dtype=dtype)
        self.output, self.normalise, self.dtype = output, normalise, dtype
        self.steps, self.num_points = 0, 0
        if model.point_head is not None:
            config = model.point_head.config
            self.steps = config.subdivision_steps if steps is None else steps
            self.num_points = config.subdivision_num_points if num_points is None else num_points
        self.select = functools.partial(topk_on_grid, limit=topk_limit)
        self.device = next(model.parameters()).device
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values, device=self.device).view(3, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> labels [B, H, W] or logits [B, C, H, W]."""
        size = (images.shape[2], images.shape[3])
        if self.normalise:
            images = (images.float() - self.mean) / self.std
        fine_map, coarse = self.model.maps(images.to(self.dtype))
        refined = coarse
        for _ in range(self.steps):
            refined = self._refine_step(refined, coarse, fine_map)
        logits = reference.resample(refined.float(), size)
        # not `decode`: how that goes about it depends on the size
        return reference.logits_to_labels(logits) if self.output == "labels" else logits

    def _refine_step(self, refined: Tensor, coarse: Tensor, fine_map: Tensor) -> Tensor:
        point_head = self.model.point_head
        assert point_head is not None
        weights, biases = point_head.layers()
        refined, _ = reference.refine_step(
            refined,
            coarse,
            fine_map,
            weights,
            biases,
            num_points=self.num_points,
            coarse_each_layer=point_head.config.coarse_each_layer,
            select=self.select,
        )
        return refined


def trace(
    exportable: Exportable, size: tuple[int, int] | None, batch: int | None
) -> tuple[ExportedProgram, Any]:
    """A program for images of (height, width) `size` in batches of `batch`; None for any.

    Returns:
        the program, and the `dynamic_shapes` of its one input "images".

    Raises:
        ExportError: this PyTorch cannot leave sizes open.
    """
    dynamic: dict[int, Any] = {}
    if batch is None:
        dynamic[0] = Dim("batch", min=BATCHES[0], max=BATCHES[1])
    if size is None:
        dynamic |= {
            2: Dim("height", min=SIDES[0], max=SIDES[1]),
            3: Dim("width", min=SIDES[0], max=SIDES[1]),
        }
    # an open batch of 1 or equal sides would be taken for a rule
    shape = (batch or 2, 3, *(size or (256, 384)))
    dtype = torch.uint8 if exportable.normalise else torch.float32
    example = torch.zeros(shape, dtype=dtype, device=exportable.device)
    shapes = {"images": dynamic}
    try:
        with torch.no_grad():
            program = torch.export.export(
                exportable, (example,), dynamic_shapes=shapes, strict=False
            )
    except torch._dynamo.exc.UserError as error:
        if not dynamic:
            raise
        # 2.11 takes the parity of the sides before the max pooling for a rule
        raise ExportError(
            f"PyTorch {torch.__version__} cannot export this network for open sizes, which 2.13 "
            "can: give size and batch"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine do not belong in the file
    return program, shapes


def topk_on_grid(uncertainty: Tensor, k: int, *, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """`reference.topk_on_grid` in takes of at most `limit`, each without what was taken before.

    Of equally uncertain cells a take has those that `topk` prefers; where these are the first
    ones, as in ONNX, the cells and their order are those of a single take.

    Where height and width are open there are always k indices: on a smaller grid, the first one
    stands again for every cell that there is not.
    """
    height, width = uncertainty.shape[2:]
    cells = height * width
    is_open = isinstance(cells, torch.SymInt)
    k = k if is_open else min(k, cells)
    most = k if limit is None else min(limit, k)
    scores = uncertainty.flatten(1)
    if is_open:
        # as many cells as a take needs, less uncertain than any
        scores = F.pad(scores, (0, most), value=-torch.inf)
    taken: list[Tensor] = []
    for start in range(0, k, most):
        if taken:
            scores = scores.scatter(1, taken[-1], -torch.inf)
        taken.append(scores.topk(min(most, k - start), dim=1).indices)
    indices = torch.cat(taken, dim=1)
    if is_open:
        indices = torch.where(indices < cells, indices, indices[:, :1])
    return indices, reference.grid_coords(indices, height, width)
