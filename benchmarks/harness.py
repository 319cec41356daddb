"""The one place that times: a `Case` in, rows out, one for each way to compute it and to launch it.

Variants: "eager" (plain PyTorch as users write it, `benchmarks/stock.py`), "autocast" (the same
under torch.autocast, for 16-bit maps), "compiled" (torch.compile of eager), "ours" (the Triton
kernels), and on a CPU "reference" (`pointrend_triton.reference`). Eager and ours run on maps of
both memory layouts and the faster counts. On a GPU each is launched from Python and replayed from a
CUDA graph, with the L2 cache flushed before every repetition and without.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import record
from benchmarks.floors import Work
from benchmarks.inputs import Sizes, scaled
from pointrend_triton import ops, precision
from pointrend_triton.inference import pick_device

Inputs = dict[str, Any]  # tensors, or lists of tensors
Function = Callable[[Inputs, Sizes], Any]
Run = Callable[[], Any]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bool": torch.bool,
    "int64": torch.int64,
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DIRECTIONS = ("forward", "backward", "both")
COMPILER = "inductor"
# unless asked for: CPUs compute slowly with 16 bits
CPU_DTYPES = ("fp32", "bool", "int64")


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        name: for --only and tables.
        sizes: at full size; `inputs.scaled` makes them smaller for a CPU.
        make: (sizes, dtype of the maps, device) -> inputs, the maps contiguous.
        stock: (inputs, sizes) -> tensors, in plain PyTorch.
        ours: the same by `pointrend_triton.ops`.
        work: (sizes, bytes of an element of a map) -> the least work of each direction.
        dtypes: types of the maps.
        maps: the inputs that are tried in both memory layouts.
        wrt: the inputs that get a gradient; where there are none, only forward is timed.
        comparable: (inputs, result) -> what must agree with the reference.
        extra: further variants by name, forward only, in the last layout.
    """

    name: str
    sizes: dict[str, int]
    make: Callable[[Sizes, torch.dtype, torch.device], Inputs]
    stock: Function
    ours: Function
    work: Callable[[Sizes, int], dict[str, Work]]
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    maps: tuple[str, ...] = ()
    wrt: tuple[str, ...] = ()
    comparable: Callable[[Inputs, Any], Any] = lambda inputs, result: result
    extra: Mapping[str, Function] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """What this machine does at best, measured in the same run. A copy's bytes count twice."""

    copy_gb_per_s: float
    matmul_tflop_per_s: dict[str, float]
    l2_gb_per_s: float | None = None

    def matmul(self, dtype: str) -> float:
        return self.matmul_tflop_per_s.get(dtype, self.matmul_tflop_per_s["fp32"])


@dataclass(frozen=True)
class Row:
    """One measurement. Fields of a GPU are None on a CPU, times are None where there is an error.

    Attributes:
        sizes: those that ran, which on a CPU are not the case's own.
        dtype: of the maps.
        direction: "forward", "backward" alone, or "both".
        layout: of the maps.
        launched: "eager" (from Python), "graph" (a CUDA graph replayed) or "interpreter" (Triton's
            own, on a CPU: its time means nothing).
        flushed: whether the L2 cache was flushed before each repetition.
        bytes: the least an implementation moves, each byte once.
        flops: of its matrix products; other arithmetic is not counted.
        gb_per_s, tflop_per_s: those over the median.
        floor_us, bound: the longer of bytes over the copy rate ("memory") and flops over the rate
            of matrix products ("arithmetic"): an estimate.
        percent_of_floor: 100 floor_us / median_us; 100 is as fast as the estimate allows.
        l2_us: bytes that must pass the L2 cache over its rate, where the case counts them.
        launches: kernels, copies and fills on the GPU per call.
        peak_mib: memory allocated during a call beyond what was there before, results included.
        difference: from the reference: the largest difference over the largest value, the worst of
            all results; of labels and other whole numbers, the share that differs.
        best: the faster layout of this variant.
        speedup: eager's best layout over this median, launched and flushed the same way.
    """

    op: str
    case: str
    sizes: Sizes
    dtype: str
    direction: str
    variant: str
    layout: str
    launched: str = "eager"
    flushed: bool | None = None
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    repetitions: int | None = None
    bytes: float | None = None
    flops: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    floor_us: float | None = None
    bound: str | None = None
    percent_of_floor: float | None = None
    l2_us: float | None = None
    launches: int | None = None
    peak_mib: float | None = None
    difference: float | None = None
    best: bool = False
    speedup: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Effort:
    """Repetitions of a row: as many as take `seconds`, within `least` and `most`."""

    seconds: float
    least: int
    most: int

    def repetitions(self, seconds_each: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(seconds_each, 1e-9))))


