"""What all tests share: Triton's interpreter without a GPU, time limits, seeds, the data."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import gpu_twin
import hypothesis
import numpy as np
import pytest
import time_limit
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it comes before any import of the package
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter

from pointrend_triton import precision

# the tensors are small: more threads wait for each other longer than they compute
torch.set_num_threads(1)

# an example's time says little here: the first one compiles, the interpreter is slow
shrink = hypothesis.settings(deadline=None)
hypothesis.settings.register_profile("shrink", shrink)
# a failure is shown as it was found: to look for a smaller one may take minutes
phases = [phase for phase in shrink.phases if phase.name in ("explicit", "reuse", "generate")]
hypothesis.settings.register_profile("pointrend", shrink, phases=phases)
hypothesis.settings.load_profile("pointrend")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--time-limit", type=float, metavar="SECONDS", help="of every test alike")
    parser.addoption(
        "--gpu-twin",
        action="store_true",
        help="PyTorch decides on the CPU what a GPU may decide otherwise (tests/gpu_twin.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(time_limit)
    interpreter.skip_where_it_fails()
    if config.getoption("--gpu-twin") and not torch.cuda.is_available():
        gpu_twin.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Tensors are named by their argument: by their values, no two processes would agree."""
    return argname if isinstance(val, torch.Tensor) else None


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """The PyTorch that kernels are compared with never uses TF32, a GPU's default.

    And gradients are on, whatever a test that was skipped halfway has left behind.
    """
    with torch.enable_grad(), precision.tf32(False):
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Where real images lie: POINTREND_DATA, or a folder that clones beside each other share."""
    root = Path(os.environ.get("POINTREND_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data at {root}: set POINTREND_DATA to the folder that holds it")
    return root
