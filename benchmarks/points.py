"""More points or fewer: what each number of refined points brings, and what it costs.

    python -m benchmarks.points shapes_r18 runs/demo/best.pth
    python -m benchmarks.points camvid_r18 runs/camvid_r18/best.pth --split test --steps 1 2
    python -m benchmarks.points cityscapes_r50 FILE.pth data.root=DIR --dtype bf16 --limit 100
    python -m benchmarks.points my.yaml runs/my/best.pth --points 0 1000 4000 all --out runs/points

Writes DIR/points_CONFIG.json and a plot of it, DIR/points_CONFIG.png. CONFIG and CHECKPOINT are
those of evaluate.py. With 0 points the coarse logits are enlarged to the picture's size without any
subdivision; with "all" every cell of each step is computed again, the point head everywhere.

An image goes through the network once, and what it gave is refined with every number of points, in
an order drawn anew for each image, so that a machine that slows down does so for all of them. The
time of a number of points is that of the network plus that of its refinement and decoding to labels
at the picture's own size, both with `Predictor`, batch 1, images already on the device; medians
over the images. The first image is gone through once before, without being timed. On a GPU each of
the two is captured for each image, and the replay is what is timed, between two events: what Python
takes to launch does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt
import torch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

from benchmarks import record
from benchmarks.harness import capture
from evaluate import UsageError, load_model, positive
from pointrend_triton import Predictor
from pointrend_triton.checkpoint import CheckpointError
from pointrend_triton.config import ConfigError, load_config
from pointrend_triton.data import DataError, SegmentationDataset, TestTransform, build_dataset
from pointrend_triton.inference import pick_device
from pointrend_triton.metrics import SegmentationMetrics
from pointrend_triton.report import to_json
from pointrend_triton.visualize import write_atomic

T = TypeVar("T")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEWEST = 16  # points that the default list may begin with
# Okabe and Ito's colours, which colour-blind readers tell apart; the marks differ too
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D")]


class Setting(NamedTuple):
    """How much is refined; `points` is None for every cell, and there is nothing with 0 steps."""

    steps: int
    points: int | None


@dataclass(frozen=True)
class Row:
    """One setting's figures.

    Attributes:
        shares: of each step's cells that were computed again, mean over the images, 0 to 1.
        refine_ms: refinement and decoding, median over the images.
        total_ms: the same with the network.
        miou, boundary_iou, band_miou: percent, the last within 1 and 3 px of a change of class.
    """

    steps: int
    points: int | None
    shares: list[float]
    refine_ms: float
    total_ms: float
    miou: float
    boundary_iou: float
    band_miou: dict[int, float]


def settings(points: Mapping[int, Sequence[int | None]]) -> list[Setting]:
    """The numbers of points of each number of steps, from few to many; 0 points only once."""
    pairs = {
        Setting(steps if count != 0 else 0, count)
        for steps, counts in points.items()
        for count in counts
    }
    return sorted(pairs, key=lambda s: (s.steps, s.points is None, s.points or 0))


def default_points(configured: int, cells: int) -> list[int | None]:
    """0, doublings of a quarter of what is configured up to half of the cells, and all of them."""
    doublings, count = [], max(configured // 4, FEWEST)
    while 2 * count <= cells:
        doublings.append(count)
        count *= 2
    return [0, *doublings, None]


def step_cells(coarse_size: Sequence[int], steps: int) -> list[int]:
    """How many cells the grid of each subdivision step has."""
    return [coarse_size[0] * coarse_size[1] * 4**step for step in range(1, steps + 1)]


def measure(
    predictor: Predictor,
    dataset: SegmentationDataset,
    scale: tuple[int, int] | None,
    indices: Sequence[int],
    chosen: Sequence[Setting],
) -> tuple[list[Row], float]:
    """A row for each setting, and the network's own median milliseconds.

    Args:
        scale: the base scale (longer, shorter side) to fit images into; None keeps their size.
        indices: of the images, at least one.
    """
    metrics = {s: SegmentationMetrics(len(dataset.classes)) for s in chosen}
    refine_ms: dict[Setting, list[float]] = {s: [] for s in chosen}
    shares: dict[Setting, list[list[float]]] = {s: [] for s in chosen}
    network_ms = []
    rng = random.Random(0)
    for turn, index in enumerate(tqdm([indices[0], *indices], unit="image", disable=None)):
        image, label = dataset.load(index)
        images = TestTransform(scale)(image)[None].to(predictor.device, predictor.dtype)
        images = images.contiguous(memory_format=predictor.memory_format)
        size, image_size = image.shape[:2], (images.shape[2], images.shape[3])
        maps, duration = timed(predictor.device, partial(predictor.model.maps, images))
        network_ms.append(duration)
        for setting in rng.sample(chosen, len(chosen)):
            cells = step_cells(maps[1].shape[2:], setting.steps)
            points = max(cells) if setting.points is None else setting.points
            refine = partial(predictor.model.refine, *maps, "labels", image_size, size)
            labels, duration = timed(
                predictor.device, partial(refine, steps=setting.steps, num_points=points)
            )
            refine_ms[setting].append(duration)
            if turn:  # the first one was only to warm up
                metrics[setting].update(labels[0], label)
                shares[setting].append([min(points, count) / count for count in cells])
    rows = []
    for setting in chosen:
        scores = metrics[setting].compute()
        durations = refine_ms[setting][1:]
        totals = [sum(pair) for pair in zip(network_ms[1:], durations, strict=True)]
        rows.append(
            Row(
                *setting,
                shares=[statistics.mean(step) for step in zip(*shares[setting], strict=True)],
                refine_ms=statistics.median(durations),
                total_ms=statistics.median(totals),
                miou=scores["miou"],
                boundary_iou=scores["mean_boundary_iou"],
                band_miou={width: scores["band_miou"][width] for width in (1, 3)},
            )
        )
    return rows, statistics.median(network_ms[1:])


@torch.inference_mode()
def timed(device: torch.device, function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the milliseconds that the device takes for it."""
    if device.type == "cuda":
        return replayed(function)
    start = time.perf_counter()
    result = function()
    return result, 1e3 * (time.perf_counter() - start)


