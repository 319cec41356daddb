"""Predict pictures and videos with a checkpoint: what is where, drawn over them.

    python -m pointrend_triton.predict street.jpg --checkpoint FILE.pth
    python -m pointrend_triton.predict photos/ 'x/*.png' drive.mp4 --checkpoint FILE.pth --out DIR
    python -m pointrend_triton.predict photos/ --checkpoint FILE.pth --write overlay labels compare
    python -m pointrend_triton.predict aerial.tif --checkpoint FILE.pth --scale none --tile 1024

The network is what FILE.pth holds: a published PointRend checkpoint of mmsegmentation, or one of
train.py. Results are named after their inputs, in one folder for each kind:

    DIR/overlay/street.png       the colours of the classes over the picture (of a video, a video)
    DIR/color/street.png         the colours alone
    DIR/labels/street.png        each pixel's class index, in 8 bits (16 above 256 classes)
    DIR/points/street.png        the points that the last step refined, on the darkened picture
    DIR/uncertainty/street.png   how uncertain the coarse prediction was, from dark blue to yellow
    DIR/compare/street.png       coarse and refined side by side
    DIR/classes.csv              index, name and colour (r, g, b) of the classes

Folders are read with all that is below them, except hidden files and what is no picture or video by
its suffix. Pictures are turned as their EXIF data say, alpha is dropped, and of 16 bits per channel
the upper 8 count. A video (mp4, mov, avi, mkv, webm, as far as OpenCV reads it) gives an MPEG-4
overlay without sound, and numbered pictures of the other kinds: DIR/labels/drive/000001.png.
Results of an earlier run are replaced, inputs never: DIR must not hold them, nor a classes.csv of
other classes. A file that cannot be read or written does not stop the others: it is named at the
end, and the exit status is 1. Only a full disk stops them all.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import io
import itertools
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from pointrend_triton import precision
from pointrend_triton.arguments import UsageError, positive
from pointrend_triton.checkpoint import CheckpointError, from_checkpoint
from pointrend_triton.config import load_config
from pointrend_triton.data import DataError, ade20k, cityscapes
from pointrend_triton.data.io import default_colour
from pointrend_triton.inference import ahead, pick_device
from pointrend_triton.models.pointrend import PointRend
from pointrend_triton.predictor import Predictor
from pointrend_triton.segment import KINDS, Prediction, Prepared, Segmenter, draw
from pointrend_triton.sources import Source, find, read_picture
from pointrend_triton.video import VideoReader, VideoWriter
from pointrend_triton.visualize import save_png, write_atomic

Image = npt.NDArray[np.uint8]
Scale = tuple[int, int]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the published data sets, by a configuration that has their test scale
PUBLISHED = {"cityscapes_r50": cityscapes, "ade20k_r50": ade20k}
# threads that read and as many that write while the network runs
WORKERS = min(4, os.cpu_count() or 1)
# what one file may fail with while the others go on, unless the disk is full
FAILURES = (DataError, OSError, MemoryError, UnicodeError, cv2.error)
FULL = (errno.ENOSPC, errno.EDQUOT)


class Classes(NamedTuple):
    """Names and RGB colours [C,3] of what a model predicts; one logit tells two classes apart.

    `published` is the configuration of the published data set that they are, if any.
    """

    names: tuple[str, ...]
    colours: Image
    published: str | None


@dataclass(frozen=True)
class Job:
    """What is done with every picture."""

    segmenter: Segmenter
    colours: Image
    kinds: tuple[str, ...]
    out: Path

    def load(self, source: Source) -> Prepared:
        return self.segmenter.prepare(read_picture(source.path))

    def write(self, source: Source, prediction: Prediction) -> None:
        for kind in self.kinds:
            save_png(target(self.out, kind, source), draw(kind, prediction, self.colours))

    def write_frame(
        self, source: Source, video: VideoWriter, number: int, prediction: Prediction
    ) -> None:
        for kind in self.kinds:
            picture = draw(kind, prediction, self.colours)
            if kind == "overlay":
                video.write(picture)
            else:
                save_png(target(self.out, kind, source) / f"{number:06}.png", picture)

    def remove_frames(self, source: Source, number: int) -> None:
        """Those of an earlier, longer run, from this one on."""
        for kind in set(self.kinds) - {"overlay"}:
            folder = target(self.out, kind, source)
            frames = (folder / f"{later:06}.png" for later in itertools.count(number))
            for frame in itertools.takewhile(Path.exists, frames):
                frame.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    failures: list[str] = []
    status = 0
    try:
        predict(args, failures)
    except (UsageError, CheckpointError, DataError, OSError) as error:
        print(f"predict: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"predict: interrupted; what is in {args.out} is whole", file=sys.stderr)
        status = 130
    if failures:
        print(f"predict: {len(failures)} could not be predicted:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return status or int(bool(failures))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pointrend_triton.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", metavar="INPUT", nargs="+", help="a picture, a folder, a quoted pattern, a video")
    add("--checkpoint", metavar="FILE", type=Path, required=True, help="the trained network")
    add("--out", metavar="DIR", type=Path, default=Path("predictions"), help="default: predictions")
    add(
        "--write",
        metavar="KIND",
        nargs="+",
        choices=KINDS,
        default=["overlay"],
        help=f"any of {', '.join(KINDS)}; default: overlay",
    )
    add(
        "--scale",
        metavar="LONGxSHORT",
        type=scale,
        default="auto",
        help="what pictures are fitted into before they enter the network, such as 2048x512, or "
        "'none' for their own size; results always have the picture's size. Default: auto, the "
        "published one for networks of Cityscapes and ADE20K classes, none for others",
    )
    add("--steps", metavar="N", type=positive, help="steps of subdivision; default: the network's")
    add(
        "--points",
        metavar="N",
        type=positive,
        help="how many points each step refines; default: the network's",
    )
    add("--coarse", action="store_true", help="do not refine")
    add(
        "--tile",
        metavar="N",
        type=tile_size,
        default="auto",
        help="cut what enters the network into overlapping tiles of N x N (a multiple of 32) and "
        "blend their probabilities; each refines as many points as a whole picture would. 'none' "
        "never does; default: auto, where memory is too small",
    )
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="what the network computes in; default: float32, as published: without TF32. bfloat16 "
        "is faster on most GPUs",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the network: pays off for many pictures of one size, or a video",
    )
    return parser.parse_args(argv)


def scale(text: str) -> Scale | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"must be two lengths such as 2048x1024, 'none' or 'auto', not {text!r}"
        )
    return int(match[1]), int(match[2])


def tile_size(text: str) -> int | str:
    if text in ("auto", "none"):
        return text
    if not text.isdecimal() or int(text) < 64 or int(text) % 32:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of 32 of at least 64, 'none' or 'auto', not {text!r}"
        )
    return int(text)


def predict(args: argparse.Namespace, failures: list[str]) -> None:
    """Writes all results; `failures` gets a line for each input that failed."""
    kinds = tuple(dict.fromkeys(args.write))
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file; it must name a folder")
    sources = find(args.inputs, [args.out / kind for kind in KINDS])
    check_out(sources, args.out)
    check_targets(sources, args.out, kinds)
    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise UsageError(f"--device {error}") from None
    model = from_checkpoint(args.checkpoint)
    check_refinement(args, model, kinds)
    classes = describe(model)
    check_classes(args.out / "classes.csv", table(classes))
    if args.scale == "auto":
        args.scale = published_scale(classes.published)
    print(introduction(args, model, classes, device))

    try:
        predictor = Predictor(model.to(device), dtype=DTYPES[args.dtype], compile=args.compile)
    except torch.OutOfMemoryError:
        raise UsageError(
            f"--device {device}: too little of its memory is free for the network alone; another "
            "process may hold it"
        ) from None
    write_atomic(args.out / "classes.csv", table(classes))
    start = time.perf_counter()
    bar = tqdm(total=0, unit="image", leave=False, disable=None)
    with bar, precision.tf32(False), compiler_errors(args.compile):
        segmenter = Segmenter(
            predictor,
            kinds,
            scale=args.scale,
            tile=args.tile,
            steps=args.steps,
            num_points=args.points,
            refine=not args.coarse,
            on_tile=lambda number, count: bar.set_postfix_str(f"tile {number} of {count}"),
        )
        job = Job(segmenter, classes.colours, kinds, args.out)
        done = predict_all(job, sources, bar, failures)
    seconds = time.perf_counter() - start
    places = ", ".join(str(args.out / kind) for kind in kinds)
    images = "image" if done == 1 else "images"
    print(f"{done} {images} in {seconds:.1f} s, {done / seconds:.2f} images/s: {places}")


def predict_all(job: Job, sources: Sequence[Source], bar: Any, failures: list[str]) -> int:
    """Pictures, then videos -> how many images; `failures` gets why others failed."""
    pictures = [source for source in sources if not source.is_video]
    bar.total = len(pictures)
    done = predict_pictures(job, pictures, bar, failures)
    for source in sources:
        if source.is_video:
            with noting(source.path, failures):
                done += predict_video(job, source, bar)
    return done


def predict_pictures(job: Job, sources: Sequence[Source], bar: Any, failures: list[str]) -> int:
    """Reads, predicts and writes pictures -> how many; `failures` gets why others failed."""
    before = len(failures)

    def write(source: Source, prediction: Prediction) -> None:
        with noting(source.path, failures):
            job.write(source, prediction)

    with threads(WORKERS) as reading, threads(WORKERS) as writing:
        results = Bounded(writing)
        prepared = ahead(reading, job.load, sources, WORKERS)
        for source, loading in zip(sources, prepared, strict=True):
            with noting(source.path, failures):
                results.submit(write, source, job.segmenter(loading.result()))
            bar.set_postfix_str("", refresh=False)
            bar.update()
        results.finish()
    return len(sources) - (len(failures) - before)


def predict_video(job: Job, source: Source, bar: Any) -> int:
    """Reads, predicts and writes the frames of a video -> how many."""
    count = 0
    with contextlib.closing(VideoReader(source.path)) as reader:
        bar.total += reader.frames
        frames = iter(reader)

        def load(_: int) -> Prepared | None:
            frame = next(frames, None)
            return None if frame is None else job.segmenter.prepare(frame)

        # one thread each: frames are read and written in order; the writer closes after its thread
        with (
            VideoWriter(target(job.out, "overlay", source), reader.fps) as video,
            threads(1) as reading,
            threads(1) as writing,
        ):
            results = Bounded(writing)
            for loading in ahead(reading, load, itertools.count(), WORKERS):
                prepared = loading.result()
                if prepared is None:
                    break
                count += 1
                results.submit(job.write_frame, source, video, count, job.segmenter(prepared))
                bar.update()
            results.finish()
        if not count:
            raise DataError(f"{source.path}: OpenCV can decode none of its frames")
        job.remove_frames(source, count + 1)
        if count < reader.frames:
            tqdm.write(
                f"note: {source.path} announces {reader.frames} frames, {count} could be read",
                file=sys.stderr,
            )
    return count


@contextlib.contextmanager
def noting(path: Path, failures: list[str]) -> Iterator[None]:
    """Why this file fails goes to `failures`, and the others go on; a full disk stops all."""
    try:
        yield
    except FAILURES as error:
        if getattr(error, "errno", None) in FULL:
            raise
        failures.append(naming(path, error))


@contextlib.contextmanager
def compiler_errors(compiled: bool) -> Iterator[None]:
    """UsageError where --compile fails, as without a C++ compiler."""
    try:
        yield
    except RuntimeError as error:
        # asked here only, as importing them takes long
        if not compiled or not isinstance(error, _compiler_errors()):
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--compile is not possible here: {reason}") from error


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return InductorError, TorchDynamoException


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that finish what they have begun, and nothing more, if an error comes."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class Bounded:
    """Hands work to threads, and waits where they lag behind; errors of it come from here."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._running: deque[Future[None]] = deque()

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        if len(self._running) >= WORKERS:
            self._running.popleft().result()
        self._running.append(self._pool.submit(function, *args))

    def finish(self) -> None:
        while self._running:
            self._running.popleft().result()


