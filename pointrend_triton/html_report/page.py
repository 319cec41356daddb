"""The page: heading, scores, images, classes, confusions, and how it all came to be."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import numpy.typing as npt

from pointrend_triton.html_report.charts import Counts, bars, largest_confusions, matrix
from pointrend_triton.html_report.elements import Child, document, element, gain, percent, table
from pointrend_triton.html_report.examples import Example, figure
from pointrend_triton.html_report.style import SCRIPT, STYLE
from pointrend_triton.metrics import BAND_WIDTHS
from pointrend_triton.report import to_json
from pointrend_triton.visualize import write_atomic

MEANING = (
    "Percentages over all these images, at their own size. Boundary IoU counts the pixels within "
    "2\u00a0% of the image diagonal of a class's border, band mIoU those within so many pixels of "
    "a change of class in the truth; both leave out what is near an ignored pixel."
)
PICTURES = (
    "Chosen by the mIoU of {method} in each image, over the classes in its truth or prediction. "
    "Errors are red, ignored pixels grey. {changes}{points}The small pictures open at a click."
)
CHANGES = "What the refinement corrects is blue, what it spoils orange. "
POINTS = "Yellow are the points that the last step of a single pass computes again. "
MATRIX = (
    "Of {method}: each row a true class, each column what its pixels were taken for. Right is "
    "blue, wrong is orange, stronger is more; point at a cell to read it."
)
# more classes than this scroll in a box of their own
LONG = 40


def write_report(
    folder: Path,
    record: Mapping[str, Any],
    confusions: Mapping[str, Counts],
    examples: Sequence[Example],
    palette: npt.NDArray[np.uint8],
) -> Path:
    """Writes index.html, whole or not at all -> its path. Folders are made.

    Args:
        folder: where to.
        record: what `evaluate.py --json` writes, the model's configuration a ModelConfig; its
            "results" hold one method or two, the second judged against the first.
        confusions: counts [C,C], truth by prediction, of the same methods.
        examples: images to show; may be empty.
        palette: uint8 RGB [C,3].

    Raises OSError if the file cannot be written.
    """
    path = folder / "index.html"
    write_atomic(path, document(render(record, confusions, examples, palette)))
    return path


def render(
    record: Mapping[str, Any],
    confusions: Mapping[str, Counts],
    examples: Sequence[Example],
    palette: npt.NDArray[np.uint8],
) -> Element:
    """The page of `write_report`."""
    results = record["results"]
    method = list(results)[-1]
    classes = [str(row["name"]) for row in results[method]["classes"]]
    sections: dict[str, list[Child]] = {
        "Scores": [_summary(results), element("p", MEANING, class_="note")],
        "Images": _images(examples, classes, palette, method),
        "Classes": [_classes(results, palette)],
        "Confusions": _confusions(classes, confusions, method),
        "How it was made": _origin(record),
    }
    links = [element("a", name, href=f"#{_anchor(name)}") for name in sections]
    main = [
        element("section", element("h2", name), *content, id=_anchor(name))
        for name, content in sections.items()
    ]
    return element(
        "html",
        _head(record),
        element(
            "body",
            element("header", *_heading(record), element("nav", *links)),
            element("main", *main),
            element("script", SCRIPT),
        ),
        lang="en",
    )


def _head(record: Mapping[str, Any]) -> Element:
    # a second wall behind the escaping: this script alone may run, and nothing is loaded
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", _title(record)),
        element("style", STYLE),
    )


def _title(record: Mapping[str, Any]) -> str:
    model, data = record["model"], record["data"]
    name = "PointRend" if model.point_head else "Semantic FPN"
    return f"{name} R-{model.depth} on {data['dataset']} {data['split']}"


def _heading(record: Mapping[str, Any]) -> list[Child]:
    data, protocol = record["data"], record["protocol"]
    evaluated = next(iter(record["results"].values()))["images"]
    scale = protocol["scale"]
    facts = [
        record["config"],
        record["checkpoint"]["file"],
        f"{evaluated} of {data['images']} images",
        "six scales and flip" if protocol["multi_scale_flip"] else "single scale",
        f"fitted into {max(scale)}x{min(scale)}" if scale else "at their own size",
        *(["bfloat16 autocast"] if protocol["amp"] else []),
        str(record["date"])[:10],
    ]
    return [
        element("h1", _title(record)),
        element("ul", *(element("li", fact) for fact in facts), class_="facts"),
    ]


def _summary(results: Mapping[str, Any]) -> Element:
    values = list(results.values())
    scores = {
        "mIoU": "miou",
        "mAcc": "macc",
        "aAcc": "aacc",
        "Boundary IoU": "mean_boundary_iou",
    }
    rows = {name: [float(value[key]) for value in values] for name, key in scores.items()}
    for width in BAND_WIDTHS:
        rows[f"band mIoU, {width}\u00a0px"] = [float(value["band_miou"][width]) for value in values]
    speeds = [value["speed"] for value in values]
    if all(speeds):
        rows["images/s"] = [speed["images_per_second"] for speed in speeds]
        rows["median ms"] = [speed["median_ms"] for speed in speeds]
        memory = f"peak MiB, {speeds[0]['peak_memory_of']}"
        rows[memory] = [speed["peak_memory_mib"] for speed in speeds]
    compared = len(values) == 2
    lines: list[list[Child]] = [
        [name, *map(percent, row), *([gain(*row)] if compared else [])]
        for name, row in rows.items()
    ]
    return table(["", *results, *(["gain"] if compared else [])], lines, class_="summary")


def _images(
    examples: Sequence[Example],
    classes: Sequence[str],
    palette: npt.NDArray[np.uint8],
    method: str,
) -> list[Child]:
    if not examples:
        return [element("p", "No image has a pixel that is not ignored.")]
    note = PICTURES.format(
        method=method,
        changes=CHANGES if len(examples[0].predictions) == 2 else "",
        points=POINTS if len(examples[0].points) else "",
    )
    shown = (figure(example, classes, palette) for example in examples)
    return [element("p", note, class_="note"), *shown]


def _classes(results: Mapping[str, Any], palette: npt.NDArray[np.uint8]) -> Element:
    charts = {"IoU": "iou", "Boundary IoU": "boundary_iou"}
    drawn = [bars(title, key, results, palette) for title, key in charts.items()]
    return element("div", *drawn, class_="columns long" if len(palette) > LONG else "columns")


def _confusions(
    classes: Sequence[str], confusions: Mapping[str, Counts], method: str
) -> list[Child]:
    return [
        element("p", MATRIX.format(method=method), class_="note"),
        element("output", class_="readout", aria_live="polite"),
        element(
            "div",
            matrix(classes, confusions[method]),
            element("div", element("h3", "The largest"), largest_confusions(classes, confusions)),
            class_="beside",
        ),
    ]


def _origin(record: Mapping[str, Any]) -> list[Child]:
    checkpoint, protocol = record["checkpoint"], record["protocol"]
    # absent ones are None
    versions = [f"{name} {version}" for name, version in record["versions"].items() if version]
    facts: dict[str, Child | None] = {
        "command": element("code", record["command"]),
        "checkpoint": checkpoint["file"],
        "sha256": element("code", checkpoint["sha256"]),
        "iteration": checkpoint["iteration"],
        "only": protocol["only"],
        "limit": protocol["limit"],
        "device": record["device"],
        "system": record["system"],
        "driver": record["driver"],
        "versions": ", ".join(versions),
        "commit": record["commit"],
        "date": record["date"],
    }
    pairs = [
        element("div", element("dt", name), element("dd", _child(value)))
        for name, value in facts.items()
        if value is not None
    ]
    model = element("pre", to_json({"model": record["model"]}).decode(), tabindex="0")
    return [
        element("dl", *pairs),
        element("details", element("summary", "The model's configuration"), model),
    ]


def _child(value: Any) -> Child:
    return value if isinstance(value, Element) else str(value)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
