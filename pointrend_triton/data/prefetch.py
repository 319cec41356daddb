"""The next batch travels to the GPU while the current one is trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Batch = tuple[Any, ...]
Staged = tuple[Batch, torch.cuda.Event]


class Prefetch:
    """`move(batch)` for every one of `batches`, in order; on a GPU begun one batch early.

    Args:
        batches: whatever can be iterated.
        move: takes a batch to the device and returns a tuple; tensors in it were made there. On a
            GPU it runs on a stream of its own, so that copies from pinned memory, made with
            non_blocking=True, overlap with training.
        device: on the CPU, nothing is done ahead of time.

    An error from `batches` or `move` comes where its batch is due, after the batches before it.
    """

    def __init__(
        self, batches: Iterable[T], move: Callable[[T], Batch], device: torch.device
    ) -> None:
        self.batches, self.move, self.device = batches, move, device

    def __iter__(self) -> Iterator[Batch]:
        if self.device.type != "cuda":
            return map(self.move, self.batches)
        return map(self._take, one_ahead(self._staged()))

    def _staged(self) -> Iterator[Staged]:
        side = torch.cuda.Stream(self.device)
        for batch in self.batches:
            with torch.cuda.stream(side):
                moved = self.move(batch)
            yield moved, side.record_event()

    def _take(self, staged: Staged) -> Batch:
        moved, ready = staged
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        for item in moved:
            if isinstance(item, Tensor):
                # else the side stream could write to this memory again while it is still read
                item.record_stream(current)
        return moved


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items in order, each handed out once its successor has been made, or has failed to be."""
    waiting: list[T] = []
    try:
        for item in items:
            if waiting:
                yield waiting.pop()
            waiting.append(item)
    except Exception:
        yield from waiting
        raise
    yield from waiting
