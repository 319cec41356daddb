"""Pictures per second that the training loader makes, beside what a training step takes.

    python -m benchmarks.data                                  # shapes, CamVid, Cityscapes' size
    python -m benchmarks.data --dataset camvid --workers 1 8 --json OUT.json

What has to be reached: an H200 is estimated to train on 150 to 300 crops of 512x1024 a second in
bf16, 229 at 35 ms per batch of 8. Of 16 cores, each then has 70 ms for a crop. A crop travels as
2 MiB of 8-bit values, 0.5 GB/s in all (10 MiB and 2.4 GB/s as float32 and int64); a decoded
Cityscapes picture has 8 MiB, so a cache is read at up to 1.9 GB/s: from memory, or a fast disk.

Four paths to the same pictures: "published" decodes, resizes whole pictures and sends float32,
"files" decodes, resizes what the crop needs and sends 8 bits, "cache" does so from data.cache,
which the page cache of the system holds here, and "resident" (data.resident) makes the random
choices alone and sends those. No GPU takes part: the copy to one, the normalising there, and what
cuts the resident pictures (`python -m benchmarks.bench_augment`) are not in these figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import record
from pointrend_triton.config import DataConfig, load_config
from pointrend_triton.data import build_dataset, train_loader
from pointrend_triton.data.base import SegmentationDataset
from pointrend_triton.data.cache import cached
from pointrend_triton.data.io import IGNORE
from pointrend_triton.data.loader import TrainBatches
from pointrend_triton.data.transforms import (
    Image,
    Label,
    TrainTransform,
    normalise,
    pad,
    photometric_distortion,
    random_crop_box,
    rescale_size,
    resize,
)
from pointrend_triton.data.workers import one_thread
from pointrend_triton.visualize import write_atomic

BATCH = 8
PATHS = ("published", "files", "cache", "resident")


@dataclasses.dataclass
class Row:
    """One loader: `cpu_ms` and its parts are processor time per picture in one process."""

    dataset: str
    path: str
    workers: int
    pictures_per_second: float
    per_core: float
    cpu_ms: float
    cpu_ms_load: float
    cpu_ms_transform: float


class PublishedOrder(Dataset[tuple[Tensor, Tensor]]):
    """Every step of the training pipeline on whole pictures, as published, and float32 at its end.

    Its keys are those of `TrainBatches`, and its draws those of the project's own loader.
    """

    def __init__(self, dataset: SegmentationDataset, data: DataConfig, seed: int) -> None:
        self.dataset, self.data, self.seed = dataset, data, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, number = key
        rng = np.random.default_rng([self.seed, 1, number])
        return self.transform(*self.dataset.load(index), rng)

    def transform(
        self, image: Image, label: Label, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        data = self.data
        size = rescale_size(image.shape[:2], data.scale, data.scale_range, rng)
        image = resize(image, size, cv2.INTER_LINEAR)
        label = resize(label, size, cv2.INTER_NEAREST)
        box = random_crop_box(label, data.crop_size, data.crop_max_share, rng)
        image, label = image[box], label[box]
        if rng.random() < data.flip_probability:
            image, label = image[:, ::-1], label[:, ::-1]
        image = np.ascontiguousarray(image)
        if data.photometric:
            image = photometric_distortion(image, rng)
        pixels = pad(normalise(image), data.crop_size, 0)
        classes = pad(label, data.crop_size, IGNORE).astype(np.int64)
        return torch.from_numpy(pixels), torch.from_numpy(classes)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    need = 1000 * BATCH / args.step_ms
    command = shlex.join(["python", "-m", "benchmarks.data", *argv])
    result = {
        **record.header(torch.device("cpu"), command),
        "cores": os.cpu_count(),
        "loadavg_before": os.getloadavg(),
        "needed": {
            "pictures_per_second": need,
            "ms_per_iteration": args.step_ms,
            "batch_size": BATCH,
            "source": args.step_source,
        },
    }
    rows: list[Row] = []
    print(f"a training step needs {need:.0f} pictures/s: {args.step_ms:g} ms ({args.step_source})")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.dataset:
            data = _config(name, Path(folder), args.camvid)
            for row in measure(name, data, Path(folder) / "cache", args.workers, args.seconds):
                rows.append(row)
                print(_line(row, need), flush=True)
    result["loadavg_after"] = os.getloadavg()
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    if args.json:
        write_atomic(args.json, json.dumps(result, indent=1).encode() + b"\n")
    return 0


def _line(row: Row, need: float) -> str:
    return (
        f"{row.dataset:16} {row.path:9} {row.workers:3} workers {row.pictures_per_second:8.1f}/s, "
        f"{row.per_core:7.1f} per core; {row.cpu_ms:6.2f} ms of a core each "
        f"({row.cpu_ms_load:.2f} load + {row.cpu_ms_transform:.2f}): "
        f"{need * row.cpu_ms / 1000:.1f} cores for the step"
    )


def measure(
    name: str, data: DataConfig, cache: Path, workers: list[int], seconds: float
) -> Iterator[Row]:
    """A row for every path and number of workers; `seconds` is the time that each is measured."""
    dataset = build_dataset(data, data.train_split)
    for path in PATHS[: 2 if data.dataset == "shapes" else 4]:
        source = dataset
        if path in ("cache", "resident"):
            source = cached(dataset, cache, max(workers))
            data = dataclasses.replace(data, cache=str(cache), resident=path == "resident")
        load, transform = _cpu_ms(source, data, path, pictures=3 * BATCH)
        for number in workers:
            rate = _rate(_batches(source, dataclasses.replace(data, workers=number), path), seconds)
            cores = min(max(number, 1), os.cpu_count() or 1)
            yield Row(name, path, number, rate, rate / cores, load + transform, load, transform)


def _batches(source: SegmentationDataset, data: DataConfig, path: str) -> Iterator[Any]:
    if path != "published":
        return train_loader(source, data, BATCH, 0, 0, 10**6).host_batches()
    return iter(
        DataLoader(
            PublishedOrder(source, data, 0),
            batch_sampler=TrainBatches(len(source), BATCH, 0, 0, 10**6),
            num_workers=data.workers,
            worker_init_fn=one_thread,
        )
    )


def _rate(batches: Iterator[Any], seconds: float, repetitions: int = 5) -> float:
    """Pictures per second: the median of several stretches, what was made ahead left out."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds / 2:
        next(batches)
    rates = []
    for _ in range(repetitions):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / repetitions:
            next(batches)
            count += BATCH
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def _cpu_ms(
    source: SegmentationDataset, data: DataConfig, path: str, pictures: int
) -> tuple[float, float]:
    """Mean processor time of a picture: loading it, and everything after that.

    A mean over picture numbers, whose scales and distortions differ; each is a median of three.
    """
    transform = TrainTransform(data)
    cuts: dict[str, Callable[[Image, Label, np.random.Generator], object]] = {
        "published": PublishedOrder(source, data, 0).transform,
        "resident": lambda image, label, rng: transform.draw(label, rng),
    }
    cut = cuts.get(path, transform.cut)
    loads, transforms = [], []
    for number in range(pictures):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(3):
            start = time.thread_time()
            image, label = source.load(number % len(source))
            middle = time.thread_time()
            cut(image, label, np.random.default_rng([0, 1, number]))
            times[0].append(middle - start)
            times[1].append(time.thread_time() - middle)
        loads.append(statistics.median(times[0]))
        transforms.append(statistics.median(times[1]))
    return 1000 * statistics.mean(loads), 1000 * statistics.mean(transforms)