EFFORTS = {"cuda": Effort(0.03, 10, 100), "cpu": Effort(0.2, 3, 20), "quick": Effort(0, 2, 2)}


class Timer:
    """Times callables on a device; microseconds."""

    def __init__(self, device: torch.device, effort: Effort):
        self.device, self.effort = device, effort
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush_buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def modes(self, make: Callable[[], Run]) -> Iterator[tuple[str, bool | None, list[float]]]:
        """(launched, flushed, times) for each way to launch what `make` makes."""
        run = make()
        if self.device.type == "cpu":
            yield "eager", None, self.times(run)
            return
        replay, _kept = capture(make)
        for launched, launch in (("eager", run), ("graph", replay)):
            for flushed in (True, False):
                yield launched, flushed, self.times(launch, flushed=flushed)

    def times(self, run: Run, count: int | None = None, *, flushed: bool = False) -> list[float]:
        """`count` repetitions, by default as many as the effort allows after a first one."""
        if count is None:
            run()
            self._synchronize()
            start = time.perf_counter()
            run()
            self._synchronize()
            count = self.effort.repetitions(time.perf_counter() - start)
        if self.device.type != "cuda":
            return [self._seconds(run) * 1e6 for _ in range(count)]
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for start_event, end_event in events:
            if flushed:
                self.flush_buffer.zero_()
            start_event.record()
            run()
            end_event.record()
        self._synchronize()
        return [1e3 * start_event.elapsed_time(end_event) for start_event, end_event in events]

    def launches(self, run: Run) -> int | None:
        """What a call puts on the GPU, counted; None on a CPU."""
        if self.device.type != "cuda":
            return None
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            run()
            self._synchronize()
        return sum(
            event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or ()
        )

    def peak_mib(self, run: Run) -> float | None:
        """Memory a call needs beyond what is there; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self._synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self._synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def _seconds(self, run: Run) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def capture(make: Callable[[], Run]) -> tuple[Run, Any]:
    """What `make` makes, as a CUDA graph: its replay, and the results that live in its memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()  # here, because a backward runs on the stream of its forward
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()
    return graph.replay, (run, kept)


def measure(
    op: str,
    case: Case,
    dtype: str,
    timer: Timer,
    rates: Rates,
    *,
    level: str = "full",
    compiled: bool = False,
    before: Sequence[Row] = (),
) -> list[Row]:
    """All rows of a case in one type of map.

    Args:
        level: of the sizes, see `inputs.scaled`.
        compiled: measure "compiled" alone, in the layout in which eager was faster among the rows
            `before`; else every other variant.
    """
    sizes = scaled(case.sizes, level)
    torch.manual_seed(0)
    made = case.make(sizes, DTYPES[dtype], timer.device)
    layouts = list(LAYOUTS) if case.maps else ["nchw"]
    inputs = {name: _laid_out(made, case, LAYOUTS[name]) for name in layouts}
    directions = DIRECTIONS if case.wrt else DIRECTIONS[:1]
    work = case.work(sizes, DTYPES[dtype].itemsize)
    with ops.backend("reference"):
        expected = {
            direction: case.comparable(
                made, runner(case, direction, case.ours, inputs["nchw"], sizes)()
            )
            for direction in directions
        }

    rows = []
    for variant, function in _variants(case, dtype, timer.device, level, compiled).items():
        extra = variant in case.extra
        for layout in _layouts_of(variant, layouts, case, dtype, before, extra):
            for direction in directions[: 1 if extra else None]:
                row = Row(op, case.name, sizes, dtype, direction, variant, layout)
                make = partial(runner, case, direction, function, inputs[layout], sizes)
                exact = None if extra else expected[direction]
                with ops.backend("triton" if variant == "ours" else "reference"):
                    rows += [
                        derived(found, work[direction], rates)
                        for found in _measure_one(row, make, timer, case, inputs[layout], exact)
                    ]
    return rows


def runner(case: Case, direction: str, function: Function, inputs: Inputs, sizes: Sizes) -> Run:
    """A callable without arguments that goes in one direction; gradients are its result."""
    if not case.wrt:
        return partial(torch.no_grad()(function), inputs, sizes)
    if direction == "forward":
        return partial(function, inputs, sizes)
    leaves = [tensor for name in case.wrt for tensor in _tensors(inputs[name])]
    result = function(inputs, sizes)
    gradient = _gradient(result)
    if direction == "backward":
        return partial(torch.autograd.grad, result, leaves, gradient, retain_graph=True)
    return lambda: torch.autograd.grad(function(inputs, sizes), leaves, gradient)


