"""Launching a kernel: which of its configurations runs on this GPU, and how the fastest is found.

A kernel has a short list of configurations (block sizes, warps, stages). For each key (the types of
its tensors, its constants, and buckets of its sizes) one of them runs, in this order: the one that
is pinned, the one stored for this GPU, the fastest of a tuning on first use, the first that fits.

Strides and alignment are not part of the key: Triton compiles for them by itself, and a kernel
whose speed depends on the layout has a constant that says which it is.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from pointrend_triton.kernels import store

Constants = dict[str, Any]
Grid = Callable[[dict[str, Any]], tuple[int, ...]]

INTERPRETED = triton.knobs.runtime.interpret


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


# why the interpreter fails here, or None: its loops take a length for a number of no dimensions
INTERPRETER_FAULT = (
    f"Triton {triton.__version__}'s interpreter needs NumPy below 2.4, not {np.__version__}"
    if _release(triton.__version__) < (3, 7) and _release(np.__version__) >= (2, 4)
    else None
)
# bytes of shared memory one program may have, by compute capability
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_MEMORY |= {120: 99 << 10}

KERNELS: dict[str, Kernel] = {}


class Kernel:
    """A `@triton.jit` function and the configurations that it may run in.

    Calling it launches: `kernel(grid, *arguments, size=(...), NAME=constant, ...)`.

    Args:
        name: "stem.what", for tables and stored choices.
        function: what `@triton.jit` made.
        configs: constants -> configurations, the preferred one first. No configuration may change
            the result by more than rounding.
        shared: (constants, configuration) -> an estimate of the bytes of shared memory, by which
            those are left out that cannot fit; None where all fit everywhere.
        changes: names of arguments that the kernel changes rather than overwrites (it counts or
            links in them); tuning puts back what they held.
        options: compiler options of every configuration.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        configs: Callable[[Constants], list[triton.Config]],
        *,
        shared: Callable[[Constants, triton.Config], int] | None = None,
        changes: Sequence[str] = (),
        **options: Any,
    ):
        for argument in changes:
            if argument not in function.arg_names:
                raise ValueError(f"{name}: changes names {argument}, which is no argument of it")
        self.name = name
        self.function = function
        self.configs = configs
        self.shared = shared
        self.changes = changes
        self.options = options
        self._chosen: dict[tuple[Any, ...], triton.Config] = {}
        KERNELS[name] = self

    def __call__(
        self, grid: Grid, *arguments: Any, size: tuple[int, ...] = (), **constants: Any
    ) -> None:
        """Launches on the device of the first tensor.

        Args:
            grid: constants and configuration -> numbers of programs; nothing runs if one is 0.
            arguments: what precedes the constants in the function: tensors, numbers, None, and
                tuples of these.
            size: what speed depends on; rounded up to powers of four for the key.
            constants: the `tl.constexpr` parameters that no configuration sets.
        """
        launch = Launch(self, arguments, constants, size)
        if _recorded is not None:
            launch.pinned = self._pinned(constants)
            config = launch.pinned or self.configs(constants)[0]
            if 0 not in grid({**constants, **config.kwargs}):
                _recorded.append(launch)
        elif INTERPRETED:
            self._run(self._pinned(constants) or self.configs(constants)[0], grid, launch)
        else:
            index = next(_tensors(arguments)).device.index
            if index == torch.cuda.current_device():
                self._launch(index, grid, launch)
            else:
                with torch.cuda.device(index):
                    self._launch(index, grid, launch)

    def fitting(self, constants: Constants, limit: int) -> list[triton.Config]:
        """The configurations whose estimate of shared memory is within `limit` bytes."""
        configs = self.configs(constants)
        if self.shared is None:
            return configs
        fitting = [config for config in configs if self.shared(constants, config) <= limit]
        if not fitting:
            least = min(self.shared(constants, config) for config in configs)
            raise RuntimeError(
                f"{self.name} needs {least} bytes of shared memory, this GPU has {limit}; use "
                'ops.backend("reference")'
            )
        return fitting

    def _launch(self, index: int, grid: Grid, launch: Launch) -> None:
        # every launch passes here: kept to a few microseconds
        types = tuple([getattr(argument, "dtype", None) for argument in launch.arguments])
        key = (index, types, *launch.constants.items(), *map(bucket, launch.size))
        config = self._chosen.get(key) if _pins is None else self._pinned(launch.constants)
        self._run(config or self._choose(key, grid, launch), grid, launch)

    def _run(self, config: triton.Config, grid: Grid, launch: Launch) -> None:
        programs = grid({**launch.constants, **config.kwargs})
        if 0 in programs:
            return
        if INTERPRETED and INTERPRETER_FAULT:
            raise RuntimeError(INTERPRETER_FAULT)
        options = {} if INTERPRETED else self.options
        self.function[programs](
            *launch.arguments, **launch.constants, **config.all_kwargs(), **options
        )

    def _pinned(self, constants: Constants) -> triton.Config | None:
        if _pins is None or _pins[0] is not self:
            return None
        configs = self.configs(constants)
        return configs[_pins[1] % len(configs)]

    def _choose(self, key: tuple[Any, ...], grid: Grid, launch: Launch) -> triton.Config:
        index = key[0]
        with _choosing:
            if key in self._chosen:  # another thread was faster, or another kernel is pinned
                return self._chosen[key]
            properties: Any = torch.cuda.get_device_properties(index)
            configs = self.fitting(launch.constants, properties.shared_memory_per_block_optin)
            capturing = torch.cuda.is_current_stream_capturing()
            retuned = _retuned is not None and self.name.startswith(_retuned[0])
            found = None
            if capturing or not retuned:
                stored = store.find(index, self.name, launch.key)
                found = next((c for c in configs if describe(c) == stored), None)
            if found is None:
                if capturing or 0 in grid({**launch.constants, **configs[0].kwargs}):
                    return configs[0]  # not remembered: it may still be tuned
                found = configs[0]
                if len(configs) > 1 and (retuned or _tunes_on_first_use()):
                    found, times = self._tune(configs, grid, launch)
                    store.remember(index, self.name, launch.key, describe(found), times)
                    if _retuned is not None:
                        _retuned[1].append(Tuned(self, launch.key, describe(found), times))
            self._chosen[key] = found
            return found

    def _tune(
        self, configs: list[triton.Config], grid: Grid, launch: Launch
    ) -> tuple[triton.Config, dict[str, float]]:
        """The fastest configuration, and the milliseconds of each that runs, in their order."""
        changed = [
            (tensor, tensor.clone())
            for name, argument in zip(self.function.arg_names, launch.arguments, strict=False)
            if name in self.changes
            for tensor in _tensors((argument,))
        ]

        def restore() -> None:
            for tensor, before in changed:
                tensor.copy_(before)

        def run(config: triton.Config) -> None:
            restore()
            self._run(config, grid, launch)

        times: dict[str, float] = {}
        errors: list[Exception] = []
        try:
            for config in configs:
                try:
                    times[describe(config)] = triton.testing.do_bench(
                        lambda config=config: run(config),
                        warmup=5,
                        rep=20,
                        return_mode="median",
                    )
                except Exception as error:  # compilers fail in many ways
                    errors.append(error)
                    if not isinstance(error, OutOfResources):
                        warnings.warn(
                            f"{self.name} does not run in {describe(config)}: {error}", stacklevel=2
                        )
        finally:
            restore()
        if not times:
            raise errors[0]
        return min(configs, key=lambda c: times.get(describe(c), float("inf"))), times


