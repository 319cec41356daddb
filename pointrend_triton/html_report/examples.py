"""The best, the median and the worst image, and the one that gained most: found and drawn."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

import cv2
import numpy as np
import numpy.typing as npt

from pointrend_triton.data import SegmentationDataset, TestTransform
from pointrend_triton.html_report.charts import swatch
from pointrend_triton.html_report.elements import element, percent
from pointrend_triton.inference import Scale, evaluation_mode
from pointrend_triton.metrics import IGNORE
from pointrend_triton.visualize import colorize, draw_points, error_map, overlay

if TYPE_CHECKING:
    from pointrend_triton.models.pointrend import PointRend

Image = npt.NDArray[np.uint8]

# the longer side of a picture in the page
LONGEST = 1000
# a picture narrower than this is enlarged by whole pixels, and kept as it is: JPEG would show
SMALL = 400
BLUE = (70, 150, 255)
ORANGE = (255, 150, 30)


@dataclass(frozen=True)
class Example:
    """One image and what was made of it.

    image uint8 RGB [H,W,3]; truth and, by method, predictions uint8 [H,W]; scores: mIoU by method;
    points (x, y) in 0..1 [k,2], those that the last step computed again.
    """

    role: str
    name: str
    scores: Mapping[str, float]
    image: Image
    truth: Image
    predictions: Mapping[str, Image]
    points: npt.NDArray[np.floating]


def choose(scores: Mapping[str, Mapping[int, float]]) -> dict[int, str]:
    """mIoU by method and image -> images worth a look, by the last method, and what they are."""
    judged = list(scores.values())[-1]
    finite = (index for index, score in judged.items() if not math.isnan(score))
    ranked = sorted(finite, key=lambda index: judged[index])
    if len(ranked) < 2:
        return dict.fromkeys(ranked, "The only image")
    roles = [("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])]
    if len(scores) == 2:
        before, after = scores.values()
        gains = {index: after[index] - before[index] for index in ranked}
        roles.append(("largest gain", max(ranked, key=lambda index: gains[index])))
    chosen: dict[int, list[str]] = {}
    for role, index in roles:
        chosen.setdefault(index, []).append(role)
    return {index: " and ".join(names).capitalize() for index, names in chosen.items()}


def collect(
    model: PointRend,
    dataset: SegmentationDataset,
    scale: Scale | None,
    scores: Mapping[str, Mapping[int, float]],
    predict: Callable[[int, str], Image],
) -> list[Example]:
    """Runs the model again on the few images that the report shows.

    Args:
        model: its mode is restored.
        dataset: with labels.
        scale: as in `evaluate_dataset`; the points are those of one pass at it.
        scores: mIoU by method ("coarse", "refined") and image.
        predict: index, method -> labels [H,W].
    """
    found = []
    for index, role in choose(scores).items():
        image, truth = dataset.load(index)
        found.append(
            Example(
                role,
                dataset.stem(index),
                {method: scores[method][index] for method in scores},
                image[..., ::-1],
                truth,
                {method: predict(index, method) for method in scores},
                refined_points(model, image, scale) if "refined" in scores else np.zeros((0, 2)),
            )
        )
    return found


def refined_points(model: PointRend, image: Image, scale: Scale | None) -> npt.NDArray[np.floating]:
    """The points [k,2] that the last subdivision step computes again; image BGR [H,W,3]."""
    device = next(model.parameters()).device
    with evaluation_mode(model):
        steps = model.refine_trace(TestTransform(scale)(image)[None].to(device))["points"]
    return steps[-1][0].float().cpu().numpy() if len(steps) else np.zeros((0, 2))


def figure(example: Example, classes: Sequence[str], palette: Image) -> Element:
    """The example with its pictures: compared by a slider if there are two methods."""
    closer = _detail(example, palette)
    example = _shrunk(example)
    image, truth = example.image, example.truth
    tiles = {"image": image, "truth": colorize(truth, palette)}
    for method, labels in example.predictions.items():
        tiles[f"{method} errors"] = error_map(labels, truth, image)
    if len(example.predictions) == 2:
        tiles["corrected and spoiled"] = changes(image, truth, *example.predictions.values())
    if len(example.points):
        tiles["refined points"] = draw_points(image // 2, example.points)
    shown = " → ".join(percent(score) for score in example.scores.values())
    here = set(np.unique([truth, *example.predictions.values()])) - {IGNORE}
    legend = [element("li", swatch(palette[c]), classes[c]) for c in sorted(here)]
    return element(
        "article",
        element("h3", example.role, element("span", f"{example.name}, mIoU {shown}")),
        element(
            "div",
            element("div", _slider(example, palette), element("ul", *legend, class_="legend")),
            element("div", *closer, *(_tile(*tile) for tile in tiles.items()), class_="tiles"),
            class_="example",
        ),
    )


def changes(image: Image, truth: Image, before: Image, after: Image) -> Image:
    """Over the darkened image, what the second prediction corrects, blue, and spoils, orange."""
    picture = image // 3
    counted = truth != IGNORE
    picture[(before != truth) & (after == truth) & counted] = BLUE
    picture[(before == truth) & (after != truth) & counted] = ORANGE
    return picture


def data_uri(picture: Image) -> str:
    """RGB [H,W,3] as the address of an image that is its own content."""
    kind, options = "png", [cv2.IMWRITE_PNG_COMPRESSION, 9]
    if picture.shape[1] >= SMALL:
        # no colour is shared among pixels: borders and points are one or two wide
        sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        kind, options = "jpeg", [cv2.IMWRITE_JPEG_QUALITY, 85, *sampling]
    ok, data = cv2.imencode(f".{kind}", np.ascontiguousarray(picture[..., ::-1]), options)
    if not ok:
        raise ValueError(f"a picture of shape {picture.shape} cannot be written as {kind}")
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}"


def _detail(example: Example, palette: Image) -> list[Element]:
    """Of a large image, the window that most pixels change in, at full size."""
    height, width = example.truth.shape
    if len(example.predictions) < 2 or width < SMALL:
        return []
    before, after = example.predictions.values()
    changed = ((before != after) & (example.truth != IGNORE)).astype(np.float32)
    across = max(SMALL // 3, width // 6)
    down = min(height, 3 * across // 4)
    # the sums over the windows that lie within the image, by their first pixels
    sums = cv2.boxFilter(changed, -1, (across, down), anchor=(0, 0), normalize=False)
    sums = sums[: height - down + 1, : width - across + 1]
    top, left = (int(at) for at in np.unravel_index(sums.argmax(), sums.shape))
    window = np.s_[top : top + down, left : left + across]
    cut = dataclasses.replace(
        example,
        image=example.image[window],
        truth=example.truth[window],
        predictions={method: labels[window] for method, labels in example.predictions.items()},
    )
    caption = element("figcaption", "where the refinement changes most")
    return [element("figure", _slider(cut, palette), caption, class_="detail")]


def _slider(example: Example, palette: Image) -> Element:
    """One above the other with a handle between them; side by side without JavaScript."""
    pictures = {
        method: _picture(overlay(example.image, labels, palette, 0.6), f"{method} segmentation")
        for method, labels in example.predictions.items()
    }
    layers = [
        element("div", picture, element("span", method, class_="tag"), class_="layer")
        for method, picture in pictures.items()
    ]
    if len(layers) == 1:
        return element("div", *layers, class_="single")
    label = " or ".join(pictures) + ": where one picture ends and the other begins"
    handle = element("input", type="range", value="50", step="0.5", aria_label=label, hidden=True)
    return element("div", *layers, handle, class_="slider")


def _tile(title: str, picture: Image) -> Element:
    button = element("button", _picture(picture, title), type="button", title="enlarge")
    return element("figure", button, element("figcaption", title))


def _picture(picture: Image, alt: str) -> Element:
    height, width = picture.shape[:2]
    kind = "small" if width < SMALL else None
    return element("img", src=data_uri(picture), alt=alt, width=width, height=height, class_=kind)


def _shrunk(example: Example) -> Example:
    """The example with its maps no longer than LONGEST, before anything is drawn on them."""
    height, width = example.truth.shape
    factor = LONGEST / max(height, width)
    if factor >= 1:
        return example
    size = max(1, round(width * factor)), max(1, round(height * factor))

    def shrink(picture: Image, interpolation: int = cv2.INTER_NEAREST) -> Image:
        picture = np.ascontiguousarray(picture)
        return np.asarray(cv2.resize(picture, size, interpolation=interpolation), np.uint8)

    return dataclasses.replace(
        example,
        image=shrink(example.image, cv2.INTER_AREA),
        truth=shrink(example.truth),
        predictions={method: shrink(labels) for method, labels in example.predictions.items()},
    )
