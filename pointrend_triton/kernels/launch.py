"""Launching a kernel: which of its configurations runs on this GPU, and how the fastest is found.

A kernel has a short list of configurations (block sizes, warps, stages). For each key (the types of
its tensors, its constants, and buckets of its sizes) one of them runs, in this order: the one that
is pinned, the one stored for this GPU, the fastest of a tuning on first use, the first that fits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from pointrend_triton.kernels import store

Constants = dict[str, Any]
Grid = Callable[[dict[str, Any]], tuple[int, ...]]

INTERPRETED = triton.knobs.runtime.interpret
# bytes of shared memory one program may have, by compute capability; others are like the next lower
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
            grid: constants and configuration -> numbers of programs.
            arguments: what precedes the constants in the function.
            size: what speed depends on; rounded up to powers of four for the key.
            constants: the `tl.constexpr` parameters that no configuration sets.
        """
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if _recorded is not None:
            _recorded.append(Launch(self, arguments, constants, size))
            return
        device = tensors[0].device
        if INTERPRETED:
            self._run(
                self._pinned(constants) or self.configs(constants)[0], grid, arguments, constants
            )
            return
        with torch.cuda.device(device):
            key = (
                device.index,
                *(t.dtype for t in tensors),
                *constants.values(),
                *map(bucket, size),
            )
            config = self._pinned(constants) or self._chosen.get(key)
            if config is None:
                config = self._choose(key, grid, arguments, constants)
            self._run(config, grid, arguments, constants)

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

    def _run(
        self, config: triton.Config, grid: Grid, arguments: Sequence[Any], constants: Constants
    ) -> None:
        programs = grid({**constants, **config.kwargs})
        if 0 in programs:
            return
        options = {} if INTERPRETED else self.options
        self.function[programs](*arguments, **constants, **config.all_kwargs(), **options)

    def _pinned(self, constants: Constants) -> triton.Config | None:
        if _pins is None or _pins[0] is not self:
            return None
        configs = self.configs(constants)
        return configs[_pins[1] % len(configs)]

    def _choose(
        self, key: tuple[Any, ...], grid: Grid, arguments: Sequence[Any], constants: Constants
    ) -> triton.Config:
        index = key[0]
        properties: Any = torch.cuda.get_device_properties(index)
        configs = self.fitting(constants, properties.shared_memory_per_block_optin)
        text = "/".join(str(part) for part in key[1:])
        by_text = {_describe(config): config for config in configs}
        found = None if _retune else by_text.get(store.find(index, self.name, text) or "")
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                return configs[0]  # not remembered: outside the capture it may still be tuned
            if not _retune and os.environ.get("POINTREND_AUTOTUNE") == "0":
                found = configs[0]
            else:
                found, times = self._tune(configs, grid, arguments, constants)
                store.remember(index, self.name, text, _describe(found), times)
        self._chosen[key] = found
        return found

    def _tune(
        self,
        configs: list[triton.Config],
        grid: Grid,
        arguments: Sequence[Any],
        constants: Constants,
    ) -> tuple[triton.Config, dict[str, float]]:
        """The fastest configuration, and the milliseconds of each that ran."""
        names = self.function.arg_names
        changed = [
            (t, t.clone())
            for name, t in zip(names, arguments, strict=False)
            if name in self.changes
        ]

        def run(config: triton.Config) -> None:
            for tensor, before in changed:
                tensor.copy_(before)
            self._run(config, grid, arguments, constants)

        times: dict[str, float] = {}
        if len(configs) > 1:
            for config in configs:
                try:
                    ms = triton.testing.do_bench(lambda c=config: run(c), warmup=5, rep=20)
                except OutOfResources:  # the estimate was too low
                    continue
                times[_describe(config)] = ms
        for tensor, before in changed:
            tensor.copy_(before)
        if not times:
            return configs[0], times
        return min(configs, key=lambda config: times.get(_describe(config), float("inf"))), times


@dataclass
class Launch:
    """A launch that was recorded rather than made."""

    kernel: Kernel
    arguments: tuple[Any, ...]
    constants: Constants
    size: tuple[int, ...] = field(default=())


_recorded: list[Launch] | None = None
_pins: tuple[Kernel, int] | None = None
_retune = False


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
def retuning() -> Iterator[None]:
    """Inside, keys that were not used before in this process are tuned and stored anew."""
    global _retune
    for kernel in KERNELS.values():
        kernel._chosen.clear()
    previous, _retune = _retune, True
    try:
        yield
    finally:
        _retune = previous


def bucket(size: int) -> int:
    """The next power of four, so that a changing number of points is seldom tuned again."""
    return 1 << (2 * -(-(max(size, 1) - 1).bit_length() // 2))


def _describe(config: triton.Config) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(config.all_kwargs().items()))