def target(out: Path, kind: str, source: Source) -> Path:
    """The file of this kind of result, or of a video's frames the folder."""
    path = out / kind / source.name
    if source.is_video and kind != "overlay":
        return path
    return path.with_name(f"{path.name}.{'mp4' if source.is_video else 'png'}")


def check_out(sources: Sequence[Source], out: Path) -> None:
    """UsageError if an input lies in --out, where its neighbours may be labels drawn by hand."""
    # as it is written and without symbolic links
    places = {out.absolute(), out.resolve()}
    for source in sources:
        if not places.isdisjoint([*source.path.absolute().parents, *source.path.resolve().parents]):
            raise UsageError(
                f"--out {out} holds the input {source.path}; choose a folder of its own for results"
            )


def check_classes(path: Path, ours: bytes) -> None:
    """UsageError if the list of classes is there and another one."""
    if path.exists() and path.read_bytes() != ours:
        raise UsageError(
            f"{path} lists other classes than this network's; choose another --out, or remove it"
        )


def check_targets(sources: Sequence[Source], out: Path, kinds: Sequence[str]) -> None:
    """UsageError if a result would replace an input or another result."""
    inputs = {source.path.resolve() for source in sources}
    owners: dict[Path, Source] = {}
    for source, kind in itertools.product(sources, kinds):
        path = target(out, kind, source)
        if path.resolve() in inputs:
            raise UsageError(f"{path} is an input and would be replaced; choose another --out")
        other = owners.setdefault(path, source)
        if other is not source:
            raise UsageError(
                f"{other.path} and {source.path} would both be written to {path}; predict them in "
                "two runs with different --out"
            )
    for path, source in owners.items():
        for folder in path.parents:
            if folder in owners:
                raise UsageError(
                    f"{owners[folder].path} and {source.path} would both be written into {folder}; "
                    "predict them in two runs with different --out"
                )


