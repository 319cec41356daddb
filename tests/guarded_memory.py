"""Memory with margins: a kernel's store beside a buffer is found, and named by who allocated that.

What is allocated and not filled holds NaN; so does a margin, so that a load beside a buffer shows
in the results. In integers it is POISON or somewhat more, which as an index leads into the margin.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

POISON = 0x6B
MARGIN = 1 << 16  # bytes on each side; a multiple of every alignment that torch gives
EMPTY = ("empty", "empty_like", "empty_strided")
FILLED = ("zeros", "zeros_like", "ones", "full", "full_like", "tensor")
FILLED += ("rand", "randn", "randint", "rand_like", "randn_like")  # what tests give to kernels
COPIES = ("clone", "contiguous", "to")  # methods, which may give back what is there
PATTERNS = 100  # what goes from margin to margin is found too: each allocation has another of these
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_empty = torch.empty


class Guard:
    """The allocations of a test, each between margins."""

    def __init__(self) -> None:
        self.allocations: list[tuple[Tensor, Tensor, int, str]] = []

    def watch(self, allocate: Callable[..., Tensor], poison: bool) -> Callable[..., Tensor]:
        """The same function, with margins about what it returns and poison in it if need be."""

        def call(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if args and isinstance(args[0], Tensor) and _memory(args[0]) == _memory(tensor):
                return tensor
            caller = sys._getframe(1)
            code = caller.f_code
            where = f"{code.co_name}, {Path(code.co_filename).name}:{caller.f_lineno}"
            return self._between_margins(_poisoned(tensor) if poison else tensor, where)

        return call

    def written(self) -> Iterator[str]:
        """A line for each side of an allocation where something was stored."""
        for memory, tensor, pattern, where in self.allocations:
            beside = MARGIN // memory.itemsize
            for side, margin in (("before", memory[:beside]), ("behind", memory[-beside:])):
                if count := int((margin != pattern).sum()):
                    what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                    yield f"{count} values stored {side} {what}, allocated by {where}"

    def _between_margins(self, tensor: Tensor, where: str) -> Tensor:
        if type(tensor) is not Tensor or tensor.is_meta or tensor.numel() == 0 or tensor.grad_fn:
            return tensor
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        beside = MARGIN // tensor.itemsize
        size = 2 * beside + last + 1
        memory = _empty(size, dtype=BITS[tensor.itemsize], device=tensor.device)
        number = len(self.allocations) % PATTERNS
        # all ones, and somewhat less, are NaN, and none that arithmetic gives
        pattern = -1 - number if tensor.is_floating_point() else POISON + number
        memory[:beside] = memory[-beside:] = pattern
        guarded = _empty(0, dtype=tensor.dtype, device=tensor.device)
        guarded.set_(memory.untyped_storage(), beside, tensor.shape, tensor.stride())
        guarded.copy_(tensor.detach())
        self.allocations.append((memory, guarded.detach(), pattern, where))
        return guarded.requires_grad_(tensor.requires_grad)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _poisoned(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(POISON) if tensor.dtype != torch.bool else tensor.fill_(True)
