"""Beside the real mmsegmentation, on a CPU: the same weights, images and threads, in turns.

Each gives the labels of one image at its own size on the host, from normalised values on the host:
theirs as `model.predict` gives them to a user, ours by `Predictor`. mmsegmentation runs in a
process of another environment (`mmseg_side.py`), and waits there while ours runs.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import inputs
from pointrend_triton import Predictor
from pointrend_triton.config import load_config

SIDE = Path(__file__).with_name("mmseg_side.py")
CITYSCAPES = "pointrend_r50_4xb2-80k_cityscapes-512x1024"
ADE20K = "pointrend_r50_4xb4-160k_ade20k-512x512"
# ours, theirs, size of the input, size of the labels, timed calls
CASES = (
    ("cityscapes_r50", CITYSCAPES, (512, 1024), (512, 1024), 11),
    ("cityscapes_r50", CITYSCAPES, (1024, 2048), (1024, 2048), 5),
    ("ade20k_r50", ADE20K, (512, 683), (768, 1024), 11),
)
QUICK_CASES = (("cityscapes_r50", CITYSCAPES, (64, 128), (64, 128), 2),)
OURS = {"ours": {}, "ours, compiled": {"compile": True}}


class PeerError(RuntimeError):
    """The other environment does not do its part."""


@dataclass(frozen=True)
class Row:
    """One of the two at one size.

    Attributes:
        ms_*: of a call: the median and the percentiles over `calls`.
        speedup: mmsegmentation's median over this one.
        agreement: share of the pixels that mmsegmentation labels the same.
    """

    model: str
    variant: str
    image_size: tuple[int, int]
    size: tuple[int, int]
    threads: int
    versions: dict[str, str]
    ms_median: float | None = None
    ms_p10: float | None = None
    ms_p90: float | None = None
    calls: int | None = None
    speedup: float | None = None
    agreement: float | None = None
    error: str | None = None


class Theirs:
    """mmsegmentation, built and waiting; each call predicts once and gives the milliseconds.

    Raises PeerError where the process ends instead of answering.
    """

    def __init__(self, python: str, arguments: Sequence[str], complaints: IO[str]):
        self.python, self.complaints = python, complaints
        try:
            self.process = subprocess.Popen(
                # apart from what this environment sets for its own Python
                [python, "-I", str(SIDE), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )
        except OSError as error:
            raise PeerError(f"--peer {python}: {error.strerror or error}") from None
        self.versions: dict[str, str] = self._answer()

    def __call__(self) -> float:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer below says why
            print(file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.complaints.seek(0)
            said = [line for line in self.complaints.read().splitlines() if line.strip()]
            reason = said[-1] if said else f"exit status {self.process.wait()}"
            raise PeerError(f"--peer {self.python}: mmsegmentation did not run there: {reason}")
        return json.loads(line)

    def __enter__(self) -> Theirs:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def compare(python: str, quick: bool) -> Iterator[list[Row]]:
    """The rows of each case. Raises PeerError where that Python cannot run mmsegmentation."""
    cases = QUICK_CASES if quick else CASES
    for case in tqdm(cases, desc="mmsegmentation", leave=False, disable=None):
        yield compare_one(python, *case, compiled=not quick)


def compare_one(
    python: str,
    name: str,
    config: str,
    image_size: tuple[int, int],
    size: tuple[int, int],
    calls: int,
    compiled: bool,
) -> list[Row]:
    model = inputs.network(load_config(name).model).eval()
    images = inputs.images((1, 3, *image_size), torch.device("cpu"))
    threads = torch.get_num_threads()
    row = Row(name, "mmsegmentation", image_size, size, threads, {})
    with tempfile.TemporaryDirectory() as folder, Path(folder, "errors").open("w+") as complaints:
        weights, pictures, labels = (
            str(Path(folder, file)) for file in ("weights.pth", "images.npy", "labels.npy")
        )
        torch.save(model.state_dict(), weights)
        np.save(pictures, images.numpy())
        arguments = [config, weights, pictures, *map(str, (*size, threads)), labels]
        with Theirs(python, arguments, complaints) as theirs:
            theirs()
            expected = np.load(labels)
            runs: dict[str, Callable[[], float]] = {row.variant: theirs}
            rows = {row.variant: replace(row, versions=theirs.versions, agreement=1.0)}
            for variant, options in OURS.items():
                if compiled or not options:
                    ours = replace(row, variant=variant, versions={"torch": torch.__version__})
                    try:
                        run, found = make_run(Predictor(model, **options), images, size)
                        same = float((found == expected).mean())
                        rows[variant], runs[variant] = replace(ours, agreement=same), run
                    except Exception as error:  # a compiler that is missing, say
                        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                        rows[variant] = replace(ours, error=text)
            times = take_turns(runs, calls)
    return [
        summed_up(row, times[variant], times["mmsegmentation"]) if variant in times else row
        for variant, row in rows.items()
    ]


def make_run(
    predictor: Predictor, images: Tensor, size: tuple[int, int]
) -> tuple[Callable[[], float], np.ndarray]:
    """A callable that predicts once and gives the milliseconds; and its first labels."""

    def predict() -> np.ndarray:
        return predictor(images, size)[0].numpy()

    def run() -> float:
        start = time.perf_counter()
        predict()
        return 1e3 * (time.perf_counter() - start)

    return run, predict()


def take_turns(runs: dict[str, Callable[[], float]], calls: int) -> dict[str, list[float]]:
    """One call of each in turn, forwards and backwards, after a first one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(calls + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            times[name].append(runs[name]())
    return {name: found[1:] for name, found in times.items()}


def summed_up(row: Row, times: Sequence[float], theirs: Sequence[float]) -> Row:
    p10, median, p90 = (float(ms) for ms in np.percentile(times, [10, 50, 90]))
    return replace(
        row,
        ms_median=median,
        ms_p10=p10,
        ms_p90=p90,
        calls=len(times),
        speedup=statistics.median(theirs) / median,
    )


def table(rows: Sequence[Row]) -> str:
    lines = ["on the CPU beside mmsegmentation, in turns; times as fast as it:"]
    for row in rows:
        height, width = row.size
        start = f"{row.model:15} {height}x{width:<5} {row.variant:15}"
        if row.error:
            lines.append(f"{start} failed: {row.error}")
        else:
            lines.append(
                f"{start} {row.ms_median:9.1f} ms ({row.ms_p10:.1f} to {row.ms_p90:.1f})"
                f" {row.speedup:6.2f}  {row.agreement:.3%} same labels, {row.threads} threads"
            )
    return "\n".join(lines)