def _config(name: str, folder: Path, camvid: str) -> DataConfig:
    if name == "shapes":
        return load_config("shapes_r18").data
    if name == "camvid":
        return load_config("camvid_r50", [f"data.root={camvid}", "data.holdout_every=0"]).data
    write_pictures(folder / "photographs", 16, (1024, 2048))
    root = f"data.root={folder / 'photographs'}"
    return load_config("cityscapes_r50", ["data.dataset=folder", root]).data


def write_pictures(root: Path, count: int, size: tuple[int, int]) -> None:
    """`count` PNG pictures with the spectrum of photographs, and labels of 19 classes, as `folder`.

    Their files are about as large as those of Cityscapes: 2 to 2.5 MB at 2048x1024.
    """
    rng = np.random.default_rng(0)
    height, width = size
    (root / "images/train").mkdir(parents=True)
    (root / "labels/train").mkdir(parents=True)
    lines = "".join(f"{index},class {index}\n" for index in range(19))
    (root / "classes.csv").write_text("index,name\n" + lines)
    for number in range(count):
        image = np.full((height, width, 3), 90, np.float32)
        for cell, contrast in ((256, 35), (64, 18), (16, 9), (4, 4), (1, 0.8)):
            coarse = rng.normal(0, contrast, (height // cell, width // cell, 1))
            tint = rng.normal(0, contrast / 4, (height // cell, width // cell, 3))
            image += cv2.resize((coarse + tint).astype(np.float32), (width, height))
        fields = [
            cv2.resize(rng.normal(0, 1, (5, 9)).astype(np.float32), (width // 4, height // 4))
            for _ in range(19)
        ]
        label = cv2.resize(
            np.argmax(fields, axis=0).astype(np.uint8),
            (width, height),
            interpolation=cv2.INTER_NEAREST,
        )
        picture = np.clip(image, 0, 255).astype(np.uint8)
        cv2.imwrite(str(root / f"images/train/{number:03d}.png"), picture)
        cv2.imwrite(str(root / f"labels/train/{number:03d}.png"), label)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["shapes", "camvid", "cityscapes-sized"]
    parser.add_argument("--dataset", nargs="+", choices=names, default=names)
    parser.add_argument("--camvid", default="data/camvid", help="its folder")
    cores = os.cpu_count() or 1
    default = sorted({1, 2, cores // 2, cores} - {0})
    parser.add_argument("--workers", nargs="+", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=10, help="per row")
    parser.add_argument("--step-ms", type=float, default=35, help="of a training step of 8")
    parser.add_argument("--step-source", default="an estimate", help="where --step-ms comes from")
    parser.add_argument("--json", type=Path, help="the result file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
