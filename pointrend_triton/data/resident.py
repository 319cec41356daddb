"""A cached data set in the memory of the device that trains, which cuts the crops there.

A step's random choices are made on the host, by the code and from the seeds that they come from
without; a few numbers for each crop go to the device.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from pointrend_triton import ops
from pointrend_triton.data.cache import CachedDataset
from pointrend_triton.data.io import DataError
from pointrend_triton.data.transforms import MEAN, STD, Cut, Size, TrainTransform
from pointrend_triton.memory import available_memory

CPU_AVX2 = 11  # OpenCV's number, which cv2 has no name for
Key = tuple[int, int]
# `places` int64 [B,8] and `colours` float32 [B,5] of `ops.augment`, and the pictures' origins
Choices = tuple[Tensor, Tensor, list[str]]


class ResidentDataset(CachedDataset):
    """`cached`, with a copy of all its pictures and labels in the memory of `device`.

    Says, unless `quiet`, how much that is and what it leaves. DataError: more than is free there.

    Attributes:
        pictures: uint8 [pixels,4] on the device: blue, green, red, class.
    """

    def __init__(self, cached: CachedDataset, device: torch.device, *, quiet: bool = False) -> None:
        super().__init__(cached.dataset, cached.place, cached.sizes.tolist())
        self.cached = cached
        self.pictures = _upload(cached, device, quiet)

    def crops(self, choices: Choices, size: Size) -> tuple[Tensor, Tensor, list[str]]:
        """Images float32 [B,3,h,w], labels int64 [B,h,w] on the device, and the origins."""
        places, colours, files = choices
        images, labels = ops.augment(
            self.pictures,
            places.to(self.pictures.device, non_blocking=True),
            colours.to(self.pictures.device, non_blocking=True),
            size,
            mean=MEAN,
            std=STD,
        )
        return images, labels, files


class TrainChoices(Dataset[tuple[Tensor, Tensor, str]]):
    """The random choices for every sample number: those of `loader.TrainSamples`.

    It has no part in the device's memory, so that loader processes do not either.
    """

    def __init__(self, dataset: CachedDataset, transform: TrainTransform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, str]:
        index, number = key
        _, label = self.dataset.load(index)
        rng = np.random.default_rng([self.seed, 1, number])
        cut = self.transform.draw(label, rng)
        place = place_of(cut, int(self.dataset.starts[index]), label.shape)
        numbers = torch.tensor(place), torch.tensor(cut.colours, dtype=torch.float32)
        return *numbers, self.dataset.files(index)


def place_of(cut: Cut, start: int, size: tuple[int, ...]) -> list[int]:
    """A row of `places` of `ops.augment`, for a picture of (height, width) `size` at `start`."""
    top, left = (part.start for part in cut.box)
    return [start, *size, *cut.size, top, left, int(cut.flip)]


def _upload(dataset: CachedDataset, device: torch.device, quiet: bool) -> Tensor:
    pixels = int(dataset.sizes.prod(axis=1).sum())
    text = _check_room(len(dataset), 4 * pixels, device)
    if not quiet:
        print(text, flush=True)
        if not cv2.checkHardwareSupport(CPU_AVX2):
            print("data.resident: no AVX2 here: some grey levels differ from those of data.cache")
    pictures = torch.empty(pixels, 4, dtype=torch.uint8, device=device)
    starts = dataset.starts.tolist()
    hidden = True if quiet else None
    for index in tqdm(range(len(dataset)), "data.resident", unit="image", disable=hidden):
        image, label = dataset.load(index)
        packed = torch.from_numpy(cv2.merge([image, label]).reshape(-1, 4))
        pictures[starts[index] :][: len(packed)] = packed
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # another stream is going to read it
    return pictures


def _check_room(count: int, need: int, device: torch.device) -> str:
    """What is going to be taken, in words; how much training needs is not known here."""
    text = f"data.resident: {count} images, {need / 1e9:.2f} GB, in the memory of {device}"
    free = available_memory(device)
    if need > free:
        hint = "data.resident=false reads them from data.cache"
        raise DataError(f"{text}, where {free / 1e9:.2f} GB are free; {hint}")
    return f"{text}, which leaves {(free - need) / 1e9:.2f} GB for training"
