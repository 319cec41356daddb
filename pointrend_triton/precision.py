"""How float32 is multiplied: exactly, or on a GPU in TF32; read and set in one way.

PyTorch has two sets of names for it. Reading by the older ones (`allow_tf32`,
`get_float32_matmul_precision`, and so `torch.backends.cudnn.flags`) raises where the newer one
(`fp32_precision`) has said something else, and PyTorch's compiler reads by them. What is set here
is the same by both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import backends

_CUDNN: Any = backends.cudnn  # which checkers take for mere modules
_CPU: Any = backends.mkldnn  # may be told to multiply float32 as bfloat16
_CONVOLUTION, _RECURRENT, _MATMUL = _CUDNN.conv, _CUDNN.rnn, backends.cuda.matmul
_SETTINGS = (_CONVOLUTION, _RECURRENT, _MATMUL, _CPU.conv, _CPU.rnn, _CPU.matmul)


def matmul_is_tf32() -> bool:
    """Whether matrices of float32 are multiplied in TF32 on a GPU; never raises."""
    return bool(_MATMUL.fp32_precision == "tf32")


def set_tf32(allowed: bool) -> None:
    """Whether convolutions and matrix products of float32 may use TF32 on a GPU.

    Not allowed, float32 is float32 on every device, whatever was set before.
    """
    if allowed:
        backends.cuda.matmul.allow_tf32 = True
    else:  # by this name, which a CPU's matrices follow
        torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = allowed
    if not allowed:
        for setting in _SETTINGS:  # set, not inherited from `torch.backends.fp32_precision`
            setting.fp32_precision = "ieee"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """`set_tf32` inside; afterwards each setting has the value back that it had, by either name."""
    before = _read()
    set_tf32(allowed)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before.matmul)
        backends.cudnn.allow_tf32 = before.cudnn
        for setting, value in zip(_SETTINGS, before.values, strict=True):
            setting.fp32_precision = value


class _Settings(NamedTuple):
    matmul: str  # by the older names
    cudnn: bool
    values: tuple[str, ...]  # by the newer one, of _SETTINGS


def _read() -> _Settings:
    values = tuple(setting.fp32_precision for setting in _SETTINGS)
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:
        allowed = _older(lambda: backends.cuda.matmul.allow_tf32, values[2])
        matmul = "high" if allowed else "highest"
    _RECURRENT.fp32_precision = values[0]  # where the two differ, nothing can be read
    cudnn = _older(lambda: backends.cudnn.allow_tf32, values[0])
    _RECURRENT.fp32_precision = values[1]
    return _Settings(matmul, cudnn, values)


def _older(read: Callable[[], bool], newer: str) -> bool:
    """What an older name holds: where reading it raises, not what the newer one says."""
    try:
        return read()
    except RuntimeError:
        return newer != "tf32"