def _gradient(output: Tensor) -> Tensor:
    """The same random gradient for every variant; ones for a loss."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output)


def _measure_one(
    row: Row, make: Callable[[], Run], timer: Timer, case: Case, inputs: Inputs, exact: Any
) -> Iterator[Row]:
    try:
        # a compiled function may otherwise free what a second backward needs
        with torch._functorch.config.patch(donated_buffer=False):
            run = make()
            start = time.perf_counter()
            result = run()
            if exact is not None:
                row = replace(row, difference=difference(case.comparable(inputs, result), exact))
            if row.variant == "ours" and timer.device.type == "cpu":
                us = 1e6 * (time.perf_counter() - start)
                yield replace(row, launched="interpreter", **statistics([us]))
                return
            run()  # once more before it is counted: the first calls compile and tune
            row = replace(row, launches=timer.launches(run), peak_mib=timer.peak_mib(run))
            for launched, flushed, times in timer.modes(make):
                yield replace(row, launched=launched, flushed=flushed, **statistics(times))
    except Exception as error:  # one variant that cannot run must not end the run of all
        yield replace(row, error=" ".join(f"{type(error).__name__}: {error}".split())[:500])


def _variants(
    case: Case, dtype: str, device: torch.device, level: str, compiled: bool
) -> dict[str, Function]:
    if compiled:
        torch.compiler.reset()
        return {"compiled": torch.compile(case.stock, backend=COMPILER, dynamic=False)}
    variants = {"eager": case.stock}
    if dtype in ("bf16", "fp16"):
        variants["autocast"] = torch.autocast(device.type, DTYPES[dtype])(case.stock)
    if device.type == "cpu":
        variants["reference"] = case.ours
    # the interpreter takes minutes for more than the smallest sizes
    if device.type == "cuda" or (level == "quick" and triton_runs(device)):
        variants["ours"] = case.ours
    return {**variants, **case.extra}


def triton_runs(device: torch.device) -> bool:
    """Whether the kernels run there; on a CPU they do in Triton's interpreter."""
    one = torch.zeros(1, 1, 1, 1, device=device)
    try:
        with ops.backend("triton"):
            ops.decode(one)
    except RuntimeError:
        return False
    return True


def _layouts_of(
    variant: str,
    layouts: Sequence[str],
    case: Case,
    dtype: str,
    before: Sequence[Row],
    extra: bool,
) -> Sequence[str]:
    if extra:
        return layouts[-1:]
    if variant != "compiled":
        return layouts
    best = [
        row.layout
        for row in before
        if row.best and (row.case, row.dtype, row.variant) == (case.name, dtype, "eager")
    ]
    return best[-1:] or layouts[:1]


def _laid_out(made: Inputs, case: Case, layout: torch.memory_format) -> Inputs:
    """The inputs with their maps in one layout, as leaves where they get a gradient."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        if name in case.maps:
            tensor = tensor.contiguous(memory_format=layout)
        return tensor.detach().requires_grad_(name in case.wrt)

    return {
        name: [convert(name, tensor) for tensor in value]
        if isinstance(value, list)
        else convert(name, value)
        for name, value in made.items()
    }


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a result, Nones left out."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for tensor in value if tensor is not None]


def difference(result: Any, exact: Any) -> float:
    """How far a result is from the reference; see `Row`."""
    worst = 0.0
    for ours, theirs in zip(_tensors(result), _tensors(exact), strict=True):
        if not theirs.numel():
            continue
        if theirs.is_floating_point():
            theirs = theirs.double()
            off = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)
        else:
            off = (ours.long() != theirs.long()).double().mean()
        worst = max(worst, off.item()) if off.isfinite() else float("nan")
        if worst != worst:
            break
    return worst


def statistics(times: Sequence[float]) -> dict[str, Any]:
    """Median and percentiles of microseconds, as fields of a row."""
    p10, median, p90 = (float(value) for value in np.percentile(times, [10, 50, 90]))
    return {"median_us": median, "p10_us": p10, "p90_us": p90, "repetitions": len(times)}


def floor(work: Work, dtype: str, rates: Rates) -> tuple[float, str]:
    """The least microseconds that the work can take on this machine, and what sets them."""
    memory = work.bytes / rates.copy_gb_per_s / 1e3
    arithmetic = work.flops / rates.matmul(dtype) / 1e6
    return max((memory, "memory"), (arithmetic, "arithmetic"))


def derived(row: Row, work: Work, rates: Rates) -> Row:
    """The row with all that follows from its median."""
    if row.median_us is None:
        return row
    least, bound = floor(work, row.dtype, rates)
    l2 = work.l2_bytes / rates.l2_gb_per_s / 1e3 if work.l2_bytes and rates.l2_gb_per_s else None
    return replace(
        row,
        bytes=work.bytes,
        flops=work.flops,
        gb_per_s=work.bytes / row.median_us / 1e3,
        tflop_per_s=work.flops / row.median_us / 1e6 if work.flops else None,
        floor_us=least,
        bound=bound,
        percent_of_floor=100 * least / row.median_us,
        l2_us=l2,
    )


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with `best` and `speedup` set."""

    def key(row: Row) -> tuple[Any, ...]:
        return row.case, row.dtype, row.direction, row.launched, row.flushed

    fastest: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row.median_us is not None:
            of_variant = (*key(row), row.variant)
            fastest[of_variant] = min(fastest.get(of_variant, row.median_us), row.median_us)
    result = []
    for row in rows:
        eager = fastest.get((*key(row), "eager"))
        best = row.median_us is not None and row.median_us == fastest[(*key(row), row.variant)]
        speedup = eager / row.median_us if eager and row.median_us else None
        result.append(replace(row, best=best, speedup=speedup))
    return result


