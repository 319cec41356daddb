"""Bars for the classes, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import numpy.typing as npt

from pointrend_triton.html_report.elements import Child, element, gain, percent, table

Counts = npt.NDArray[np.int64]

# confusions below this share of their class stay out of the picture
VISIBLE = 0.001
LARGEST = 12
# longer class names are cut in the matrix, where they stand on their side
NAME_LENGTH = 16


def bars(
    title: str, key: str, results: Mapping[str, Any], palette: npt.NDArray[np.uint8]
) -> Element:
    """A table with a bar per class and method, the best class of the last method first.

    Args:
        title: what the bars show.
        key: of each class in `results`, a percentage: "iou" or "boundary_iou".
        results: by method, as `report.result` gives them.
        palette: uint8 RGB [C,3].
    """
    methods = list(results)
    columns = list(zip(*(results[method]["classes"] for method in methods), strict=True))
    # NaN, a class that was neither there nor predicted, comes last
    order = np.argsort([-classes[-1][key] for classes in columns], kind="stable")
    rows: list[list[Child]] = []
    for c in order:
        values = [float(of_class[key]) for of_class in columns[c]]
        drawn = [
            element("i", class_=method, style=f"width:{value:.2f}%")
            for method, value in zip(methods, values, strict=True)
            if value == value
        ]
        name = element("span", swatch(palette[c]), str(columns[c][0]["name"]), class_="name")
        if not columns[c][0]["pixels"]:
            name.append(element("small", "absent"))
        cells: list[Child] = [name, element("span", *drawn, class_="bar", aria_hidden="true")]
        cells += [percent(value) for value in values]
        rows.append([*cells, gain(*values)] if len(methods) == 2 else cells)
    heads: list[Child] = ["class", element("span", "bar", class_="unseen")]
    heads += [element("span", method, class_=f"key {method}") for method in methods]
    heads += ["gain"] if len(methods) == 2 else []
    made = table(heads, rows, class_="bars")
    made.set("aria-label", title)
    return element("div", element("h3", title), made)


def swatch(color: Sequence[int] | npt.NDArray[np.uint8]) -> Element:
    """A small square of a class's colour, RGB."""
    red, green, blue = (int(part) for part in color)
    return element("i", class_="swatch", style=f"background:rgb({red},{green},{blue})")


def matrix(classes: Sequence[str], confusion: Counts) -> Element:
    """The confusion matrix [C,C], truth by prediction, each row as shares of its class."""
    side = next(
        side for side, most in ((34, 12), (26, 24), (14, 60), (6, 255)) if len(classes) <= most
    )
    named, numbered = side >= 14, side >= 26
    short = [
        name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…" for name in classes
    ]
    margin = 12 + round(7.2 * max(map(len, short))) if named else 16
    extent = margin + side * len(classes) + 2
    drawing = element(
        "svg",
        class_="matrix",
        width=extent,
        height=extent,
        viewBox=f"0 0 {extent} {extent}",
        role="img",
        aria_label="confusion matrix: a row for each true class, a column for each predicted one",
    )
    for c, name in enumerate(short if named else []):
        at = margin + side * (c + 0.5)
        drawing.append(element("text", name, x=margin - 6, y=at, class_="row"))
        turned = f"translate({at} {margin - 6}) rotate(-90)"
        drawing.append(element("text", name, transform=turned))
    length = side * len(classes)
    drawing.append(
        element("rect", x=margin, y=margin, width=length, height=length, class_="ground")
    )
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for row, column in np.argwhere(shares >= VISIBLE):
        share = float(shares[row, column])
        # by the root, or the small ones, which are most, could not be told from none
        strength = share**0.5
        x, y = margin + side * int(column), margin + side * int(row)
        said = f"{classes[row]} taken for {classes[column]}" if row != column else classes[row]
        cell = element(
            "g",
            element("title", f"{said}: {100 * share:.1f} % of its pixels"),
            element("rect", x=x, y=y, width=side, height=side, fill_opacity=f"{strength:.2f}"),
            class_="right" if row == column else "wrong",
        )
        if numbered and share >= 0.005:
            weight = "strong" if strength > 0.75 else None
            number = f"{100 * share:.0f}"
            cell.append(element("text", number, x=x + side / 2, y=y + side / 2, class_=weight))
        drawing.append(cell)
    return element("div", drawing, class_="scroll", tabindex="0")


def largest_confusions(classes: Sequence[str], confusions: Mapping[str, Counts]) -> Element:
    """The pairs of classes that most pixels of the last method's errors are in, as a table."""
    wrong = {
        method: np.where(np.eye(len(classes), dtype=bool), 0, confusion)
        for method, confusion in confusions.items()
    }
    last = list(wrong.values())[-1]
    largest = np.argsort(-last, axis=None, kind="stable")[:LARGEST]
    pairs = [divmod(int(pair), len(classes)) for pair in largest]
    rows: list[list[Child]] = []
    for truth, guess in pairs:
        if last[truth, guess]:
            cells = [
                percent(100 * counts[truth, guess] / max(1, int(confusions[method][truth].sum())))
                for method, counts in wrong.items()
            ]
            errors = percent(100 * last[truth, guess] / int(last.sum()))
            rows.append([classes[truth], classes[guess], *cells, errors])
    if not rows:
        return element("p", "No pixel is wrong.")
    shares = [f"{method}, % of the class" for method in wrong]
    return table(["truth", "taken for", *shares, "% of all errors"], rows, class_="confusions")
