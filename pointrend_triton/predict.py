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
Results of an earlier run are replaced, inputs never. A file that cannot be read does not stop the
others: it is named at the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from pointrend_triton.checkpoint import CheckpointError, from_checkpoint
from pointrend_triton.config import load_config
from pointrend_triton.data import DataError, ade20k, cityscapes
from pointrend_triton.data.io import default_colour
from pointrend_triton.inference import pick_device
from pointrend_triton.models.pointrend import PointRend
from pointrend_triton.predictor import Predictor
from pointrend_triton.segment import KINDS, Prediction, Prepared, Segmenter, draw
from pointrend_triton.sources import Source, find, read_picture
from pointrend_triton.video import VideoReader, VideoWriter
from pointrend_triton.visualize import save_png, write_atomic

Image = npt.NDArray[np.uint8]
Scale = tuple[int, int]
Item = TypeVar("Item")
Result = TypeVar("Result")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the published data sets, by a configuration that has their test scale
PUBLISHED = {"cityscapes_r50": cityscapes, "ade20k_r50": ade20k}
# threads that read and as many that write while the network runs
WORKERS = min(4, os.cpu_count() or 1)


class UsageError(ValueError):
    """Arguments that do not fit each other or the files they name."""


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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        failures = predict(args)
    except (UsageError, CheckpointError, DataError, OSError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"predict: interrupted; what is in {args.out} is whole", file=sys.stderr)
        return 130
    if failures:
        print(f"predict: {len(failures)} could not be predicted:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure}", file=sys.stderr)
    return 1 if failures else 0


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
        help="what the network computes in; default: float32, as published",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile the network: pays off for many pictures of one size, or a video",
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


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


def predict(args: argparse.Namespace) -> list[str]:
    """Writes all results -> why inputs failed, a line for each."""
    kinds = tuple(dict.fromkeys(args.write))
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file; it must name a folder")
    sources = find(args.inputs, [args.out / kind for kind in KINDS])
    check_targets(sources, args.out, kinds)
    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise UsageError(f"--device {error}") from None
    model = from_checkpoint(args.checkpoint)
    check_refinement(args, model, kinds)
    classes = describe(model)
    if args.scale == "auto":
        args.scale = published_scale(classes.published)
    print(introduction(args, model, classes, device))

    predictor = Predictor(model.to(device), dtype=DTYPES[args.dtype], compile=args.compile)
    write_atomic(args.out / "classes.csv", table(classes))
    start = time.perf_counter()
    with tqdm(total=0, unit="image", leave=False, disable=None) as bar:
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
        done, failures = predict_all(Job(segmenter, classes.colours, kinds, args.out), sources, bar)
    seconds = time.perf_counter() - start
    places = ", ".join(str(args.out / kind) for kind in kinds)
    images = "image" if done == 1 else "images"
    print(f"{done} {images} in {seconds:.1f} s, {done / seconds:.2f} images/s: {places}")
    return failures


def predict_all(job: Job, sources: Sequence[Source], bar: Any) -> tuple[int, list[str]]:
    """Pictures, then videos -> how many images, and why some failed."""
    pictures = [source for source in sources if not source.is_video]
    bar.total = len(pictures)
    failures = predict_pictures(job, pictures, bar)
    done = len(pictures) - len(failures)
    for source in sources:
        if source.is_video:
            try:
                done += predict_video(job, source, bar)
            except DataError as error:
                failures.append(str(error))
    return done, failures


def predict_pictures(job: Job, sources: Sequence[Source], bar: Any) -> list[str]:
    """Reads, predicts and writes pictures -> why some failed."""
    failures = []
    with threads(WORKERS) as reading, threads(WORKERS) as writing:
        results = Bounded(writing)
        for source, loading in zip(sources, ahead(reading, job.load, sources), strict=True):
            try:
                prediction = job.segmenter(loading.result())
            except (DataError, OSError) as error:
                failures.append(naming(source.path, error))
            else:
                results.submit(job.write, source, prediction)
            bar.set_postfix_str("", refresh=False)
            bar.update()
        results.finish()
    return failures


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
            for loading in ahead(reading, load, itertools.count()):
                prepared = loading.result()
                if prepared is None:
                    break
                count += 1
                try:
                    prediction = job.segmenter(prepared)
                except DataError as error:
                    raise DataError(naming(source.path, error)) from None
                results.submit(job.write_frame, source, video, count, prediction)
                bar.update()
            results.finish()
        if not count:
            raise DataError(f"{source.path}: OpenCV can decode none of its frames")
        if count < reader.frames:
            tqdm.write(
                f"note: {source.path} announces {reader.frames} frames, {count} could be read",
                file=sys.stderr,
            )
    return count


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that finish what they have begun, and nothing more, if an error comes."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Future[Result]]:
    """`function` of each item, in order; a few of them run ahead of their use."""
    remaining = iter(items)
    running = deque(pool.submit(function, item) for item in itertools.islice(remaining, WORKERS))
    while running:
        future = running.popleft()
        running.extend(pool.submit(function, item) for item in itertools.islice(remaining, 1))
        yield future


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
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


if __name__ == "__main__":
    sys.exit(main())
