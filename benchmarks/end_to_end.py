"""Images to labels as users get them: how fast, in how much memory, how equal to plain fp32.

    python -m benchmarks.end_to_end                                # the four published models
    python -m benchmarks.end_to_end --models ade20k_r50 --out runs/benchmarks
    python -m benchmarks.end_to_end --models cityscapes_r50 --checkpoint FILE.pth
    python -m benchmarks.end_to_end --device cpu --models --peer ENV/bin/python
    python -m benchmarks.end_to_end --quick --device cpu           # tiny networks and sizes

The protocol of the published speeds: from a normalised image on the host, through network,
refinement, resampling to the image's own size and argmax, to labels on the host, one at a time;
Cityscapes at 1024x2048, ADE20K at 512x683 for an image of 768x1024. A waterfall: plain fp32, and
then one setting more in each variant; then the last of them without the point head (its coarse map
decoded by the fused operation, or by interpolation and argmax), and in batches of 8. Of ResNet-101,
the first and the last variant run.

Variants take turns in rounds of random order, after the same warm-up, so that a drifting clock hits
all alike. Memory is what PyTorch reserves of the GPU for a variant that is warm and called once
more: weights, maps, what a graph keeps. "device_ms" is the time between two events on the GPU, with
the image there: it judges what the point head costs. Where nothing is captured, it has gaps in
which the GPU waits for Python. "agreement" is the share of pixels that get plain fp32's label.
Weights are random unless --checkpoint is given: speed does not depend on them, agreement does, for
random networks have more near ties than trained ones.

--peer compares with the real mmsegmentation on the CPU, see benchmarks/peer.py; with no name after
--models, that is all that runs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import end_to_end_report, inputs, peer, record
from benchmarks.harness import DTYPES, EFFORTS, Timer
from pointrend_triton import Predictor, from_checkpoint, ops, precision
from pointrend_triton.checkpoint import CheckpointError
from pointrend_triton.config import ConfigError, load_config
from pointrend_triton.inference import pick_device
from pointrend_triton.models.pointrend import PointRend
from pointrend_triton.report import to_json
from pointrend_triton.visualize import write_atomic

Size = tuple[int, int]


@dataclass(frozen=True)
class Protocol:
    """What a model is measured at, and what it is held to.

    Attributes:
        image_size: (height, width) of the network's input.
        size: of the labels.
        published_fps: mmsegmentation's model zoo, one V100, PyTorch 1.5, fp32.
        goal_fps: at batch 1, by the last variant, on an H200.
        goal_percent: by how much the point head may slow the network down there.
    """

    image_size: Size
    size: Size
    published_fps: float
    goal_fps: float | None
    goal_percent: float


CITYSCAPES, ADE20K = ((1024, 2048), (1024, 2048)), ((512, 683), (768, 1024))
PROTOCOLS = {
    "cityscapes_r50": Protocol(*CITYSCAPES, 8.48, 250, 3),
    "ade20k_r50": Protocol(*ADE20K, 17.31, 700, 10),
    "cityscapes_r101": Protocol(*CITYSCAPES, 7.00, None, 3),
    "ade20k_r101": Protocol(*ADE20K, 15.50, None, 10),
}

# what each variant adds to those before it
WATERFALL: dict[str, dict[str, Any]] = {
    "fp32": {
        **dict.fromkeys(("tf32", "channels_last", "fold", "compile", "graphs"), False),
        **{"dtype": "fp32", "backend": "reference", "refine": True},
    },
    "tf32": {"tf32": True},  # of all layers, which are convolutions: PyTorch's default
    "bf16": {"dtype": "bf16"},
    "channels-last": {"channels_last": True},
    "BN folded": {"fold": True},
    "compiled": {"compile": True},
    "kernels": {"backend": "auto"},
    "CUDA graph": {"graphs": True},
}
WITHOUT_HEAD = {
    "no point head": {"refine": False},
    "no point head, dense decode": {"refine": False, "backend": "reference"},
}
NOT_ON_A_CPU = {
    "tf32": "a CPU has none",
    "kernels": "they run on a GPU",
    "CUDA graph": "it needs a GPU",
    "no point head, dense decode": "a CPU decodes so already",
}
BATCH = 8
WARM_UP, ROUNDS = 3, 4
SECONDS = {"cuda": 1.0, "cpu": 2.0}
# of --quick
TINY = {"depth": 18, "base_channels": 8, "fpn_channels": 16, "head_channels": 8}
TINY_HEAD = {"channels": 16, "subdivision_num_points": 64}


@dataclass(frozen=True)
class Row:
    """One variant of a model. What a CPU has not is None there; all is where there is an error.

    Attributes:
        settings: the Predictor's, "tf32", the "backend" of the operations, and whether to "refine".
        ms_*: of a call, from the host to the host: percentiles over `calls`.
        device_ms: between two events around a call, with the image on the GPU, the median. Without
            "graphs" it spans the gaps in which the GPU waits for Python.
        images_per_second: by the median.
        peak_memory_mib: reserved by PyTorch during a call after the first ones, beyond what was
            before the variant was made: its weights and maps, and all that its graph keeps.
        agreement: share of the pixels whose label is that of plain fp32, with or without the point
            head as here.
        first_seconds: of making the variant and of its first calls: compiling, tuning, capturing.
    """

    model: str
    variant: str
    batch: int
    settings: Mapping[str, Any]
    ms_median: float | None = None
    ms_p10: float | None = None
    ms_p90: float | None = None
    ms_p99: float | None = None
    device_ms: float | None = None
    calls: int | None = None
    images_per_second: float | None = None
    peak_memory_mib: float | None = None
    agreement: float | None = None
    first_seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A figure beside its goal.

    Attributes:
        goal: on an H200, where there is one.
        met: whether it is; None where there is no goal or this is no H200.
        published_v100: what mmsegmentation's model zoo says of a V100 and fp32.
    """

    what: str
    value: float
    goal: float | None
    met: bool | None
    published_v100: float | None = None


