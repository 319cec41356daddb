"""What the margins about allocations find, and that nothing else about these changes."""

import pytest
import torch
import triton
import triton.language as tl
from guarded_memory import PATTERNS, POISON

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


@triton.jit
def _store(out, at, value):
    tl.store(out + at, value)


@triton.jit
def _copy(out, source, at, to):
    tl.store(out + to, tl.load(source + at))


def allocations(device):
    like = torch.ones(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    options = {"device": device, "dtype": torch.float16}
    yield torch.empty(2, 3, 4, 5, memory_format=torch.channels_last, **options), True
    yield torch.empty((7,), **options), True
    yield torch.empty_like(like), True
    yield torch.empty_strided((2, 3), (1, 5), **options), True
    yield like.new_empty(4, 6, dtype=torch.bool), True
    yield torch.zeros(3, 2, **options), False
    yield torch.full((3, 2), 2, device=device), False
    yield torch.full_like(like, 3), False
    yield torch.tensor([[1, 2], [3, 4]], device=device), False
    yield torch.randn(3, 4, device=device, requires_grad=True), False
    yield like.clone(), False
    yield like.contiguous(), False
    yield like.to(torch.float16), False


def test_tensors_are_as_without_margins(device, monkeypatch):
    guarded = [(tensor, isempty) for tensor, isempty in allocations(device)]
    monkeypatch.undo()
    torch.manual_seed(0)
    plain = [tensor for tensor, _ in allocations(device)]
    for (ours, is_empty), theirs in zip(guarded, plain, strict=True):
        for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "layout"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.stride() == theirs.stride()
        assert ours.data_ptr() % 64 == 0 and not ours._is_view()
        assert is_empty or torch.equal(ours, theirs)


def test_what_is_there_already_is_not_copied(guard, device):
    tensor = torch.zeros(2, 3, device=device, requires_grad=True)
    assert tensor.contiguous() is tensor and tensor.to(torch.float32) is tensor
    assert tensor.clone().grad_fn is not None
    assert len(guard.allocations) == 1


def test_what_is_not_written_is_poisoned(device):
    assert torch.empty(3, device=device).isnan().all()
    assert torch.empty(3, dtype=torch.int32, device=device).eq(POISON).all()
    assert torch.zeros(3, device=device).new_empty(2, 2).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at, side", [(-1, "before"), (12, "behind")])
def test_a_store_beside_a_buffer_is_named(at, side, dtype, guard, device):
    out = torch.zeros(3, 4, dtype=dtype, device=device)
    for inside in (0, 11):
        _store[(1,)](out, inside, 1)
    assert not list(guard.written())
    _store[(1,)](out, at, 1)
    written = list(guard.written())
    guard.allocations.clear()  # else this test would fail
    name = str(dtype).removeprefix("torch.")
    by = f"allocated by {test_a_store_beside_a_buffer_is_named.__name__}, test_guarded_memory.py:"
    assert [line.partition(by)[0] for line in written] == [
        f"1 values stored {side} {name} [3, 4], "
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [-1, 12])
def test_a_load_beside_a_buffer_shows(at, dtype, device):
    for _ in range(PATTERNS):
        source, out = torch.ones(3, 4, dtype=dtype, device=device), torch.zeros(1, device=device)
        _copy[(1,)](out, source, at, 0)
        assert out.isnan() if dtype.is_floating_point else POISON <= out < POISON + PATTERNS


def test_a_margin_is_not_taken_for_another(guard, device):
    source, out = torch.ones(12, device=device), torch.ones(12, device=device)
    _copy[(1,)](out, source, 12, 12)
    (written,) = guard.written()
    guard.allocations.clear()
    assert "stored behind float32 [12]" in written
