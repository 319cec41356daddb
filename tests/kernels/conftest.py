"""Kernels must write all of what they return: memory that was not written holds NaN here."""

import pytest
import torch

POISON = 0x6B  # a byte: a large integer of any width, unlikely by chance


def _poisoned(allocate):
    def poison(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(POISON) if tensor.dtype != torch.bool else tensor.fill_(True)

    return poison


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def device():
    """Where the kernels run: the GPU if there is one, else Triton's interpreter on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