def plan(model: str, device: torch.device, quick: bool) -> tuple[list[list[Row]], list[str]]:
    """The variants, in groups that are measured together, and those left out, with why."""
    reasons = {} if device.type == "cuda" else dict(NOT_ON_A_CPU)
    if quick:
        reasons["compiled"] = "it takes too long for --quick"
    left_out = [f"{name}: {reason}" for name, reason in reasons.items()]

    rows, settings = [], {}
    for name, added in WATERFALL.items():
        if name not in reasons:
            settings = {**settings, **added}
            rows.append(Row(model, name, 1, settings))
    if model.endswith("r101"):
        left_out += [f"{row.variant} of ResNet-101: see ResNet-50" for row in rows[1:-1]]
        rows = [rows[0], rows[-1]]
    last = rows[-1]
    rows += [
        replace(last, variant=name, settings={**settings, **changed})
        for name, changed in WITHOUT_HEAD.items()
        if name not in reasons
    ]
    if device.type != "cuda":
        return [rows], [*left_out, "batches: a CPU is busy with one image"]
    kept = (rows[0], last, next(row for row in rows if row.variant == "no point head"))
    return [rows, [replace(row, batch=BATCH) for row in kept]], left_out


@contextlib.contextmanager
def as_set(settings: Mapping[str, Any]) -> Iterator[None]:
    """What a variant sets outside of its Predictor."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        with precision.tf32(bool(settings["tf32"])), ops.backend(settings["backend"]):
            yield
    finally:
        cudnn.benchmark = before


@dataclass
class Variant:
    """A row made ready to run, and what was measured of it."""

    row: Row
    run: Callable[[Tensor], Tensor]
    times: list[float] = field(default_factory=list)  # ms
    device_times: list[float] = field(default_factory=list)


def prepare(
    row: Row, model: PointRend, images: Tensor, size: Size, device: torch.device
) -> Variant:
    """Makes the variant and warms it up; the row gets memory and `first_seconds`."""
    before = reserved(device)
    start = time.perf_counter()
    options = {name: row.settings[name] for name in ("fold", "channels_last", "compile", "graphs")}
    predictor = Predictor(model, dtype=DTYPES[row.settings["dtype"]], **options)

    def run(images: Tensor) -> Tensor:
        return predictor(images, size, refine=row.settings["refine"])

    for _ in range(WARM_UP):
        run(images).cpu()
    row = replace(row, first_seconds=time.perf_counter() - start)
    if device.type == "cuda":
        reserved(device)  # what trials of algorithms and of kernels left goes back
        torch.cuda.reset_peak_memory_stats(device)
        run(images).cpu()
        peak = torch.cuda.max_memory_reserved(device) - before
        row = replace(row, peak_memory_mib=peak / 2**20)
    return Variant(row, run)


def reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds of a GPU for what is alive, with all that graphs keep."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def measure(
    rows: Sequence[Row], model: PointRend, protocol: Protocol, seconds: float, timer: Timer
) -> list[Row]:
    """The rows with their measurements, or with the error that prevented them.

    Args:
        rows: of one model and batch; the first one is plain fp32.
        seconds: what a row's rounds may take together.
    """
    device = timer.device
    # of the rows before: compiled functions count towards a limit, graphs hold memory
    torch.compiler.reset()
    reserved(device)
    try:
        there = inputs.images((rows[0].batch, 3, *protocol.image_size), device)
        images = there.cpu().pin_memory() if device.type == "cuda" else there
        with as_set(rows[0].settings):
            plain = Predictor(model, fold=False, channels_last=False)
            exact = {refine: plain(there, protocol.size, refine=refine) for refine in (True, False)}
            del plain
    except Exception as error:  # with nothing to compare with, the group is lost, not the others
        return [replace(row, error=f"plain fp32: {_text(error)}") for row in rows]
    done = list(rows)
    ready: dict[int, Variant] = {}
    title = f"{rows[0].model}, batch {rows[0].batch}"
    for number, row in enumerate(tqdm(rows, desc=title, leave=False, disable=None)):
        try:
            with as_set(row.settings):
                variant = prepare(row, model, images, protocol.size, device)
                same = variant.run(there) == exact[row.settings["refine"]]
                variant.row = replace(variant.row, agreement=same.float().mean().item())
            ready[number] = variant
        except Exception as error:  # one variant that cannot run must not end the run of all
            done[number] = replace(row, error=_text(error))
    turns = random.Random(0)
    for _ in range(ROUNDS):
        for number in turns.sample(sorted(ready), len(ready)):
            try:
                with as_set(rows[number].settings):
                    take_turn(ready[number], images, there, seconds / ROUNDS, timer)
            except Exception as error:
                done[number] = replace(rows[number], error=_text(error))
                del ready[number]
    for number, variant in ready.items():
        done[number] = summed_up(variant)
    return done


def take_turn(
    variant: Variant, images: Tensor, there: Tensor, seconds: float, timer: Timer
) -> None:
    """One block of calls; the first one is not counted, since it follows another variant."""
    first = host_ms(variant.run, images)
    cuda = timer.device.type == "cuda"
    count = max(1, min(200, int(1e3 * seconds / first / (2 if cuda else 1))))
    variant.times += [host_ms(variant.run, images) for _ in range(count)]
    if cuda:
        variant.device_times += [us / 1e3 for us in timer.times(lambda: variant.run(there), count)]


def host_ms(run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.perf_counter()
    run(images).cpu()
    return 1e3 * (time.perf_counter() - start)


def summed_up(variant: Variant) -> Row:
    row = variant.row
    p10, median, p90, p99 = (float(ms) for ms in np.percentile(variant.times, [10, 50, 90, 99]))
    return replace(
        row,
        ms_median=median,
        ms_p10=p10,
        ms_p90=p90,
        ms_p99=p99,
        device_ms=float(np.median(variant.device_times)) if variant.device_times else None,
        calls=len(variant.times),
        images_per_second=1e3 * row.batch / median,
    )


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def verdicts(rows: Sequence[Row], protocol: Protocol, judged: bool) -> list[Verdict]:
    """What a model's last variant reaches, beside its goals; they are for an H200 and a graph."""
    alone = {row.variant: row for row in rows if row.batch == 1 and row.error is None}
    last = [row for variant, row in alone.items() if variant in WATERFALL][-1:]
    found = []
    for row in last:
        judged = judged and row.variant == "CUDA graph"
        start, fps, goal = f"{row.model}, {row.variant},", row.images_per_second, protocol.goal_fps
        assert fps is not None
        met = fps >= goal if judged and goal else None
        published = protocol.published_fps
        found.append(Verdict(f"{start} images per second", fps, goal, met, published))
        for variant, changed in WITHOUT_HEAD.items():
            # where the last variant failed, the one before it differs by more than the point head
            if variant in alone and alone[variant].settings == {**row.settings, **changed}:
                percent = percent_slower(row, alone[variant])
                goal = protocol.goal_percent if variant == "no point head" else None
                met = percent <= goal if judged and goal else None
                what = f"{start} percent slower than with {variant}"
                found.append(Verdict(what, percent, goal, met))
    return found


