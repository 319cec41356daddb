"""Result files of the benchmarks: JSON for programs and plots, CSV for tables, text for people.

python -m benchmarks.record DIR --out OUT/all     # merges DIR/*.json into OUT/all.json and .csv
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pointrend_triton.environment import environment
from pointrend_triton.report import to_json
from pointrend_triton.visualize import write_atomic

# what the table for people shows, in this order
COLUMNS = {
    "case": "{}",
    "dtype": "{}",
    "direction": "{}",
    "variant": "{}",
    "layout": "{}",
    "launched": "{}",
    "flushed": "{}",
    "median_us": "{:.1f}",
    "p10_us": "{:.1f}",
    "p90_us": "{:.1f}",
    "gb_per_s": "{:.4g}",
    "tflop_per_s": "{:.3g}",
    "floor_us": "{:.3g}",
    "percent_of_floor": "{:.3g}",
    "speedup": "{:.2f}",
    "launches": "{}",
    "peak_mib": "{:.1f}",
    "difference": "{:.1e}",
}


def header(device: torch.device, command: str) -> dict[str, Any]:
    """Hardware, versions, commit and date of a run.

    POINTREND_COMMIT names the commit where the code is a copy without its git folder.
    """
    known = environment(device)
    known["commit"] = known["commit"] or os.environ.get("POINTREND_COMMIT")
    return {**known, "cpu": environment(torch.device("cpu"))["device"], "command": command}


def write(path: Path, head: Mapping[str, Any], rows: Iterable[Any]) -> None:
    """A run's path.json and path.csv, whole or not at all; rows are dataclasses."""
    run = {**head, "rows": [asdict(row) for row in rows]}
    _write(path, run, [run])


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The runs of result files, merged ones too: what `header` gives, and "rows"."""
    contents = [json.loads(path.read_text()) for path in paths]
    return [run for content in contents for run in content.get("runs", [content])]


def merge(paths: Iterable[Path], out: Path) -> None:
    """out.json and out.csv of several result files."""
    runs = read(paths)
    _write(out, {"runs": runs}, runs)


def _write(path: Path, content: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(path.with_name(path.name + ".json"), to_json(content))
    write_atomic(path.with_name(path.name + ".csv"), to_csv(runs).encode())


def to_csv(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line for each row; hardware and versions are repeated in each."""
    lines = []
    for run in runs:
        about = {name: run[name] for name in ("device", "cpu", "driver", "commit", "date")}
        about |= {name: run["versions"][name] for name in ("torch", "triton", "cuda")}
        for row in run["rows"]:
            sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items())
            lines.append({**row, "sizes": sizes, **about})
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def table(head: Mapping[str, Any], rows: Iterable[Any]) -> str:
    """For people: each variant in its faster layout, then what failed and what was left out."""
    rows = list(rows)
    lines = [list(COLUMNS)]
    for row in rows:
        if row.best:
            values = ((getattr(row, name), form) for name, form in COLUMNS.items())
            lines.append(["-" if value is None else form.format(value) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    title = f"{head['device']}, PyTorch {head['versions']['torch']}, {head['date']}"
    failed = [
        f"failed: {row.case} {row.dtype} {row.direction} {row.variant} {row.layout}: {row.error}"
        for row in rows
        if row.error
    ]
    left_out = [f"left out, the time was up: {name}" for name in head["left_out"]]
    return "\n".join([title, *text, *failed, *left_out])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="holds the files of the benches")
    parser.add_argument("--out", type=Path, required=True, help="path of the result, no suffix")
    args = parser.parse_args(argv)
    paths = sorted(args.folder.glob("*.json"))
    if not paths:
        parser.error(f"{args.folder} holds no .json file")
    merge(paths, args.out)


if __name__ == "__main__":
    main()
