"""Training batches whose content depends on the seed and the iteration alone.

Neither the number of workers or processes nor an interruption changes them: any iteration can be
made again. Pictures and labels travel as 8-bit values, a fifth of the bytes, and become numbers on
the device that trains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from pointrend_triton.config import DataConfig
from pointrend_triton.data.base import SegmentationDataset
from pointrend_triton.data.cache import CachedDataset, cached
from pointrend_triton.data.io import IGNORE, DataError
from pointrend_triton.data.prefetch import Prefetch
from pointrend_triton.data.resident import Choices, ResidentDataset, TrainChoices
from pointrend_triton.data.transforms import MEAN, STD, Size, TrainTransform
from pointrend_triton.data.workers import one_thread

Key = tuple[int, int]
# uint8 BGR [h,w,3] and uint8 [h,w], both padded to the crop size, the size before, and the origin
Item = tuple[torch.Tensor, torch.Tensor, Size, str]
HostBatch = tuple[torch.Tensor, torch.Tensor, list[Size], list[str]]
Batch = tuple[torch.Tensor, torch.Tensor, list[str]]


class TrainBatches(Sampler[list[Key]]):
    """`batch_size` keys for each iteration from `start_iteration` up to, but not, `iterations`.

    A key is (index in the data set, sample number); samples are numbered through from iteration 0.
    Every epoch visits all `length` pictures once, in its own order; batches run across epochs.
    Process `rank` of `ranks` gets its equal part of every batch; joined in order, the parts are the
    batch of one process.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start_iteration: int,
        iterations: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if length < 1:
            raise DataError("there are no training images")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be within 0..{ranks - 1}, not {rank}")
        if batch_size % ranks:
            raise DataError(
                f"train.batch_size {batch_size} is the whole batch, of all {ranks} processes; "
                f"it must be a multiple of {ranks}"
            )
        self.share = batch_size // ranks
        self.first = rank * self.share
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_iteration, self.iterations = start_iteration, iterations

    def __len__(self) -> int:
        return max(self.iterations - self.start_iteration, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for iteration in range(self.start_iteration, self.iterations):
            batch = []
            first = iteration * self.batch_size + self.first
            for number in range(first, first + self.share):
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
        image, label = self.transform.cut(*self.dataset.load(index), rng)
        height, width = self.transform.data.crop_size
        # copies: neither may be a view of the data set's own memory
        pixels = torch.zeros((height, width, 3), dtype=torch.uint8)
        classes = torch.full((height, width), IGNORE, dtype=torch.uint8)
        h, w = label.shape
        pixels.numpy()[:h, :w], classes.numpy()[:h, :w] = image, label
        return pixels, classes, (h, w), self.dataset.files(index)


class TrainLoader(DataLoader[Any]):
    """PyTorch's loader of what goes to `device`, iterated as what `move` makes of it there."""

    def __init__(
        self, *args: Any, device: torch.device, move: Callable[[Any], Batch], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.device, self.move = device, move

    def host_batches(self) -> Iterator[Any]:
        """What the workers make, before it goes to the device."""
        return super().__iter__()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return iter(Prefetch(self.host_batches(), self.move, self.device))


def prepare(
    dataset: SegmentationDataset, data: DataConfig, device: torch.device, *, quiet: bool = False
) -> SegmentationDataset:
    """The data set as training reads it: with data.cache, and data.resident, from there.

    The cache is written, and the device's memory filled, if need be: every rank does that, all but
    one `quiet`. What was prepared before comes back as it is.
    """
    if data.cache is not None and not isinstance(dataset, CachedDataset):
        dataset = cached(dataset, data.cache, data.workers)
    is_resident = isinstance(dataset, ResidentDataset)
    if data.resident and not is_resident and isinstance(dataset, CachedDataset):
        return ResidentDataset(dataset, device, quiet=quiet)
    return dataset


def train_loader(
    dataset: SegmentationDataset,
    data: DataConfig,
    batch_size: int,
    seed: int,
    start_iteration: int,
    iterations: int,
    device: torch.device | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> TrainLoader:
    """The batches of iterations `start_iteration` .. `iterations` - 1, by `data.workers` processes.

    Yields images float32 [B,3,h,w] (normalised RGB) and labels int64 [B,h,w] (255: ignore) on
    `device` (None: the CPU), and the B pictures' origins, list[str]. On a GPU, each batch is ready
    or on its way before it is asked for. `batch_size` is that of all `ranks` processes together;
    B is this one's share. The data set is prepared first, where it is not yet (see `prepare`).

    An unusable file is a DataError; PyTorch puts a worker's traceback before its text, which is the
    last line.
    """
    device = device or torch.device("cpu")
    order = TrainBatches(len(dataset), batch_size, seed, start_iteration, iterations, rank, ranks)
    dataset, transform = prepare(dataset, data, device), TrainTransform(data)
    samples: Dataset[Any] = TrainSamples(dataset, transform, seed)
    collate: Any = _collate
    move: Callable[[Any], Batch] = functools.partial(to_device, device=device)
    if isinstance(dataset, ResidentDataset):
        samples, collate = TrainChoices(dataset.cached, transform, seed), _stack
        move = functools.partial(dataset.crops, size=data.crop_size)
    return TrainLoader(
        samples,
        batch_sampler=order,
        num_workers=data.workers,
        collate_fn=collate,
        worker_init_fn=one_thread,
        pin_memory=device.type == "cuda",
        # DataLoader draws a number for its workers; not from the generator that the model uses
        generator=torch.Generator(),
        device=device,
        move=move,
    )


def to_device(batch: HostBatch, device: torch.device) -> Batch:
    """A batch of `TrainLoader.host_batches` -> images float32 [B,3,h,w] and labels int64 [B,h,w].

    Bit for bit what `transforms.normalise` and `transforms.pad` make: subtraction and division in
    float32 are rounded alike everywhere.
    """
    pixels, classes, sizes, files = batch
    pixels = pixels.to(device, non_blocking=True)
    classes = classes.to(device, non_blocking=True)
    mean, std = _mean_and_std(device)
    # BGR [B,h,w,3] -> RGB [B,3,h,w]
    planes = pixels.permute(0, 3, 1, 2).flip(1)
    images = planes.to(torch.float32, memory_format=torch.contiguous_format)
    images.sub_(mean).div_(std)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, h:], image[:, :, w:] = 0, 0
    return images, classes.long(), files


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # once: a copy from ordinary memory waits for the device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return mean, std


def _collate(items: list[Item]) -> HostBatch:
    pixels, classes, sizes, files = zip(*items, strict=True)
    return default_collate(list(pixels)), default_collate(list(classes)), list(sizes), list(files)


def _stack(items: list[tuple[torch.Tensor, torch.Tensor, str]]) -> Choices:
    places, colours, files = zip(*items, strict=True)
    return torch.stack(places), torch.stack(colours), list(files)
