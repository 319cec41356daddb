"""Kernels that the compile table must find fault with, and tasks that do not return."""

import os
import time

import torch
import triton
import triton.language as tl

from pointrend_triton.kernels.launch import Kernel

WORKLOADS = {}


def toy(name, function, *arguments, configs=((4, 1),), options=(), **constants):
    kernel = Kernel(
        f"toy.{name}",
        function,
        lambda constants: [
            triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in configs
        ],
        **dict(options),
    )

    def workload(device, dtype):
        tensor = torch.empty(1024, dtype=dtype, device=device)
        kernel(lambda c: (1,), tensor, *arguments, **constants)

    WORKLOADS[name] = workload


@triton.jit
def _scale(x, n, factor, nothing, pair, flag, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n) * factor + pair[1]
    tl.store(x + at, value, mask=flag & (at < n))


@triton.jit
def _dot(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    place = x + at[:, None] * BLOCK + at[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(n):
        a = tl.load(place + i * BLOCK * BLOCK)
        total = tl.dot(a, tl.trans(a), total, input_precision="ieee")
    tl.store(place, total.to(x.dtype.element_ty))


@triton.jit
def _nothing(x):
    tl.load(x)


@triton.jit
def _broken(x):
    tl.store(x + tl.arange(0, 3), 0.0)


@triton.jit
def _endless(x, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    for i in tl.static_range(100_000):
        value = tl.sin(value + i)
    tl.store(x + tl.arange(0, BLOCK), value)


toy("fine", _scale, 1024, 1.5, None, (1, 3), True, BLOCK=1024)
toy("dot", _dot, 7, BLOCK=64)
toy("spills", _dot, 7, BLOCK=128, options={"maxnreg": 40})
toy("shared", _dot, 7, BLOCK=128, configs=((8, 8), (8, 1)))
toy("nothing", _nothing)
toy("broken", _broken)
toy("endless", _endless, BLOCK=64)


def give(value):
    return value


def crash():
    os._exit(3)


def hang():
    time.sleep(60)


def fail():
    try:
        raise ValueError("the reason\nin two lines")
    except ValueError as error:
        raise RuntimeError("what follows from it") from error