def replayed(function: Callable[[], T]) -> tuple[T, float]:
    """What a function returns, and the milliseconds that its CUDA graph takes."""
    replay, (_, result) = capture(lambda: function)
    replay()  # the first one moves the graph to the GPU
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end)


def draw(result: Mapping[str, Any]) -> bytes:
    """mIoU and Boundary IoU over the time of an image, a curve for each number of steps: a PNG."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.7), constrained_layout=True)
    for axes, key, name in zip(
        panels, ("miou", "boundary_iou"), ("mIoU", "Boundary IoU"), strict=True
    ):
        _panel(axes, result, key)
        axes.set(xlabel="milliseconds per image, log scale", ylabel=f"{name}, %")
    panels[0].legend(fontsize=8, loc="lower right")
    data, threads = result["data"], result["threads"]
    # of a CPU's time; a GPU's does not depend on it
    used = "" if result["driver"] else f"{threads} thread{'s' * (threads > 1)}, "
    figure.suptitle(
        f"{result['config']}: {data['measured']} images of {data['dataset']} {data['split']}, "
        f"labelled with the points refined per step\n{result['device']}, {used}{result['dtype']}, "
        f"PyTorch {result['versions']['torch']}",
        fontsize=9,
    )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200)
    plt.close(figure)
    return png.getvalue()


def _panel(axes: Any, result: Mapping[str, Any], key: str) -> None:
    rows = [row for row in result["rows"] if row[key] is not None]
    coarse = [row for row in rows if row["steps"] == 0]
    configured = [row for row in rows if (row["steps"], row["points"]) == _configured(result)]
    labels: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
    # fewer steps take less time: the first curve lies to the left of the others
    left = {"xytext": (-5, 4), "ha": "right"}
    right = {"xytext": (5, -10), "ha": "left"}
    for number, steps in enumerate(sorted({row["steps"] for row in rows} - {0})):
        curve = [row for row in rows if row["steps"] == steps]
        color, mark = STYLES[number % len(STYLES)]
        x, y = _at(coarse + curve, key)
        axes.plot(x, y, f"{mark}-", color=color, markersize=4, linewidth=1.2, label=_steps(steps))
        where = {"color": color, **(right if number else left)}
        labels += [(row, _count(row["points"]), where) for row in curve]
    axes.plot(*_at(coarse, key), "D", color="black", markersize=5, label="coarse, enlarged")
    axes.plot(*_at(configured, key), "o", color="black", fillstyle="none", markersize=11)
    axes.plot([], [], "o", color="black", fillstyle="none", markersize=8, label="as configured")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3)
    # where labels would lie on each other, the ends and what is configured come first
    labels.sort(key=lambda label: not (label[0] in configured or label[1] == "all"))
    _place(axes, [((row["total_ms"], row[key]), text, where) for row, text, where in labels])


def _place(axes: Any, labels: Sequence[tuple[tuple[float, float], str, dict[str, Any]]]) -> None:
    """Writes each label beside its point, and leaves it out where it would touch one before it."""
    axes.figure.canvas.draw()  # settles the axes, so that extents are known
    placed: list[Any] = []
    halo = [withStroke(linewidth=2, foreground="white")]
    for point, text, where in labels:
        label = axes.annotate(
            text, point, textcoords="offset points", fontsize=8, path_effects=halo, **where
        )
        extent = label.get_window_extent()
        if any(extent.overlaps(other) for other in placed):
            label.remove()
        else:
            placed.append(extent)


def _at(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [row["total_ms"] for row in rows], [row[key] for row in rows]


def _configured(result: Mapping[str, Any]) -> tuple[int, int]:
    return result["configured"]["steps"], result["configured"]["points"]


def _steps(count: int) -> str:
    return f"{count} step" + "s" * (count != 1)


def _count(points: int | None) -> str:
    if points is None:
        return "all"
    return str(points) if points < 10_000 else f"{points / 1000:.0f}k"


def table(rows: Sequence[Row]) -> str:
    """For people: a line for each setting."""
    lines = ["steps  points   of the cells  refine ms  total ms   mIoU  Boundary   1 px   3 px"]
    for row in rows:
        points = "all" if row.points is None else str(row.points)
        shares = " ".join(f"{100 * share:.1f}%" for share in row.shares) or "-"
        bands = "  ".join(f"{value:5.2f}" for value in row.band_miou.values())
        lines.append(
            f"{row.steps:5}  {points:>6}  {shares:>13}  {row.refine_ms:9.2f}  {row.total_ms:8.2f}"
            f"  {row.miou:5.2f}  {row.boundary_iou:8.2f}  {bands}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    split = args.split or config.data.eval_split
    dataset = build_dataset(config.data, split)
    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise UsageError(f"--device {error}") from None
    if device.index is not None:
        torch.cuda.set_device(device)
    model = load_model(args.checkpoint, config, dataset, False).to(device)
    if model.point_head is None:
        raise UsageError(f"{args.checkpoint} has no point head, so there is nothing to refine")
    head = model.point_head.config
    indices = range(len(dataset))[: args.limit]
    if not indices:
        raise UsageError(f"the split {split!r} of {config.data.dataset} has no image")
    args.out.mkdir(parents=True, exist_ok=True)
    image, _ = dataset.load(0)
    first = TestTransform(config.data.test_scale)(image)
    chosen = {}
    for steps in args.steps or [head.subdivision_steps]:
        cells = step_cells([-(-side // 4) for side in first.shape[1:]], steps)[-1]
        chosen[steps] = args.points or default_points(head.subdivision_num_points, cells)

    load = os.getloadavg()
    predictor = Predictor(model, dtype=DTYPES[args.dtype])
    scale = config.data.test_scale
    rows, network_ms = measure(predictor, dataset, scale, indices, settings(chosen))
    with args.checkpoint.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    result = {
        **record.header(device, args.command),
        "threads": torch.get_num_threads(),
        "loadavg_before": load,
        "loadavg_after": os.getloadavg(),
        "config": Path(args.config).stem,
        "overrides": args.overrides,
        "checkpoint": {"file": args.checkpoint.name, "sha256": sha256},
        "data": {
            "dataset": config.data.dataset,
            "split": split,
            "images": len(dataset),
            "measured": len(indices),
            "scale": scale,
        },
        "dtype": args.dtype,
        "configured": {"steps": head.subdivision_steps, "points": head.subdivision_num_points},
        "network_ms": network_ms,
        "rows": [asdict(row) for row in rows],
    }
    path = args.out / f"points_{result['config']}"
    write_atomic(path.with_name(path.name + ".png"), draw(result))
    write_atomic(path.with_name(path.name + ".json"), to_json(result))
    print(f"the network alone: {network_ms:.2f} ms\n{table(rows)}\n{path}.json, {path}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    args.command = shlex.join(["python", "-m", "benchmarks.points", *argv])
    try:
        run(args)
    except (UsageError, ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"points: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("points: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.points",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a YAML file or the name of a bundled configuration")
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a file of train.py or mmsegmentation")
    add("overrides", metavar="key=value", nargs="*", help="changes to CONFIG: data.root=/data/ade")
    add("--split", help="which split; data.eval_split of CONFIG by default")
    add(
        "--points",
        metavar="K",
        nargs="+",
        type=_points,
        help="per step, 0 and 'all' too (default: 0, doublings of a quarter of CONFIG's, all)",
    )
    add(
        "--steps", metavar="S", nargs="+", type=positive, help="of subdivision; CONFIG's by default"
    )
    add("--limit", metavar="N", type=positive, help="only the first N images")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/benchmarks"),
        help="where the two files are written (default: runs/benchmarks)",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="fp32", help="of weights and maps (default: fp32)")
    return parser.parse_intermixed_args(argv)


def _points(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number or 'all', not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
