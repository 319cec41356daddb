"""What `benchmarks.end_to_end` measured, for people: a table, the goals in words, a picture.

Rows are dictionaries, as in the result file, with the fields of `end_to_end.Row`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt

Row = Mapping[str, Any]
COLUMNS = {
    "model": "{}",
    "variant": "{}",
    "batch": "{}",
    "images_per_second": "{:.1f}",
    "ms_median": "{:.2f}",
    "ms_p99": "{:.2f}",
    "device_ms": "{:.3f}",
    "peak_memory_mib": "{:.0f}",
    "agreement": "{:.3%}",
}
# Okabe and Ito's, which colour-blind readers tell apart: with the point head, without, in batches
COLORS = ("#0072B2", "#999999", "#009E73")


def table(rows: Sequence[Row], left_out: Sequence[str]) -> str:
    lines = [list(COLUMNS)]
    for row in rows:
        if not row["error"]:
            values = ((row[name], form) for name, form in COLUMNS.items())
            lines.append(["-" if value is None else form.format(value) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    failed = [
        f"failed: {row['model']} {row['variant']}, batch {row['batch']}: {row['error']}"
        for row in rows
        if row["error"]
    ]
    return "\n".join([*text, *failed, *(f"left out: {reason}" for reason in left_out)])


def sentences(verdicts: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for verdict in verdicts:
        line = f"{verdict['what']}: {verdict['value']:.1f}"
        if verdict["goal"] is not None:
            word = {None: "not judged here", True: "met", False: "missed"}[verdict["met"]]
            line += f"; goal on an H200 {verdict['goal']:g}: {word}"
        if verdict["published_v100"] is not None:
            line += f"; published for a V100 and fp32, other hardware: {verdict['published_v100']}"
        lines.append(line)
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(head: Mapping[str, Any], rows: Sequence[Row]) -> bytes:
    """Images per second of each variant, a panel for each model: a PNG."""
    rows = [row for row in rows if not row["error"]]
    models = {
        row["model"]: [other for other in rows if other["model"] == row["model"]] for row in rows
    }
    figure, panels = plt.subplots(
        max(len(models), 1),
        figsize=(8, 1 + sum(0.5 + 0.27 * len(group) for group in models.values())),
        gridspec_kw={"height_ratios": [2 + len(group) for group in models.values()] or [1]},
        squeeze=False,
        constrained_layout=True,
    )
    for panel, (model, group) in zip(panels[:, 0], models.items(), strict=False):
        colors = [
            COLORS[2 if row["batch"] > 1 else 0 if row["settings"]["refine"] else 1]
            for row in group
        ]
        bars = panel.barh(
            range(len(group)), [row["images_per_second"] for row in group], color=colors
        )
        texts = [
            f" {row['images_per_second']:.3g}/s, {_ms(row['ms_median'])} ms,"
            f" {row['agreement']:.2%} same labels"
            for row in group
        ]
        panel.bar_label(bars, texts, fontsize=7)
        names = [
            row["variant"] + (f", {row['batch']} at once" if row["batch"] > 1 else "")
            for row in group
        ]
        panel.set_yticks(range(len(group)), names, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.5)
        height, width = head["protocols"][model]["image_size"]
        panel.set_title(f"{model}, {height}x{width}", fontsize=9, loc="left")
        panel.tick_params(axis="x", labelsize=7)
    panels[-1, 0].set_xlabel(
        "images per second, host to host; blue bars each add to the one above", fontsize=8
    )
    figure.suptitle(f"{head['device']}, PyTorch {head['versions']['torch']}", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()
