"""What a training run leaves behind while it goes on, and how it is asked to stop."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from torch.utils.tensorboard import SummaryWriter

T = TypeVar("T")

COLUMNS = (
    *("iteration", "lr", "loss", "loss_coarse", "loss_point", "acc_coarse", "acc_point"),
    *("images_per_second", "peak_memory_gb", "miou", "boundary_iou"),
)


class Record:
    """metrics.csv and TensorBoard; what lies beyond the iteration resumed from is dropped."""

    def __init__(self, run_dir: Path, start: int):
        self.path = run_dir / "metrics.csv"
        rows = []
        if start > 0 and self.path.exists():
            with self.path.open(newline="") as file:
                # a row that a kill cut short lacks its last column
                whole = [row for row in csv.DictReader(file) if row[COLUMNS[-1]] is not None]
                rows = [row for row in whole if int(row["iteration"]) <= start]
        partial = self.path.with_suffix(".csv.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)
        self.board = SummaryWriter(str(run_dir), purge_step=start + 1)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({"iteration": iteration, **values})
        for name, value in values.items():
            # TensorBoard groups by what stands before a slash
            tag = name.replace("_", "/", 1) if name.startswith(("loss_", "acc_")) else name
            self.board.add_scalar(tag, value, iteration)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; the second one acts as usual.

    A scheduler signals the loader's worker processes too. From then on, their end no longer raises
    in the midst of a training step, as PyTorch's handler has it, but where the next batch is due.
    """

    def __init__(self) -> None:
        self.name, self.number = "", 0
        self.usual: dict[int, Any] = {
            number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.name, self.number = signal.Signals(number).name, number
        self.release()
        self.usual[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)

    def until(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches; they end where its workers died of the signal too."""
        try:
            yield from loader
        except RuntimeError:
            if not self.name:
                raise

    def release(self) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)
