"""The report of a training run: curves.png and report.md in the run folder, from metrics.csv.

python -m pointrend_triton.training_report runs/camvid_r18               # writes them again
python -m pointrend_triton.training_report runs/a runs/b --out both.png  # curves together
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt
import numpy as np

from pointrend_triton.config import load_config, to_dict
from pointrend_triton.visualize import write_atomic

Rows = list[dict[str, str]]


def write_report(run_dir: Path) -> Path:
    """Writes curves.png and report.md from what the run has left so far -> the report's path."""
    rows = read(run_dir / "metrics.csv")
    write_atomic(run_dir / "curves.png", draw({run_dir.name: rows}))
    config = load_config(run_dir / "config.yaml")
    about = json.loads((run_dir / "environment.json").read_text())
    path = run_dir / "report.md"
    write_atomic(path, render(run_dir.name, rows, to_dict(config), about).encode())
    return path


def render(name: str, rows: Rows, config: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The report as Markdown; every figure in it is a cell of metrics.csv or a median of some."""
    done = int(rows[-1]["iteration"]) if rows else 0
    train, data = config["train"], config["data"]
    settings = {
        "network": f"R-{config['model']['depth']}, {config['model']['num_classes']} classes"
        + ("" if config["model"]["point_head"] else ", no point head"),
        "data": f"{data['dataset']} {data['root'] or ''}".strip(),
        "iterations": f"{done} of {train['iterations']}",
        "batch": f"{train['batch_size']} crops of {data['crop_size'][0]}x{data['crop_size'][1]}",
        "device": about.get("device"),
        "versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items() if v),
        "commit": about.get("commit"),
        "started": about.get("date"),
    }
    scores = [row for row in rows if row.get("miou")]
    best = max(scores, key=lambda row: float(row["miou"]), default=None)
    lines = [f"# {name}", "", "![losses and scores over the iterations](curves.png)", ""]
    lines += _table(("", ""), [(key, str(value)) for key, value in settings.items()])
    if best is not None:
        marks = [("best", best), ("last", scores[-1])]
        cells = [
            (m, r["iteration"], _figure(r["miou"]), _figure(r["boundary_iou"])) for m, r in marks
        ]
        lines += ["", *_table(("evaluation", "iteration", "mIoU", "Boundary IoU"), cells)]
    speeds: dict[str, tuple[str, float, Callable[[list[float]], float]]] = {
        "images per second, median": ("images_per_second", 1.0, statistics.median),
        "waiting for data, % of the time, median": ("data_wait", 100.0, statistics.median),
        "peak memory, GB": ("peak_memory_gb", 1.0, max),
        "steps skipped, gradients not finite": ("skipped", 1.0, max),
    }
    costs = []
    for label, (key, factor, reduce) in speeds.items():
        values = column(rows, key)[1]
        if values:
            costs.append((label, f"{factor * reduce(values):.4g}"))
    lines += ["", *_table(("while training", ""), costs)] if costs else []
    lines += ["", "`config.yaml` has all settings, `metrics.csv` all figures.", ""]
    return "\n".join(lines)


def draw(runs: Mapping[str, Rows]) -> bytes:
    """Losses, scores, and speed with data-wait, over the iterations of one or more runs: a PNG."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 3.6), constrained_layout=True)
    left, middle, right = panels
    waiting = right.twinx()
    for name, rows in runs.items():
        for term, style in (("loss_coarse", "-"), ("loss_point", "--")):
            iterations, values = column(rows, term)
            if values:
                left.plot(iterations, smooth(values, 10), style, label=f"{name}, {term}")
        for term, style in (("miou", "o-"), ("boundary_iou", "o--")):
            iterations, values = column(rows, term)
            if values:
                middle.plot(iterations, values, style, markersize=3, label=f"{name}, {term}")
        iterations, values = column(rows, "images_per_second")
        if values:
            (line,) = right.plot(iterations, smooth(values, 10), label=name)
            iterations, values = column(rows, "data_wait")
            waiting.plot(iterations, smooth(values, 10) * 100, ":", color=line.get_color())
    left.set(xlabel="iteration", ylabel="loss, mean of 10 log lines", yscale="log")
    middle.set(xlabel="iteration", ylabel="percent, evaluation split")
    right.set(xlabel="iteration", ylabel="images per second (line), mean of 10", ylim=0)
    waiting.set(ylabel="waiting for data, % of the time (dots)", ylim=(0, 100))
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    plt.close(figure)
    return png.getvalue()


def read(path: Path) -> Rows:
    """The rows of a metrics.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the rows that have a finite one."""
    present = [row for row in rows if row.get(name) and math.isfinite(float(row[name]))]
    return [int(row["iteration"]) for row in present], [float(row[name]) for row in present]


def smooth(values: list[float], window: int) -> np.ndarray:
    """Mean over the last `window` values, fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _figure(text: str) -> str:
    return f"{float(text):.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="a PNG to write the curves to, and no report")
    arguments = parser.parse_args(argv)
    for run in arguments.runs:
        if not (run / "metrics.csv").is_file():
            parser.error(f"{run} is no run folder: it has no metrics.csv")
    if arguments.out:
        runs = {run.name: read(run / "metrics.csv") for run in arguments.runs}
        write_atomic(arguments.out, draw(runs))
        print(arguments.out)
    else:
        for run in arguments.runs:
            print(write_report(run))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
