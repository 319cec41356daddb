"""Scores for people (tables in plain text) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pointrend_triton.inference import Speed
from pointrend_triton.metrics import BAND_WIDTHS, Scores, SegmentationMetrics

GAP = "  "


def tables(
    classes: Sequence[str], scores: Mapping[str, Scores], speeds: Mapping[str, Speed]
) -> str:
    """Two tables, one line per class and one per overall score, with a column for each method.

    Args:
        classes: the names of the classes.
        scores: by the name of the method ("coarse", "refined"); of two, the gain is shown too.
        speeds: the same; may be empty.
    """
    methods = list(scores)
    columns = [*methods, "gain"] if len(methods) == 2 else methods
    of_class = {
        "IoU": [score["iou"] for score in scores.values()],
        "Acc": [score["acc"] for score in scores.values()],
        "Boundary IoU": [score["boundary_iou"] for score in scores.values()],
    }
    heads = columns * len(of_class)
    groups = {kind: len(columns) for kind in of_class}
    class_rows = [
        [name, *(cell for values in of_class.values() for cell in _cells([v[c] for v in values]))]
        for c, name in enumerate(classes)
    ]
    overall = {
        "mIoU": [score["miou"] for score in scores.values()],
        "mAcc": [score["macc"] for score in scores.values()],
        "aAcc": [score["aacc"] for score in scores.values()],
        "mean Boundary IoU": [score["mean_boundary_iou"] for score in scores.values()],
    }
    for width in BAND_WIDTHS:
        overall[f"band mIoU, {width} px"] = [s["band_miou"][width] for s in scores.values()]
    if speeds:
        overall["images/s"] = [speed["images_per_second"] for speed in speeds.values()]
        overall["median ms"] = [speed["median_ms"] for speed in speeds.values()]
        memory_of = next(iter(speeds.values()))["peak_memory_of"]
        overall[f"peak MiB, {memory_of}"] = [s["peak_memory_mib"] for s in speeds.values()]
    overall_rows = [[name, *_cells(values)] for name, values in overall.items()]
    return "\n\n".join(
        [_table(["class", *heads], class_rows, groups), _table(["", *columns], overall_rows)]
    )


def result(
    classes: Sequence[str], metrics: SegmentationMetrics, speed: Speed | None = None
) -> dict[str, Any]:
    """The scores, in percent and not rounded, and the counts they were made of."""
    scores, confusion = metrics.compute(), metrics.confusion
    truth, predicted, found = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    of_class = {
        "name": classes,
        "iou": scores["iou"],
        "acc": scores["acc"],
        "boundary_iou": scores["boundary_iou"],
        "pixels": truth,
        "predicted": predicted,
        "intersection": found,
        "boundary_intersection": metrics.boundary_intersection,
        "boundary_union": metrics.boundary_union,
    }
    overall = {key: scores[key] for key in ("miou", "macc", "aacc", "mean_boundary_iou")}
    return {
        "images": metrics.images,
        **overall,
        "band_miou": scores["band_miou"],
        "speed": speed,
        "classes": [
            dict(zip(of_class, row, strict=True)) for row in zip(*of_class.values(), strict=True)
        ],
    }


def to_json(record: Mapping[str, Any]) -> bytes:
    """Indented JSON of containers, dataclasses and NumPy values; NaN, which JSON lacks, is null."""
    return (json.dumps(_plain(record), indent=2, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(values: Iterable[float]) -> list[str]:
    """The values as text; of two also by how much the second is larger. NaN is a dash."""
    values = [float(value) for value in values]
    cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
    if len(values) == 2:
        gain = values[1] - values[0]
        cells.append("-" if math.isnan(gain) else f"{gain:+.2f}")
    return cells


def _table(head: list[str], rows: list[list[str]], groups: Mapping[str, int] | None = None) -> str:
    """Text in columns, the first flush left, the others flush right.

    `groups`: titles above the columns after the first, and how many columns each spans.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    spans, start = [widths[0]], 1
    for title, count in (groups or {}).items():
        span = sum(widths[start : start + count]) + len(GAP) * (count - 1)
        # a title longer than its columns widens the first of them
        widths[start] += max(0, len(title) - span)
        spans.append(max(len(title), span))
        start += count
    lines = [head, ["-" * width for width in widths], *rows]
    titles = [_line(["", *groups], spans)] if groups else []
    return "\n".join([*titles, *(_line(line, widths) for line in lines)])


def _line(cells: list[str], widths: list[int]) -> str:
    others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return GAP.join([cells[0].ljust(widths[0]), *others])