def check_refinement(args: argparse.Namespace, model: PointRend, kinds: Sequence[str]) -> None:
    """UsageError if something is asked of a refinement that does not take place."""
    if model.point_head is not None and not args.coarse:
        return
    why = "--coarse" if args.coarse else f"{args.checkpoint}, which has no point head,"
    asked = [f"--{name}" for name in ("steps", "points") if getattr(args, name) is not None]
    asked += [f"--write {kind}" for kind in ("points", "compare") if kind in kinds]
    if asked:
        raise UsageError(f"{asked[0]} needs the refinement; {why} does without")


def describe(model: PointRend) -> Classes:
    """The classes as the checkpoint names them, else as a published data set of their number."""
    count = max(2, model.config.num_classes)
    names, colours, published = model.classes, model.palette, None
    for config, data in PUBLISHED.items():
        if len(data.CLASSES) == count and _agree(names, data.CLASSES):
            published = config
            names = names or data.CLASSES
            colours = colours or data.PALETTE.tolist()
    return Classes(
        tuple(name.strip() for name in names or [f"class {i}" for i in range(count)]),
        np.array(colours or [default_colour(i) for i in range(count)], np.uint8),
        published,
    )


def _agree(names: Sequence[str] | None, published: Sequence[str]) -> bool:
    """Whether no names are known or most are the published ones; versions differ in a few."""
    if names is None:
        return True
    same = sum(name.strip() == other for name, other in zip(names, published, strict=True))
    return 2 * same > len(published)


def published_scale(published: str | None) -> Scale | None:
    return load_config(published).data.test_scale if published else None


def introduction(
    args: argparse.Namespace, model: PointRend, classes: Classes, device: torch.device
) -> str:
    """What is about to happen, in a line."""
    origin = f" ({classes.published.partition('_')[0]})" if classes.published else ""
    size = "x".join(map(str, args.scale)) if args.scale else "none, pictures keep their size"
    return (
        f"R-{model.config.depth}, {len(classes.names)} classes{origin}, {device}, {args.dtype}; "
        f"scale {size}"
    )


def table(classes: Classes) -> bytes:
    """The classes as a CSV table, which `data.io.read_classes` reads."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["index", "name", "r", "g", "b"])
    for index, (name, colour) in enumerate(zip(classes.names, classes.colours, strict=True)):
        rows.writerow([index, name, *colour.tolist()])
    return text.getvalue().encode()


def naming(path: Path, error: Exception) -> str:
    """The error, with the file that it is about at the front."""
    text = str(error) or type(error).__name__
    return text if text.startswith(str(path)) else f"{path}: {text}"


if __name__ == "__main__":
    sys.exit(main())
