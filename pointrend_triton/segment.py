"""One picture through the network, whole or in tiles, and what can be drawn of the result."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pointrend_triton import reference, tiles, visualize
from pointrend_triton.data import DataError, keep_ratio_size
from pointrend_triton.data.transforms import normalise, resize
from pointrend_triton.memory import available_memory
from pointrend_triton.predictor import Predictor

Image = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]
Size = tuple[int, int]

KINDS = ("overlay", "color", "labels", "points", "uncertainty", "compare")
# these need to see what the refinement did
TRACED = frozenset(("points", "uncertainty"))


@dataclass(frozen=True)
class Prepared:
    """A picture ready for the network.

    Attributes:
        image: as it was read, uint8 BGR [H,W,3].
        resized: the same, fitted into the scale: [h,w,3].
        inputs: `resized` normalised, float32 [1,3,h,w]; None if it is too large for one pass.
        choices: sizes of tiles to try in turn; one as long as the picture is a single pass.
    """

    image: Image
    resized: Image
    inputs: Tensor | None
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Prediction:
    """What the network made of a picture; what was not asked for is None.

    Attributes:
        image: uint8 BGR [H,W,3].
        labels, coarse: class indices [H,W], refined and unrefined.
        points: (x, y) in 0..1 of what the last step computed again, [k,2].
        uncertainty: of the coarse logits, float32 [h,w] at the size of the network's input.
    """

    image: Image
    labels: Array
    coarse: Array | None = None
    points: Array | None = None
    uncertainty: Array | None = None


class Segmenter:
    """Predicts pictures, those that do not fit into memory in tiles.

    Args:
        predictor: the network.
        kinds: which of `KINDS` will be drawn.
        scale: the longer and the shorter side to fit pictures into; None keeps their size.
        tile: "auto" tries a single pass where it should fit into memory, else the largest tiles
            that do; "none" always makes a single pass; a number is the length of a tile's sides.
        steps, num_points: of the subdivision, as in `PointRend.predict`.
        refine: False only enlarges the coarse prediction.
        on_tile: called before each tile with its number, from 1, and how many there are.
    """

    def __init__(
        self,
        predictor: Predictor,
        kinds: tuple[str, ...] = ("overlay",),
        *,
        scale: Size | None = None,
        tile: int | str = "auto",
        steps: int | None = None,
        num_points: int | None = None,
        refine: bool = True,
        on_tile: Callable[[int, int], None] = lambda number, count: None,
    ) -> None:
        self.predictor, self.kinds, self.scale, self.tile = predictor, frozenset(kinds), scale, tile
        self.subdivision = {"steps": steps, "num_points": num_points}
        self.refine, self.on_tile = refine, on_tile
        # half: the pictures that are read and written meanwhile need some too
        self.memory = available_memory(predictor.device) // 2

    def prepare(self, image: Image) -> Prepared:
        """A picture uint8 BGR [H,W,3], resized and normalised; needs no network."""
        resized, height, width = image, *image.shape[:2]
        if self.scale is not None:
            size = keep_ratio_size(height, width, self.scale)
            resized = resize(image, size, cv2.INTER_LINEAR)
        height, width = resized.shape[:2]
        if self.tile == "auto":
            config, dtype = self.predictor.model.config, self.predictor.dtype
            choices = tiles.choices(config, height, width, self.memory, dtype)
        else:
            choices = (max(height, width) if self.tile == "none" else int(self.tile),)
        whole = choices[0] >= max(height, width)
        inputs = torch.from_numpy(normalise(resized))[None] if whole else None
        return Prepared(image, resized, inputs, choices)

    def __call__(self, prepared: Prepared) -> Prediction:
        """The prediction at the picture's own size. DataError if the memory is too small for it."""
        for tile in prepared.choices:
            try:
                return self._predict(prepared, tile)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
            # not within the block, where the failed pass still holds its memory
            torch.cuda.empty_cache()
        height, width = prepared.resized.shape[:2]
        raise DataError(
            f"{width}x{height} pixels do not fit into the memory of {self.predictor.device}, "
            f"with a tile of {prepared.choices[-1]}; --tile auto or 256, --dtype bfloat16 and a "
            "smaller --scale need less"
        )

    def _predict(self, prepared: Prepared, tile: int) -> Prediction:
        labels = self._labels(prepared, tile, self.refine)
        coarse = self._labels(prepared, tile, False) if "compare" in self.kinds else None
        points, uncertainty = None, None
        if TRACED & self.kinds:
            points, uncertainty = self._trace(prepared.resized, tile)
        return Prediction(prepared.image, labels, coarse, points, uncertainty)

    def _labels(self, prepared: Prepared, tile: int, refine: bool) -> Array:
        """Class indices [H,W] at the picture's own size."""
        height, width = prepared.resized.shape[:2]
        size = prepared.image.shape[0], prepared.image.shape[1]
        if prepared.inputs is not None and tile >= max(height, width):
            found = self.predictor(prepared.inputs, size, refine=refine, **self.subdivision)
            return found[0].cpu().numpy()

        count = len(tiles.starts(height, tile)) * len(tiles.starts(width, tile))
        numbers = itertools.count(1)

        def logits(box: tiles.Box) -> Tensor:
            self.on_tile(next(numbers), count)
            inputs = _normalised(prepared.resized[box])
            return self.predictor.logits(inputs, refine=refine, **self.subdivision)[0]

        return tiles.labels(logits, height, width, tile, size).numpy()

    @torch.no_grad()
    def _trace(self, resized: Image, tile: int) -> tuple[Array, Array]:
        """The points [k,2] of the last step and the uncertainty [h,w], of all tiles."""
        height, width = resized.shape[:2]
        points = [np.zeros((0, 2), np.float32)]

        def uncertainty(box: tiles.Box) -> Tensor:
            rows, columns = box
            inputs = _normalised(resized[box]).to(self.predictor.device, self.predictor.dtype)
            trace: Any = self.predictor.model.refine_trace(inputs, **self.subdivision)
            if trace["points"]:
                local = trace["points"][-1][0].float().cpu().numpy()
                extent = columns.stop - columns.start, rows.stop - rows.start
                offset = columns.start, rows.start
                points.append((local * extent + offset) / (width, height))
            score = reference.score(trace["coarse"].float())
            return reference.resample(score, (inputs.shape[2], inputs.shape[3]))[0]

        result = np.empty((height, width), np.float32)
        for first, band in tiles.blend(uncertainty, height, width, tile):
            result[first : first + band.shape[1]] = band[0].cpu().numpy()
        return np.concatenate(points), result


