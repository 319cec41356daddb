"""What a user wants predicted: pictures, folders, patterns and videos, and where results go."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pointrend_triton.data import DataError, MissingDataError, read_image

Image = NDArray[np.uint8]

# what OpenCV reads in 8 or 16 bits; files of other names are tried where they are named themselves
PICTURES = frozenset(
    (".avif", ".bmp", ".dib", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png")
    + (".pnm", ".ppm", ".ras", ".tif", ".tiff", ".webp")
)
VIDEOS = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"))
_SUFFIXES = ", ".join(sorted(PICTURES | VIDEOS))


class Source(NamedTuple):
    """A file, and the name (with folders, without suffix) that its results get."""

    path: Path
    name: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS


def find(inputs: Sequence[str], results: Sequence[Path] = ()) -> list[Source]:
    """The files that the inputs mean, each once, in the order given and by name within a folder.

    Args:
        inputs: files, folders (with all below them) and glob patterns. Folders and patterns give
            what has the suffix of a picture or video and no hidden part in its path.
        results: folders of earlier results, which are no inputs of a folder or pattern.

    Raises DataError for an input that is not there or gives nothing.
    """
    own = {folder.resolve() for folder in results}
    found: dict[tuple[Path, Path], Source] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            sources = [Source(path, Path(path.stem))]
        else:
            sources = [s for s in _listed(text) if own.isdisjoint(s.path.resolve().parents)]
        if not sources:
            raise DataError(f"{text}: no picture or video in it; those end in {_SUFFIXES}")
        for source in sources:
            found.setdefault((source.path.resolve(), source.name), source)
    return list(found.values())


def _listed(text: str) -> Iterator[Source]:
    """What is below a folder or matches a pattern, named from the folder or the pattern's root."""
    path = Path(text)
    if path.is_dir():
        yield from _usable(path, path.rglob("*"))
        return
    if not glob.has_magic(text):
        raise MissingDataError(f"{text}: no such file or folder")
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    try:
        matches = {*root.glob(str(path.relative_to(root)))}
    except ValueError as error:  # as of "**.png", before Python 3.13
        raise DataError(f"{text}: no such pattern can be: {error}") from None
    if not matches:
        raise MissingDataError(f"{text}: matches no file")
    below = {file for match in matches if match.is_dir() for file in match.rglob("*")}
    yield from _usable(root, matches | below)


def _usable(root: Path, paths: Iterable[Path]) -> Iterator[Source]:
    for path in sorted(paths):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.suffix.lower() in PICTURES | VIDEOS and not hidden and path.is_file():
            yield Source(path, relative.with_suffix(""))


def read_picture(path: str | os.PathLike[str]) -> Image:
    """`read_image`, and of pictures with 16 bits per channel the upper 8, as viewers show them."""
    try:
        return read_image(Path(path))
    except MissingDataError:
        raise
    except DataError:
        deep = _read_deep(Path(path))
        if deep is None:
            raise
        return (deep >> 8).astype(np.uint8)


def _read_deep(path: Path) -> NDArray[np.uint16] | None:
    """Of a picture with 16 bits per channel all of them, else None."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if not data.size:
        return None
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        return None
    if image is None or image.dtype != np.uint16:
        return None
    return np.asarray(image, np.uint16)
