"""Every operation once at small, odd sizes, forward and backward: a program for compute-sanitizer.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys

# each tensor an allocation of its own, so that a step beyond its end is seen
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
# one configuration of each kernel: tuning would run for minutes under a sanitizer
os.environ.setdefault("POINTREND_AUTOTUNE", "0")

import torch

from benchmarks.operations import MAPS, OPERATIONS, drawn, dtypes_on, placed
from pointrend_triton.inference import pick_device


def run(dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    for size in MAPS:
        x = placed(drawn(dtype, *size), device, channels_last)
        for name, operation in OPERATIONS.items():
            _check(name, operation.run(x))


def _check(name: str, results: list[torch.Tensor]) -> None:
    for result in results:
        if result.is_floating_point() and not result.isfinite().all():
            raise AssertionError(f"{name}: a result is not finite")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    for dtype, channels_last in itertools.product(dtypes_on(device), (False, True)):
        run(dtype, channels_last, device)
        print(f"ran: {dtype}, {'channels-last' if channels_last else 'contiguous'} maps, {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
