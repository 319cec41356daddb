"""What a training run leaves behind while it goes on, and how it is asked to stop."""

from __future__ import annotations

import csv
import signal
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import is_torchelastic_launched
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pointrend_triton.config import Config, TrainConfig, to_dict

T = TypeVar("T")

COLUMNS = (
    *("iteration", "lr", "loss", "loss_coarse", "loss_point", "acc_coarse", "acc_point"),
    *("images_per_second", "data_wait", "peak_memory_gb", "skipped", "miou", "boundary_iou"),
)


def check(train: TrainConfig, device: torch.device, processes: int) -> None:
    """ValueError for settings that this device and number of processes cannot run rightly."""
    if train.batch_size % (processes * train.accumulate):
        raise ValueError(
            f"train.batch_size {train.batch_size} must be divisible by the number of processes "
            f"{processes} times train.accumulate {train.accumulate}"
        )
    if train.amp and train.compile and device.type == "cpu":
        # seen with PyTorch 2.13: the loss is right, the gradients of the coarse head are zero
        raise ValueError(
            "train.amp with train.compile needs a GPU: on a CPU PyTorch's compiler gives wrong "
            "gradients in bfloat16; leave out one of them"
        )


class Record:
    """metrics.csv and TensorBoard; what lies beyond the iteration resumed from is dropped."""

    def __init__(self, run_dir: Path, start: int):
        self.path = run_dir / "metrics.csv"
        rows = [row for row in whole_rows(self.path) if int(row["iteration"]) <= start]
        partial = self.path.with_suffix(".csv.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)
        self.board = SummaryWriter(str(run_dir), purge_step=start + 1)
        self.best = max((float(row["miou"]) for row in rows if row["miou"]), default=0.0)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS).writerow({"iteration": iteration, **values})
        except OSError as error:  # of a full disk, which does not name the file
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error
        for name, value in values.items():
            # TensorBoard groups by what stands before a slash
            tag = name.replace("_", "/", 1) if name.startswith(("loss_", "acc_")) else name
            self.board.add_scalar(tag, value, iteration)
        if "miou" in values:
            self.best = max(self.best, values["miou"])
            self.board.add_scalar("miou_best", self.best, iteration)

    def settings(self, config: Config) -> None:
        """The hyper-parameters for TensorBoard, which compares runs by them and their scores."""
        table = {
            f"{section}.{key}": value if isinstance(value, bool | int | float) else str(value)
            for section, keys in to_dict(config).items()
            for key, value in keys.items()
        }
        # add_hparams would make a run of its own in a folder below
        for summary in hparams(table, dict.fromkeys(("miou_best", "miou", "boundary_iou", "loss"))):
            self.board.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def picture(self, tag: str, picture: npt.NDArray[np.uint8], iteration: int) -> None:
        """A picture, RGB [H,W,3], for TensorBoard."""
        self.board.add_image(tag, picture, iteration, dataformats="HWC")

    def text(self, tag: str, text: str, iteration: int) -> None:
        """Text for TensorBoard, shown as it is."""
        self.board.add_text(tag, textwrap.indent(text, "    "), iteration)


def whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; one that a kill or a full disk cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if line.endswith("\n")))


def is_scored(run_dir: Path, iteration: int) -> bool:
    """Whether metrics.csv has the scores of an evaluation after that iteration."""
    rows = whole_rows(run_dir / "metrics.csv")
    return any(row["iteration"] == str(iteration) and row["miou"] for row in rows)


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag; the second one acts as usual.

    Under torchrun the second one changes nothing: there, a signal to the whole process group comes
    twice, once from torchrun, which kills after 30 seconds.

    A scheduler signals the loader's worker processes too. From then on, their end no longer raises
    in the midst of a training step, as PyTorch's handler has it, but where the next batch is due.
    """

    def __init__(self) -> None:
        self.name, self.number = "", 0
        self.usual: dict[int, Any] = {
            number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            return
        self.name, self.number = signal.Signals(number).name, number
        if not is_torchelastic_launched():
            self.release()
        self.usual[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)

    def until(self, loader: Iterable[T], instead: Callable[[int], Iterable[T]]) -> Iterator[T]:
        """The loader's batches; where its workers died of the signal too, those of `instead`.

        It is given the number of batches that came before, and makes what is still due without
        workers: the other processes of a distributed run may be waiting for this one's part.
        """
        count = 0
        batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):  # the last two midway through a batch
                if not self.name:
                    raise
                yield from instead(count)
                return
            yield batch
            count += 1

    def release(self) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)
