"""What an iteration of training takes, and that what makes it faster leaves the losses as they are.

    python -m benchmarks.train_step                         # cityscapes_r50 on the GPU
    python -m benchmarks.train_step --config ade20k_r50 --out runs/benchmarks
    python -m benchmarks.train_step --config shapes_r18 --device cpu
    python -m benchmarks.train_step --quick --device cpu    # a tiny network, nothing compiled

Plain fp32, and then one setting more in each variant (the last one slows it down); on a CPU, where
bf16 and the compiler do not go together, each variant has one setting more than fp32. All start
from the same initial weights, on the same batches with the same draws. The losses of the first
iterations are kept as a curve; then, compiled and warm, as many more are timed. They are drawn
shapes at the configuration's crop size and ready on the device: no loader is timed. It is
train.py's own model, optimiser, losses and step. FLOPs are those of the matrix products and
convolutions of plain PyTorch, forward and backward, and MFU is their share of what one large matrix
product reaches in the same type here. Memory is that of tensors on the GPU, without the batches
that wait.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from benchmarks import record
from benchmarks.harness import EFFORTS, Rates, Timer, measure_rates, statistics
from benchmarks.survival import TINY
from pointrend_triton import ops
from pointrend_triton.config import Config, load_config
from pointrend_triton.data import build_dataset, train_loader
from pointrend_triton.inference import pick_device
from pointrend_triton.report import to_json
from pointrend_triton.visualize import write_atomic

Batches = Sequence[tuple[Tensor, Tensor]]
# what each variant adds: to those before it on a GPU, to fp32 on a CPU
WATERFALL: dict[str, dict[str, Any]] = {
    "fp32": dict.fromkeys(("amp", "channels_last", "compile", "tf32", "deterministic"), False),
    "bf16": {"amp": True},
    "channels-last": {"channels_last": True},
    "compiled": {"compile": True},
    "kernels": {"backend": "auto"},
    "deterministic": {"deterministic": True},  # what it costs
}
BATCHES = 8  # they are used in turn


@dataclass(frozen=True)
class Row:
    """One variant. Memory is None on a CPU, all measurements are where there is an error.

    Attributes:
        settings: of train.py, and the backend of the operations.
        losses: of the first iterations.
        loss_difference: the largest difference from the losses of fp32.
        mfu_percent: of the rate of a large matrix product in the variant's type.
    """

    variant: str
    settings: dict[str, Any]
    ms_median: float | None = None
    ms_p10: float | None = None
    ms_p90: float | None = None
    images_per_second: float | None = None
    peak_memory_gb: float | None = None
    memory_per_image_gb: float | None = None
    mfu_percent: float | None = None
    losses: tuple[float, ...] = ()
    loss_difference: float | None = None
    error: str | None = None


def drawn_batches(config: Config, device: torch.device, count: int) -> Batches:
    """The first batches of a training on shapes of the configuration's crop size."""
    size = config.data.crop_size
    data = replace(
        config.data,
        **{"dataset": "shapes", "root": None, "cache": None, "holdout_every": 0, "workers": 0},
        **{"shapes_size": size, "scale": (max(size), min(size))},
    )
    train_config, dataset = config.train, build_dataset(data, "train")
    order = (train_config.batch_size, train_config.seed, 0, count, device)
    return [batch[:2] for batch in train_loader(dataset, data, *order)]


def make_iteration(
    config: Config, batches: Batches, device: torch.device
) -> Callable[[int], Tensor]:
    """What train.py does in the iteration of a number, as a function of it -> the loss."""
    settings, classes = config.train, max(config.model.num_classes, 2)
    train.set_numerics(settings)
    torch.manual_seed(settings.seed)
    data = SimpleNamespace(classes=range(classes), palette=np.zeros((classes, 3), np.uint8))
    model = train.make_model(config, data, resuming=True).to(device)  # without ImageNet weights
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = train.make_optimizer(model, settings)
    model.train()
    loss_of: Any = torch.compile(model) if settings.compile else model

    def iteration(number: int) -> Tensor:
        images, labels = batches[number % len(batches)]
        if settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(number, settings)
        train.seed_iteration(settings.seed, number, 0)
        optimizer.zero_grad(set_to_none=True)
        out = train.backward(loss_of, images, labels, settings)
        train.guarded_step(optimizer, model)
        return out["loss"]

    return iteration


