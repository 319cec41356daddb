"""Kernels must write all of what they return, and nothing beside it."""

import pytest
import torch
from guarded_memory import COPIES, EMPTY, FILLED, Guard


@pytest.fixture(autouse=True)
def guard(monkeypatch):
    """Unwritten memory is NaN; what is stored beside an allocation fails the test, after it."""
    guard = Guard()
    for name in EMPTY + FILLED:
        monkeypatch.setattr(torch, name, guard.watch(getattr(torch, name), poison=name in EMPTY))
    for name in ("new_empty", *COPIES):
        method = guard.watch(getattr(torch.Tensor, name), poison=name == "new_empty")
        monkeypatch.setattr(torch.Tensor, name, method)
    yield guard
    if written := list(guard.written()):
        pytest.fail("\n".join(written), pytrace=False)


@pytest.fixture
def device():
    """Where the kernels run: the GPU if there is one, else Triton's interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
