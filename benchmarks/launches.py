"""What tests/kernels, `benchmarks.sanitize` and tuning have a GPU compile, found without a GPU.

TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= python -O -m benchmarks.launches ARCH OUT

Nothing is computed: they run on the CPU with `launch.recording()`, where Triton does not interpret,
so that types, constants, strides and alignment are those on a GPU. Tests then compare what nobody
computed, so comparisons are switched off, `assert` by -O. `benchmarks.compiled` runs this.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sanitize
from benchmarks.compiled import Compile
from benchmarks.resources import source_of
from pointrend_triton import library
from pointrend_triton.kernels import launch
from pointrend_triton.workloads import WORKLOADS

CPU = torch.device("cpu")
# without those that compile by themselves
TESTS = ["tests/kernels"]
TESTS += [f"--ignore=tests/kernels/test_{name}.py" for name in ("resources", "compiled")]


class Recorder:
    """Collects what is compiled; as a plugin of pytest, for its tests."""

    def __init__(self, arch: int):
        self.arch = arch
        self.found: dict[str, Compile] = {}

    @contextmanager
    def collecting(self, kind: str, place: str) -> Iterator[None]:
        with launch.recording() as launches:
            yield
        for made in launches:
            if launch.KERNELS.get(made.kernel.name) is made.kernel:  # not one that a test made up
                self.add(made, kind, place)

    def add(self, made: launch.Launch, kind: str, place: str) -> None:
        """Tuning compiles all configurations that may fit; else the pinned one or the first."""
        try:
            fitting = made.kernel.fitting(made.constants, launch.shared_memory(self.arch))
        except RuntimeError:  # none fits: so says a launch too
            return
        for config in fitting if kind == "tune" else [made.pinned or fitting[0]]:
            source, options = source_of(made, config, self.arch)
            described = launch.describe(config)
            parts = source.signature, source.constants, source.attrs, vars(options)
            one = self.found.setdefault(
                f"{source.hash()} {options}", Compile(made.kernel.name, described, *parts)
            )
            one.untuned |= kind == "tune" and config is fitting[0]
            one.places.setdefault(kind, place)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        for module in (*config.pluginmanager.get_plugins(), sys.modules.get("guarded_memory")):
            if hasattr(module, "POISON"):
                module.POISON = 0  # what no kernel wrote must be an index or a label that exists
        for item in items:  # also those that wait for a GPU
            item.own_markers = [m for m in item.own_markers if "CUDA" not in str(m.kwargs)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        kind = "drawn" if hasattr(item.function, "hypothesis") else "tests"
        with self.collecting(kind, item.nodeid):
            return (yield)


def main(arch: int, out: Path) -> int:
    recorder = Recorder(arch)
    for name, workload in WORKLOADS.items():
        for dtype in (torch.bfloat16, torch.float32):
            with recorder.collecting("tune", f"{name}, {dtype}"):
                workload(torch.device("meta"), dtype)

    os.environ["POINTREND_BACKEND"] = "triton"
    # which only say that the operations take tensors of the CPU
    library.INTERPRETED, library.INTERPRETER_FAULT = True, None
    sanitize._check = torch.testing.assert_close = lambda *arguments, **options: None
    with recorder.collecting("sanitize", "benchmarks.sanitize"):
        for dtype, last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            sanitize.run(dtype, last, CPU)

    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    status = pytest.main([*options, *TESTS], plugins=[recorder])
    if status > pytest.ExitCode.TESTS_FAILED:  # some do: they miss what was not computed
        return status
    out.write_bytes(pickle.dumps(list(recorder.found.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
