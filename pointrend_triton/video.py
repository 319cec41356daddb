"""Frames of a video file, and a video of frames."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from pointrend_triton.data import DataError

Image = NDArray[np.uint8]
# of a file that does not say how fast it runs
FRAMES_PER_SECOND = 25.0


class VideoReader:
    """Iterates over the frames, uint8 BGR [H,W,3], turned as the file says.

    Attributes:
        frames: how many the file announces; some formats only estimate it, 0 is unknown.
        fps: frames per second, the mean where it varies.

    Raises DataError if OpenCV cannot open the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # absolute: in a relative name, what stands before a colon is a protocol to FFmpeg
        self._capture = cv2.VideoCapture(str(path.absolute()))
        if not self._capture.isOpened():
            raise DataError(
                f"{path}: OpenCV cannot open this video: it is damaged, cut short, or of a codec "
                "that OpenCV's FFmpeg lacks; ffmpeg -i IN -c:v libx264 OUT.mp4 makes one it reads"
            )
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else FRAMES_PER_SECOND
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frames = int(count) if 0 < count < 2**31 else 0

    def __iter__(self) -> Iterator[Image]:
        while True:
            more, frame = self._capture.read()
            if not more:
                return
            yield np.asarray(frame, np.uint8)

    def close(self) -> None:
        self._capture.release()


class VideoWriter:
    """An MPEG-4 video that appears whole when the `with` block ends, or not at all on an error.

    `write` takes frames RGB [H,W,3] uint8, all of the first one's size. Raises OSError if OpenCV
    cannot write it.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        # of this thread alone, and short where the name is as long as names may be
        self._draft = path.absolute().with_name(f".{threading.get_native_id()}.mp4")
        self._writer: cv2.VideoWriter | None = None
        self._frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frame: Image) -> None:
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self._draft), codec, self.fps, size)
            if not self._writer.isOpened():
                raise OSError(
                    f"{self.path}: OpenCV cannot write an MPEG-4 video of {size[0]}x{size[1]} here"
                )
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))
        self._frames += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        try:
            self._writer.release()
            if kind is None:
                self._check()
                self._draft.replace(self.path)
        finally:
            self._draft.unlink(missing_ok=True)

    def _check(self) -> None:
        """OpenCV says nothing when the disk is full or a frame has another size."""
        written = cv2.VideoCapture(str(self._draft)).get(cv2.CAP_PROP_FRAME_COUNT)
        if written != self._frames:
            raise OSError(
                f"{self.path}: only {written:.0f} of {self._frames} frames could be written; the "
                "disk may be full, or the frames differ in size"
            )
