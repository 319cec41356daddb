"""A data set decoded once, into files that are mapped into memory.

    FOLDER/NAME-KEY/images.bin    uint8 BGR, one picture [H,W,3] after the other
    FOLDER/NAME-KEY/labels.bin    uint8 [H,W] likewise: class indices, 255 where to be ignored
    FOLDER/NAME-KEY/index.json    every (H, W) in order; there once the files are complete
    FOLDER/NAME-KEY/journal.json  the same of an unfinished cache: as far as they are on the disk

KEY is a hash of everything that the pixels depend on: the files' paths, sizes and times, how labels
are translated, and the decoders' versions. What changes gets another cache, so that none is ever
stale, and none is overwritten while another run reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from pointrend_triton.data.base import FileDataset, SegmentationDataset
from pointrend_triton.data.io import DataError, read_image
from pointrend_triton.data.workers import one_thread

FORMAT = 1
# pictures between two entries in the journal: what an interruption costs at most
EVERY = 64

Sizes = list[tuple[int, int]]


class CachedDataset(SegmentationDataset):
    """`dataset` read from its cache: the arrays are equal to decoded ones, and read-only."""

    def __init__(self, dataset: SegmentationDataset, place: Path, sizes: Sizes) -> None:
        self.dataset, self.place = dataset, place
        self.name, self.classes, self.palette = dataset.name, dataset.classes, dataset.palette
        self.has_labels = dataset.has_labels
        self.sizes = np.array(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes.prod(axis=1)) - self.sizes.prod(axis=1)

    def __len__(self) -> int:
        return len(self.sizes)

    def load(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        height, width = self.sizes[index].tolist()
        start = int(self.starts[index])
        # mapped anew each time: cheap beside the rest, and nothing that a worker would have to copy
        image = self._map("images.bin", 3 * start, (height, width, 3))
        return image, self._map("labels.bin", start, (height, width))

    def _map(self, name: str, start: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return np.asarray(np.memmap(self.place / name, np.uint8, "r", start, shape))

    def stem(self, index: int) -> str:
        return self.dataset.stem(index)

    def files(self, index: int) -> str:
        return self.dataset.files(index)

    def encode(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self.dataset.encode(label)


def cached(dataset: SegmentationDataset, folder: str | Path, workers: int) -> CachedDataset:
    """The data set from its cache in `folder`, which `workers` processes write first if need be.

    An interrupted writer is gone on with; of several processes, one writes and the others wait.
    DataError: a picture cannot be used, the disk is too small, the cache is damaged, or the data
    set is not made of files.
    """
    if not isinstance(dataset, FileDataset):
        raise DataError(f"data.cache is for sets of files; {dataset.name} is drawn, not decoded")
    try:
        place = Path(folder).resolve() / f"{dataset.name}-{cache_key(dataset)}"
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place / "lock"):
            sizes = _read_index(place / "index.json", place)
            if sizes is None:
                _write(dataset, place, workers)
                sizes = _read_index(place / "index.json", place)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"data.cache: {error}; what is written so far stays usable") from None
    if sizes is None or len(sizes) != len(dataset):
        raise _damaged(place, f"its index does not list the {len(dataset)} images of the data set")
    return CachedDataset(dataset, place, sizes)


def cache_key(dataset: FileDataset) -> str:
    """16 hexadecimal digits: the same as long as decoding gives the same pixels."""
    parts: list[object] = [FORMAT, cv2.__version__, PIL.__version__, len(dataset.classes)]
    for pair in dataset.pairs:
        for path in pair:
            if path is not None:
                found = path.stat()
                parts.append([str(path.resolve()), found.st_size, found.st_mtime_ns])
        if pair[1] is not None:
            parts.append(zlib.crc32(dataset.lookup(pair[1]).tobytes()))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write(dataset: FileDataset, place: Path, workers: int) -> None:
    """Decodes what the journal does not have, then turns it into the index."""
    journal = place / "journal.json"
    sizes = _read_index(journal, place) or []
    with (place / "images.bin").open("ab") as images, (place / "labels.bin").open("ab") as labels:
        done = sum(height * width for height, width in sizes)
        images.truncate(3 * done)
        labels.truncate(done)
        _check_space(dataset, place, len(sizes))
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(len(sizes), len(dataset)),
            num_workers=workers,
            worker_init_fn=one_thread,
            generator=torch.Generator(),
        )
        bar = tqdm(
            loader, "data.cache", len(dataset), initial=len(sizes), unit="image", disable=None
        )
        for image, label in bar:
            images.write(np.ascontiguousarray(image).data)
            labels.write(np.ascontiguousarray(label).data)
            sizes.append(tuple(label.shape))
            if len(sizes) % EVERY == 0:
                _commit(journal, sizes, images, labels)
        _commit(place / "index.json", sizes, images, labels)
    journal.unlink(missing_ok=True)


def _commit(path: Path, sizes: Sizes, *files: BinaryIO) -> None:
    """Says in `path` that pictures of these sizes are written, once the disk has them."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    draft = path.with_suffix(".new")
    with draft.open("w") as text:
        json.dump({"format": FORMAT, "sizes": sizes}, text)
        text.flush()
        os.fsync(text.fileno())
    draft.replace(path)


def _check_space(dataset: FileDataset, place: Path, done: int) -> None:
    """Says how much is going to be written; DataError where there is no room for it."""
    pixels = sum(_pixels(image) for image, _ in dataset.pairs[done:])
    need, free = 4 * pixels / 1e9, shutil.disk_usage(place).free / 1e9
    text = f"{len(dataset) - done} images, decoded {need:.2f} GB, in {place}"
    if need > free:
        raise DataError(f"data.cache: {text}, where {free:.2f} GB are free")
    print(f"data.cache: {text} ({free:.2f} GB free)", flush=True)
    if others := [other.name for other in place.parent.glob(f"{dataset.name}-*") if other != place]:
        print(f"data.cache: caches of other or changed files are there too: {', '.join(others)}")


def _pixels(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # the decoder that counts may know the format, or says what is wrong
        return read_image(path)[..., 0].size


def _read_index(path: Path, place: Path) -> Sizes | None:
    """The sizes of the pictures that an index or a journal lists; None: there is no such file.

    DataError if it is malformed or the files are shorter than it says; an index's must be equal.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        sizes = [(height, width) for height, width in content["sizes"]]
        valid = all(type(n) is int and 0 < n < 2**31 for size in sizes for n in size)
    except (ValueError, TypeError, KeyError, RecursionError):
        valid = False
    if not valid or content.get("format") != FORMAT:
        raise _damaged(place, f"{path.name} is not a list of image sizes of format {FORMAT}")
    pixels = sum(height * width for height, width in sizes)
    for name, expected in (("images.bin", 3 * pixels), ("labels.bin", pixels)):
        found = (place / name).stat().st_size if (place / name).exists() else 0
        if found < expected or (found > expected and path.name == "index.json"):
            raise _damaged(place, f"{name} has {found} bytes, {path.name} says {expected}")
    return sizes


def _damaged(place: Path, reason: str) -> DataError:
    return DataError(f"data.cache: {place} is damaged: {reason}; remove it to have it made again")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it, however that ends."""
    with path.open("w") as file:
        # not flock: workers would inherit that, and hold it for seconds after their parent's death
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
