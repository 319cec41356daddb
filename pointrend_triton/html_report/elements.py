"""HTML as a tree: what comes from files is text in it, and is escaped when the tree is written."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element, tostring

Child = Element | str
Attribute = str | float | bool | None


def element(tag: str, *children: Child, **attributes: Attribute) -> Element:
    """An element with text and elements in it.

    Of an attribute's name, a last underscore goes and others become hyphens (`class_`,
    `aria_label`). None and False leave the attribute out, True gives it no value.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            name = name.removesuffix("_").replace("_", "-")
            made.set(name, "" if value is True else str(value))
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + child
        else:
            made.text = (made.text or "") + child
    return made


def document(root: Element) -> bytes:
    """The page as UTF-8. Characters that UTF-8 lacks, as in some file names, become "?"."""
    text = tostring(root, encoding="unicode", method="html")
    return b"<!DOCTYPE html>\n" + text.encode("utf-8", "replace") + b"\n"


def table(head: list[Child], rows: list[list[Child]], **attributes: Attribute) -> Element:
    """A table whose first column names the rows; it scrolls sideways in a box of its own."""
    heads = [element("th", cell, scope="col") for cell in head]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    made = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *body),
        **attributes,
    )
    # the keyboard scrolls what it can reach
    return element("div", made, class_="scroll", tabindex="0")


def percent(value: float) -> str:
    """Two decimals; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def gain(before: float, after: float) -> str:
    """The difference with its sign; a dash where one is NaN."""
    difference = after - before
    return "–" if math.isnan(difference) else f"{difference:+.2f}".replace("-", "−")