def measure(
    row: Row, config: Config, batches: Batches, steps: int, timer: Timer, rate: float, flops: float
) -> Row:
    """The row with its measurements, or with the error that prevented them.

    rate: TFLOP/s of a large matrix product; flops: of an iteration.
    """
    chosen = {name: value for name, value in row.settings.items() if name != "backend"}
    config = replace(config, train=replace(config.train, **chosen))
    device, batch_size = timer.device, config.train.batch_size
    torch.compiler.reset()
    try:
        with ops.backend(row.settings["backend"]):
            iteration = make_iteration(config, batches, device)
            losses = torch.stack([iteration(number) for number in range(steps)]).tolist()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            numbers = itertools.count(steps)
            us = statistics(timer.times(lambda: iteration(next(numbers)), steps))
    except Exception as error:  # one variant that cannot run must not end the run of all
        return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
    finally:
        iteration = None  # and with it the model, before the next one is made
        gc.collect()
        torch.cuda.empty_cache()
    peak = None
    if device.type == "cuda":
        waiting = sum(tensor.nbytes for batch in batches[1:] for tensor in batch)
        peak = (torch.cuda.max_memory_allocated(device) - waiting) / 1e9
    return replace(
        row,
        ms_median=us["median_us"] / 1e3,
        ms_p10=us["p10_us"] / 1e3,
        ms_p90=us["p90_us"] / 1e3,
        images_per_second=1e6 * batch_size / us["median_us"],
        peak_memory_gb=peak,
        memory_per_image_gb=None if peak is None else peak / batch_size,
        mfu_percent=100 * flops / us["median_us"] / rate / 1e6,
        losses=tuple(losses),
    )


def count_flops(config: Config, batches: Batches, device: torch.device) -> float:
    """Of the matrix products and convolutions of an iteration, forward and backward."""
    images, labels = (tensor[:1] for tensor in batches[0])
    one = replace(config, train=replace(config.train, batch_size=1, accumulate=1))
    one.train = replace(one.train, **WATERFALL["fp32"])
    iteration = make_iteration(one, [(images, labels)], device)
    with ops.backend("reference"), FlopCounterMode(display=False) as counter:
        iteration(0)
    return float(counter.get_total_flops()) * config.train.batch_size


def waterfall(device: torch.device, quick: bool) -> tuple[list[Row], list[str]]:
    """The variants that this machine can run, not measured yet, and those left out, with why."""
    rows, left_out = [], []
    first = {"backend": "reference", **WATERFALL["fp32"]}
    settings = first
    for name, added in WATERFALL.items():
        settings = {**(settings if device.type == "cuda" else first), **added}
        if name == "compiled" and quick:
            left_out.append(f"{name}: takes too long for --quick")
        elif name == "kernels" and (quick or device.type != "cuda"):
            left_out.append(f"{name}: measured in full on a GPU only")
        else:
            rows.append(Row(name, settings))
    return rows, left_out


def compared(row: Row, rows: Sequence[Row]) -> Row:
    """The row with its difference from the first one's losses."""
    if not (row.losses and rows and rows[0].losses):
        return row
    pairs = zip(row.losses, rows[0].losses, strict=True)
    return replace(row, loss_difference=max(abs(ours - first) for ours, first in pairs))


