"""Tests of kernels where Triton's interpreter cannot run: skipped, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

try:
    from pointrend_triton import library
    from pointrend_triton.kernels import launch
except ImportError:  # no Triton, so no kernels: their tests skip by themselves
    library = None  # type: ignore[assignment]


def skip_where_it_fails() -> None:
    """A test that gets as far as a launch ends there."""
    if library is None or not launch.INTERPRETED or launch.INTERPRETER_FAULT is None:
        return
    fault, run = launch.INTERPRETER_FAULT, launch.Kernel._run
    library.INTERPRETER_FAULT = None

    def run_or_skip(kernel: launch.Kernel, *args: Any) -> None:
        if launch.INTERPRETED:
            pytest.skip(fault)
        run(kernel, *args)

    launch.Kernel._run = run_or_skip  # type: ignore[method-assign]