def draw(kind: str, prediction: Prediction, colours: Image) -> Array:
    """One of `KINDS` of a prediction, as `visualize.save_png` writes it.

    colours: RGB [C,3]. "labels" are class indices [H,W], uint8 up to 256 classes, else uint16; the
    others RGB [H,W,3], "compare" wider.
    """
    if kind == "color":
        return colours[prediction.labels]
    if kind == "labels":
        return prediction.labels.astype(np.uint8 if len(colours) <= 256 else np.uint16)
    image = np.asarray(cv2.cvtColor(prediction.image, cv2.COLOR_BGR2RGB), np.uint8)
    if kind == "overlay":
        return _overlay(image, prediction.labels, colours)
    if kind == "compare":
        assert prediction.coarse is not None
        sides = [
            _overlay(image, labels, colours) for labels in (prediction.coarse, prediction.labels)
        ]
        return visualize.panel(sides, ["coarse", "refined"])
    if kind == "points":
        assert prediction.points is not None
        # still to be seen when a large picture is looked at as a whole
        radius = max(image.shape) // 2000
        return visualize.draw_points(image // 2, prediction.points, radius=radius)
    assert prediction.uncertainty is not None
    heat = visualize.uncertainty_heatmap(prediction.uncertainty)
    return resize(heat, (image.shape[0], image.shape[1]), cv2.INTER_LINEAR)


def _overlay(image: Image, labels: Array, colours: Image) -> Image:
    # as visualize.overlay, in 8 bits; a prediction has no ignored pixels
    return np.asarray(cv2.addWeighted(image, 0.5, colours[labels], 0.5, 0), np.uint8)


def _out_of_memory(error: Exception) -> bool:
    # PyTorch has a class of its own for a GPU's memory alone
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in str(error)
    )


def _normalised(image: Image) -> Tensor:
    return torch.from_numpy(normalise(image))[None]