def draw(head: Mapping[str, Any], rows: Sequence[Row]) -> bytes:
    """Time per iteration of each variant, beside its losses: a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    measured = [row for row in rows if row.ms_median is not None]
    for place, row in enumerate(measured):
        bar = left.barh(place, row.ms_median)
        text = f" {row.ms_median:.3g} ms, {row.images_per_second:.3g} images/s"
        left.bar_label(bar, [text], label_type="edge", fontsize=8)
        right.plot(row.losses, label=row.variant, linewidth=1)
    left.set_yticks(range(len(measured)), [row.variant for row in measured])
    left.invert_yaxis()
    left.margins(x=0.45)
    left.set_xlabel(f"ms per iteration, median; each adds to {head['each_adds_to']}")
    right.set(xlabel="iteration", ylabel="loss, same batches and draws")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    versions = head["versions"]
    figure.suptitle(f"{head['device']}, PyTorch {versions['torch']}\n{head['what']}", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    return png.getvalue()


def table(rows: Sequence[Row]) -> str:
    lines = ["variant             ms    p10    p90  images/s  GB/image   MFU %  loss difference"]
    for row in rows:
        if row.error:
            lines.append(f"{row.variant:13}  failed: {row.error}")
            continue
        memory = "-" if row.memory_per_image_gb is None else f"{row.memory_per_image_gb:.2f}"
        lines.append(
            f"{row.variant:13} {row.ms_median:8.2f} {row.ms_p10:6.1f} {row.ms_p90:6.1f} "
            f"{row.images_per_second:9.1f} {memory:>9} {row.mfu_percent:7.1f} "
            f"{row.loss_difference:16.2e}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, 1 where a variant failed."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    device = args.device
    if device.index is not None:
        torch.cuda.set_device(device)
    config = load_config(TINY if args.quick else args.config)
    steps = args.steps or (4 if args.quick else 50)
    timer = Timer(device, EFFORTS["quick" if args.quick else device.type])
    rates: Rates = measure_rates(timer, args.quick)
    batches = drawn_batches(config, device, min(steps, BATCHES))
    flops = count_flops(config, batches, device)
    name = "tiny" if args.quick else Path(args.config).stem
    size, batch_size = config.data.crop_size, config.train.batch_size
    head = {
        **record.header(device, shlex.join(["python", "-m", "benchmarks.train_step", *argv])),
        "what": f"{name}, {batch_size} crops of {size[0]}x{size[1]}, {steps} iterations",
        **{"config": name, "batch_size": batch_size, "crop_size": size, "steps": steps},
        "each_adds_to": "the one above" if device.type == "cuda" else "fp32",
        "threads": torch.get_num_threads(),
        **{"tflop_per_iteration": flops / 1e12, "rates": rates},
    }
    path = args.out / ("train_step.json" if device.type == "cuda" else "train_step_cpu.json")
    planned, left_out = waterfall(device, args.quick)
    rows: list[Row] = []
    for row in tqdm(planned, desc="train_step", leave=False, disable=None):
        rate = rates.matmul("bf16" if row.settings["amp"] else "fp32")
        row = measure(row, config, batches, steps, timer, rate, flops)
        rows.append(compared(row, rows or [row]))
        result = {**head, "left_out": left_out, "rows": [asdict(row) for row in rows]}
        # after each: an interrupt leaves whole files of what was measured
        write_atomic(path, to_json(result))
        write_atomic(path.with_suffix(".png"), draw(head, rows))
    print(f"{head['device']}: {head['what']}\n{table(rows)}")
    print("\n".join(f"left out: {reason}" for reason in left_out))
    return int(any(row.error for row in rows))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="cityscapes_r50", help="a YAML file or a bundled configuration's name")
    add("--steps", type=int, help="iterations of a curve, and timed ones (default: 50)")
    add("--quick", action="store_true", help="a tiny network, 4 iterations, nothing compiled")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/benchmarks"),
        help="where train_step.json (on a CPU: train_step_cpu.json) and .png are written "
        "(default: runs/benchmarks)",
    )
    args = parser.parse_args(argv)
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device {error}")
    return args


if __name__ == "__main__":
    sys.exit(main())