def measure_rates(timer: Timer, quick: bool = False) -> Rates:
    """What the machine does at best: a large copy, a large matrix product, a copy within L2."""
    cuda = timer.device.type == "cuda"
    # far beyond any cache; half the count of the floats, whose copy moves each byte twice
    count = 1 << (28 if cuda else 20 if quick else 25)
    source = torch.rand(count, device=timer.device)
    target = torch.empty_like(source)
    copy = min(timer.times(lambda: target.copy_(source), 3 if quick else 10))
    rates = {}
    side = 8192 if cuda else 256 if quick else 1024
    for name in ("fp32", "bf16", "fp16"):
        a, b = (torch.randn(side, side, device=timer.device).to(DTYPES[name]) for _ in range(2))
        rates[name] = 2 * side**3 / min(timer.times(partial(torch.mm, a, b), 5)) / 1e6
    l2 = _l2_rate(timer) if cuda else None
    return Rates(2 * source.nbytes / copy / 1e3, rates, l2)


def _l2_rate(timer: Timer, copies: int = 64) -> float:
    size = torch.cuda.get_device_properties(timer.device).L2_cache_size // 8
    source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(copies):
            target.copy_(source)

    replay, _kept = capture(lambda: run)
    return copies * 2 * size / min(timer.times(replay, 10)) / 1e3


def main(op: str, cases: Sequence[Case], argv: Sequence[str] | None = None) -> int:
    """The command of a bench: measures, prints a table, writes DIR/op.json and DIR/op.csv.

    Returns the exit status, 1 where a variant failed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(op, cases, argv)
    level = "quick" if args.quick else "full" if args.device.type == "cuda" else "cpu"
    jobs = [
        (case, dtype, compiled)
        # compiling takes longest, so it comes last: a limit leaves out the least
        for compiled in ((False,) if args.quick or args.no_compiled else (False, True))
        for case in cases
        if not args.only or case.name in args.only
        for dtype in case.dtypes
        if dtype in (args.dtype or (CPU_DTYPES if level == "cpu" else case.dtypes))
    ]
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    timer = Timer(args.device, EFFORTS["quick" if args.quick else args.device.type])
    rates = measure_rates(timer, args.quick)
    command = shlex.join(["python", "-m", f"benchmarks.bench_{op}", *argv])
    header = {**record.header(args.device, command), "rates": rates, "left_out": []}
    rows: list[Row] = []
    start = time.monotonic()
    # true fp32 in every variant: convolutions would otherwise take TF32
    with precision.tf32(False):
        for case, dtype, compiled in tqdm(jobs, desc=op, leave=False, disable=None):
            if args.seconds is not None and time.monotonic() - start > args.seconds:
                header["left_out"].append(f"{case.name} {dtype}{' compiled' * compiled}")
                continue
            rows += measure(
                op, case, dtype, timer, rates, level=level, compiled=compiled, before=rows
            )
            rows = compared(rows)
            # after each case: an interrupt leaves whole files of what was measured
            record.write(args.out / op, header, rows)
    record.write(args.out / op, header, rows)
    print(record.table(header, rows))
    return int(any(row.error for row in rows))


def parse_arguments(op: str, cases: Sequence[Case], argv: Sequence[str]) -> argparse.Namespace:
    names = [case.name for case in cases]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{op}",
        description=f"Times {op}: plain PyTorch, torch.compile, ours, and the floor.",
    )
    add = parser.add_argument
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/benchmarks"),
        help=f"where {op}.json and {op}.csv are written (default: runs/benchmarks)",
    )
    add("--quick", action="store_true", help="tiny sizes, two repetitions, no torch.compile")
    add("--no-compiled", action="store_true", help="without torch.compile of eager")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--only", metavar="NAME", nargs="+", help=f"of {', '.join(names)}")
    add("--dtype", nargs="+", choices=DTYPES, help="types of the maps (default: all of a case)")
    add("--seconds", type=float, help="begin no case after this long; what is left out is listed")
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in names:
            parser.error(f"--only {name}: there is no such case; choose of {', '.join(names)}")
    try:
        args.device = pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device {error}")
    return args
