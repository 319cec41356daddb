"""Reading images, label maps and class tables; what would lose data is refused in words."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

# DataError says it; for good and not around each decoding, because threads share the level
if "OPENCV_LOG_LEVEL" not in os.environ:
    # OpenCV 4.13 moved it
    _logging = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
    _logging.setLogLevel(0)

IGNORE = 255
MAX_CLASSES = 255


class DataError(ValueError):
    """Data that cannot be used; the message names the file, what was found in it, and the rule."""


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder that a data set needs is not there."""


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Decode a picture with OpenCV as 8-bit BGR [H,W,3], turned as its EXIF orientation says.

    Grey and palette pictures become BGR, an alpha channel is dropped. DataError: the file is empty,
    cut short or no picture, or it has more than 8 bits per channel, which would be thrown away.
    """
    data = _read_bytes(path)
    try:
        # from memory: given a path, OpenCV fills what a cut JPEG lacks with grey;
        # ANYDEPTH: without it, OpenCV reduces deeper pictures to 8 bits
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        raise DataError(f"{path}: OpenCV cannot decode it: {error}") from None
    if image is None:
        raise DataError(f"{path}: no picture, damaged or cut short ({len(data)} bytes)")
    if image.dtype != np.uint8:
        raise DataError(f"{path}: {image.dtype} channels; pictures must have 8 bits per channel")
    return image.astype(np.uint8, copy=False)


def read_label(path: str | Path) -> NDArray[np.uint8]:
    """The class indices [H,W] of an 8-bit grey or palette picture, as stored (EXIF is ignored).

    DataError: the file is unreadable, a colour picture, 16-bit, JPEG (lossy), or a grey picture of
    fewer than 8 bits, whose values Pillow would stretch to 0..255.
    """
    data = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            rule = "a label map must be a lossless single-channel picture of 8-bit class indices"
            if image.format == "JPEG":
                raise DataError(f"{path}: a JPEG, which alters class indices; {rule}")
            if image.mode not in ("L", "P"):
                raise DataError(f"{path}: Pillow mode {image.mode}; {rule}, so mode L or P")
            if image.mode == "L" and image.format == "PNG" and data[24] != 8:
                raise DataError(f"{path}: {data[24]} bits per pixel; {rule}")
            return np.array(image, dtype=np.uint8)
    # Pillow reports damage as any of these, SyntaxError among them
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: Pillow cannot read this label map: {error}") from None


def read_classes(path: str | Path) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    """Class names and their colours [C,3] (RGB) from a CSV file with a header.

    Columns: index, name and, if colours are given, r, g, b (0..255); others are ignored, and so is
    a row with index 255 (void). Indices must be 0, 1, 2, ... without gaps, in any order.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingDataError(
            f"{path}: no such file; it must list the classes as index,name,r,g,b"
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = list(reader)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path}: byte 0x{byte:02x} is not UTF-8; the file must be") from None
    except csv.Error as error:
        raise DataError(f"{path}: {error}; it must be a table index,name,r,g,b in CSV") from None
    if missing := {"index", "name"} - set(columns):
        raise DataError(
            f"{path}: no column {sorted(missing)}; found {list(columns)}, need index and name"
        )
    has_colours = {"r", "g", "b"} <= set(columns)
    table: dict[int, tuple[str, list[int]]] = {}
    for line, row in enumerate(rows, start=2):
        try:
            index = int(row["index"])
            colour = [int(row[c]) for c in "rgb"] if has_colours else default_colour(index)
        except (TypeError, ValueError):
            raise DataError(f"{path}, line {line}: not a whole number in {row}") from None
        if index == IGNORE:
            continue
        if index in table:
            raise DataError(f"{path}, line {line}: index {index} appears twice")
        if not all(0 <= value <= 255 for value in colour):
            raise DataError(f"{path}, line {line}: colour {colour} is not within 0..255")
        table[index] = (row["name"], colour)
    if not table or sorted(table) != list(range(len(table))):
        raise DataError(f"{path}: indices must be 0, 1, 2, ... without gaps, not {sorted(table)}")
    ordered = [table[index] for index in range(len(table))]
    return tuple(name for name, _ in ordered), np.array([rgb for _, rgb in ordered], dtype=np.uint8)


def default_colour(index: int) -> list[int]:
    """RGB for a class without a colour: the bits of its index, spread over the high bits."""
    return [sum((index >> (3 * bit + c) & 1) << (7 - bit) for bit in range(3)) for c in range(3)]


def _read_bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingDataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not data:
        raise DataError(f"{path}: the file is empty")
    return data
