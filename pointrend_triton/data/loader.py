"""Training batches whose content depends on the seed and the iteration alone.

Neither the number of workers nor an interruption changes them: any iteration can be made again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from pointrend_triton.config import DataConfig
from pointrend_triton.data.base import SegmentationDataset
from pointrend_triton.data.io import DataError
from pointrend_triton.data.transforms import TrainTransform

Key = tuple[int, int]
Item = tuple[torch.Tensor, torch.Tensor, str]
Batch = tuple[torch.Tensor, torch.Tensor, list[str]]


class TrainBatches(Sampler[list[Key]]):
    """`batch_size` keys for each iteration from `start_iteration` up to, but not, `iterations`.

    A key is (index in the data set, sample number); samples are numbered through from iteration 0.
    Every epoch visits all `length` pictures once, in its own order; batches run across epochs.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, start_iteration: int, iterations: int
    ) -> None:
        if length < 1:
            raise DataError("there are no training images")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_iteration, self.iterations = start_iteration, iterations

    def __len__(self) -> int:
        return max(self.iterations - self.start_iteration, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for iteration in range(self.start_iteration, self.iterations):
            batch = []
            for number in range(iteration * self.batch_size, (iteration + 1) * self.batch_size):
                if number // self.length != epoch:
                    epoch = number // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                batch.append((int(order[number % self.length]), number))
            yield batch


class TrainSamples(Dataset[Item]):
    """A data set behind the training transform; every sample number has its own random draws."""

    def __init__(self, dataset: SegmentationDataset, transform: TrainTransform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: Key) -> Item:
        index, number = key
        rng = np.random.default_rng([self.seed, 1, number])
        image, label = self.dataset.load(index)
        return *self.transform(image, label, rng), self.dataset.files(index)


def train_loader(
    dataset: SegmentationDataset,
    data: DataConfig,
    batch_size: int,
    seed: int,
    start_iteration: int,
    iterations: int,
    pin_memory: bool = False,
) -> DataLoader[Item]:
    """The batches of iterations `start_iteration` .. `iterations` - 1, by `data.workers` processes.

    Yields images float32 [B,3,h,w] (normalised RGB), labels int64 [B,h,w] (255: ignore), and the B
    pictures' origins, list[str]. An unusable file is a DataError; PyTorch puts a worker's traceback
    before its text, which is the last line.
    """
    return DataLoader(
        TrainSamples(dataset, TrainTransform(data), seed),
        batch_sampler=TrainBatches(len(dataset), batch_size, seed, start_iteration, iterations),
        num_workers=data.workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
        pin_memory=pin_memory,
        # DataLoader draws a number for its workers; not from the generator that the model uses
        generator=torch.Generator(),
    )


def _collate(items: list[Item]) -> Batch:
    images, labels, files = zip(*items, strict=True)
    return default_collate(list(images)), default_collate(list(labels)), list(files)


def _one_thread(worker: int) -> None:
    # one process per worker is the parallelism; OpenCV's own threads would fight over the cores
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the main process decides when the workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