def percent_slower(row: Row, other: Row) -> float:
    """Of the times on the device, where there are any."""
    both = (row.device_ms, other.device_ms)
    if None in both:
        both = (row.ms_median, other.ms_median)
    ours, theirs = both
    assert ours is not None and theirs is not None
    return 100 * (ours / theirs - 1)


def make_model(name: str, checkpoint: Path | None, quick: bool) -> PointRend:
    """Raises CheckpointError for a file of another network than the one named."""
    config = load_config(name).model
    if checkpoint is not None:
        model = from_checkpoint(checkpoint)
        for field_name in ("depth", "num_classes"):
            ours, its = getattr(config, field_name), getattr(model.config, field_name)
            if its != ours:
                raise CheckpointError(f"{checkpoint} has {field_name} {its}, {name} has {ours}")
        return model
    if quick:
        assert config.point_head is not None
        config = replace(config, **TINY, point_head=replace(config.point_head, **TINY_HEAD))
    return inputs.network(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, 1 where a variant failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    try:
        return run(args, shlex.join(["python", "-m", "benchmarks.end_to_end", *argv]))
    except (CheckpointError, ConfigError, OSError, peer.PeerError) as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("end_to_end: interrupted; what was written is whole", file=sys.stderr)
        return 130


def run(args: argparse.Namespace, command: str) -> int:
    device: torch.device = args.device
    if device.index is not None:
        torch.cuda.set_device(device)
    timer = Timer(device, EFFORTS["quick" if args.quick else device.type])
    protocols = {name: shrunk(PROTOCOLS[name], args.quick) for name in args.models}
    plans = {name: plan(name, device, args.quick) for name in args.models}
    head = {
        **record.header(device, command),
        **{"threads": torch.get_num_threads(), "cudnn_benchmark": True},
        "protocols": {name: asdict(protocol) for name, protocol in protocols.items()},
        "weights": args.checkpoint.name if args.checkpoint else "random",
        "left_out": list(dict.fromkeys(text for _, texts in plans.values() for text in texts)),
    }
    rows: list[dict[str, Any]] = []
    found: list[Verdict] = []
    compared: list[peer.Row] = []

    def write() -> None:
        """After each group and each case: what ends the run leaves whole files of those before."""
        result = {**head, "verdicts": found, "rows": rows, "peer": compared}
        write_atomic(args.out / "end_to_end.json", to_json(result))
        if rows:
            write_atomic(args.out / "end_to_end.png", end_to_end_report.draw(head, rows))

    judged = "H200" in str(head["device"]) and not args.quick
    for name in args.models:
        model = make_model(name, args.checkpoint, args.quick).to(device)
        for group in plans[name][0]:
            measured = measure(group, model, protocols[name], args.seconds, timer)
            rows += [asdict(row) for row in measured]
            found += verdicts(measured, PROTOCOLS[name], judged)  # of batch 1, which is one group
            write()
    if args.peer:
        for case in peer.compare(args.peer, args.quick):
            compared += case
            write()
    print(f"{head['device']}, PyTorch {torch.__version__}, {head['date']}")
    if rows:
        print(end_to_end_report.table(rows, head["left_out"]))
        print(end_to_end_report.sentences([asdict(verdict) for verdict in found]))
    if compared:
        print(peer.table(compared))
    return int(any(row["error"] for row in rows) or any(row.error for row in compared))


def shrunk(protocol: Protocol, quick: bool) -> Protocol:
    if not quick:
        return protocol
    image_size, size = (
        (-(-height // 16), -(-width // 16))
        for height, width in (protocol.image_size, protocol.size)
    )
    return replace(protocol, image_size=image_size, size=size)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="*", default=list(PROTOCOLS), metavar="NAME", help="by default all four")
    add("--checkpoint", type=Path, metavar="FILE", help="the weights of the one model named")
    add(
        "--peer",
        metavar="PYTHON",
        help="of an environment with mmsegmentation 1.x, to compare with",
    )
    add("--seconds", type=float, help="of timed calls per variant (default: 1, on a CPU 2)")
    add("--quick", action="store_true", help="tiny networks and sizes, nothing compiled")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/benchmarks"),
        help="where end_to_end.json and .png are written (default: runs/benchmarks)",
    )
    args = parser.parse_args(argv)
    for name in args.models:
        if name not in PROTOCOLS:
            parser.error(f"--models {name}: choose of {', '.join(PROTOCOLS)}")
    if args.checkpoint and len(args.models) != 1:
        parser.error("--checkpoint holds the weights of one model: name it by --models")
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device {error}")
    if args.seconds is None:
        args.seconds = 0 if args.quick else SECONDS[args.device.type]
    return args


if __name__ == "__main__":
    sys.exit(main())
