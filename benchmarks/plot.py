"""Draws how much faster than eager PyTorch each variant is, from result files of the benches.

python -m benchmarks.plot runs/benchmarks/*.json --out speedups.png
python -m benchmarks.plot results.json --dtype fp32 --launched eager --out fp32.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt

from benchmarks import record
from benchmarks.harness import DIRECTIONS

# Okabe and Ito's colours, which colour-blind readers tell apart
COLORS = {
    "autocast": "#E69F00",
    "compiled": "#56B4E9",
    "reference": "#CC79A7",
    "ours": "#009E73",
}
HOW = {
    ("graph", True): "replayed from a CUDA graph, L2 flushed",
    ("eager", True): "launched from Python, L2 flushed",
    ("eager", None): "launched from Python",
}
Group = tuple[str, str, str, str]  # operation, case, direction, type of the maps


def draw(runs: Sequence[dict[str, Any]], out: Path, dtype: str, launched: str | None) -> None:
    """One PNG: for each operation and case, bars of the variants in their faster layout.

    A case that has no maps of that type is drawn with its own. Raises ValueError where the runs
    hold nothing to draw.
    """
    rows = [row for run in runs for row in run["rows"] if row["best"]]
    if launched is None:
        launched = "graph" if any(row["launched"] == "graph" for row in rows) else "eager"
    rows = [row for row in rows if (row["launched"], row["flushed"]) in HOW]
    rows = [row for row in rows if row["launched"] == launched]
    typed = {(row["op"], row["case"]) for row in rows if row["dtype"] == dtype}
    groups: dict[Group, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["dtype"] == dtype or (row["op"], row["case"]) not in typed:
            key = (row["op"], row["case"], row["direction"], row["dtype"])
            groups.setdefault(key, {})[row["variant"]] = row
    # without eager there is nothing to compare with
    groups = {key: group for key, group in groups.items() if "eager" in group}
    cases = [key[:2] for key in groups]
    order = sorted(groups, key=lambda key: (cases.index(key[:2]), DIRECTIONS.index(key[2])))
    groups = {key: groups[key] for key in order}
    if not groups:
        raise ValueError(f"no rows launched as {launched!r} with eager PyTorch beside them")
    present = {name for group in groups.values() for name in group}
    variants = [name for name in COLORS if name in present]

    height = 0.8 / max(len(variants), 1)
    figure, axes = plt.subplots(
        figsize=(9, 1.4 + 0.16 * (len(variants) + 1) * len(groups)), constrained_layout=True
    )
    for place, group in enumerate(groups.values()):
        for number, name in enumerate(variants):
            if name in group:
                row, y = group[name], place + (number - (len(variants) - 1) / 2) * height
                axes.barh(y, row["speedup"] - 1, height, left=1, color=COLORS[name])
                end = max(row["speedup"], 1)
                axes.text(end, y, f" {_duration(row['median_us'])}", va="center", fontsize=6)
    labels = [
        f"{' '.join(key)}, eager {_duration(group['eager']['median_us'])}"
        for key, group in groups.items()
    ]
    axes.set_yticks(range(len(groups)), labels, fontsize=7)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as eager PyTorch, log scale; beside the bar the median", size=8)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in variants]
    axes.legend(handles, variants, fontsize=7, loc="best")
    shown = next(iter(groups.values()))["eager"]
    how = HOW[shown["launched"], shown["flushed"]]
    figure.suptitle(f"{_hardware(runs)}\n{how}", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _hardware(runs: Sequence[dict[str, Any]]) -> str:
    """Each machine and its versions once: files of several may be drawn together."""
    texts = []
    for run in runs:
        versions = run["versions"]
        text = f"{run['device']}, PyTorch {versions['torch']}, Triton {versions['triton']}"
        if text not in texts:
            texts.append(text)
    return "; ".join(texts)


def _duration(us: float) -> str:
    return f"{us:.3g} us" if us < 1000 else f"{us / 1000:.3g} ms"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, help=".json of benches")
    add("--out", type=Path, required=True, help="the PNG to write")
    add("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="of maps; default: bf16")
    add("--launched", choices=("eager", "graph"), help="default: graph where there are such rows")
    args = parser.parse_args(argv)
    try:
        draw(record.read(args.files), args.out, args.dtype, args.launched)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