@dataclass(slots=True)
class Launch:
    """A launch: what `recording` collects instead of running."""

    kernel: Kernel
    arguments: tuple[Any, ...]
    constants: Constants
    size: tuple[int, ...] = field(default=())
    pinned: triton.Config | None = None  # noted in recording: nothing is pinned any more afterwards

    @property
    def key(self) -> str:
        """What a choice for this launch is stored by, in one line."""
        types = [str(a.dtype).removeprefix("torch.") for a in self.arguments if hasattr(a, "dtype")]
        constants = [f"{name}={value}" for name, value in sorted(self.constants.items())]
        return " ".join([*types, *constants, "size=" + ",".join(str(bucket(s)) for s in self.size)])


@dataclass
class Tuned:
    """What a tuning found: the key, the fastest configuration, the milliseconds of all that ran."""

    kernel: Kernel
    key: str
    config: str
    times: dict[str, float]


# of the process, not of the thread: autograd launches backward kernels from threads of its own
_recorded: list[Launch] | None = None
_pins: tuple[Kernel, int] | None = None
_retuned: tuple[tuple[str, ...], list[Tuned]] | None = None
_choosing = threading.RLock()  # two tunings side by side would disturb each other's times


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside, in place of running them: works on any machine."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


@contextmanager
def pinned(kernel: Kernel, number: int) -> Iterator[None]:
    """Inside, `kernel` runs in its configuration of that number, whatever was stored or tuned."""
    global _pins
    previous, _pins = _pins, (kernel, number)
    try:
        yield
    finally:
        _pins = previous


@contextmanager
def retuning(kernels: Sequence[str] = ("",)) -> Iterator[list[Tuned]]:
    """Inside, every key of some kernels is tuned and stored anew, once; collects what was found.

    Args:
        kernels: beginnings of their names; the others are not tuned. All by default.
    """
    global _retuned
    for kernel in KERNELS.values():
        kernel._chosen.clear()
    previous, _retuned = _retuned, (tuple(kernels), [])
    try:
        yield _retuned[1]
    finally:
        _retuned = previous


def shared_memory(capability: int) -> int:
    """Bytes of shared memory one program may have; capabilities not listed are like the next lower.

    Args:
        capability: ten times the major number plus the minor, at least 80.
    """
    return SHARED_MEMORY[max(known for known in SHARED_MEMORY if known <= capability)]


def bucket(size: int) -> int:
    """The next power of four, so that a changing number of points is seldom tuned again."""
    return 1 << (2 * -(-(max(size, 1) - 1).bit_length() // 2))


def describe(config: triton.Config) -> str:
    """A configuration in one line, by which it is stored."""
    return ", ".join(f"{name}={value}" for name, value in sorted(config.all_kwargs().items()))


def _tunes_on_first_use() -> bool:
    return _retuned is None and os.environ.get("POINTREND_AUTOTUNE") != "0"


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
