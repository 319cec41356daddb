"""Draws the learning curves of runs: loss, and mIoU with Boundary IoU, over iterations.

python benchmarks/learning_curve.py runs/camvid_r18/metrics.csv --out curve.png
python benchmarks/learning_curve.py with.csv without.csv --out compared.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt
import numpy as np


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the rows that have one."""
    present = [row for row in rows if row.get(name)]
    return [int(row["iteration"]) for row in present], [float(row[name]) for row in present]


def smooth(values: list[float], window: int) -> np.ndarray:
    """Mean over the last `window` values, fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(paths: list[Path], out: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for path in paths:
        rows, name = read(path), path.parent.name if path.stem == "metrics" else path.stem
        for term, style in (("loss_coarse", "-"), ("loss_point", "--")):
            iterations, values = column(rows, term)
            if values:
                left.plot(iterations, smooth(values, 10), style, label=f"{name}, {term}")
        for term, style in (("miou", "o-"), ("boundary_iou", "o--")):
            iterations, values = column(rows, term)
            right.plot(iterations, values, style, markersize=3, label=f"{name}, {term}")
    left.set(xlabel="iteration", ylabel="loss, mean of 10 log lines", yscale="log")
    right.set(xlabel="iteration", ylabel="percent, evaluation split")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.csv of a run")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    arguments = parser.parse_args()
    draw(arguments.metrics, arguments.out)


if __name__ == "__main__":
    main()
