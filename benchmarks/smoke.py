"""Every operation once, beside its PyTorch twin on the CPU: what a device computes otherwise.

python -m benchmarks.smoke

In 32 and 16 bits and both layouts, at the sizes of `benchmarks.operations`. Floats may miss the
fp64 result by twice what the twin misses it by in the same type, and by a rounding or 1e-6 of the
largest value. The status is 1 where something differs, and the output names it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("POINTREND_AUTOTUNE", "0")

import torch
from torch import Tensor

from benchmarks.operations import (
    MAPS,
    OPERATIONS,
    Inputs,
    Operation,
    drawn,
    dtypes_on,
    each_tensor,
    placed,
)
from pointrend_triton import ops
from pointrend_triton.inference import pick_device


def limit(plain: Tensor, exact: Tensor) -> float:
    """How far a result may be from the exact one, where plain PyTorch gives `plain`."""
    if not exact.numel():
        return 0.0
    rounding = max(1e-6, torch.finfo(plain.dtype).eps / 2)
    missed = (plain.double() - exact).abs().max() + rounding / 2 * exact.abs().max()
    return 2 * missed.item()


class Twin:
    """What an operation should give on inputs of the CPU: in their own type, and in fp64."""

    def __init__(self, operation: Operation, x: Inputs) -> None:
        wide = each_tensor(x, lambda t: t.double() if t.is_floating_point() else t)
        with ops.backend("reference"):
            self.plain, self.exact = operation.run(x), operation.run(wide)
            if operation.logits is not None:
                self.logits = operation.logits(wide)
                self.limit = 2 * limit(operation.logits(x), self.logits)
                self.limit += _far(self.logits, x["coarse"])
            self.has_logits = operation.logits is not None

    def differences(self, results: list[Tensor]) -> Iterator[str]:
        """What is wrong with the results, in words."""
        for number, (ours, plain, exact) in enumerate(
            zip(results, self.plain, self.exact, strict=True)
        ):
            ours, where = ours.cpu(), f"result {number}, {list(plain.shape)}"
            if (ours.shape, ours.dtype) != (plain.shape, plain.dtype):
                yield f"{where}: {list(ours.shape)} {ours.dtype} instead of {plain.dtype}"
            elif self.has_logits:
                yield from self._wrong_labels(where, ours)
            elif ours.is_floating_point():
                off, allowed = (ours.double() - exact).abs(), limit(plain, exact)
                # as NaN is not less than anything, it is wrong too
                if wrong := int((~(off <= allowed)).sum()):
                    yield (
                        f"{where}: {wrong} of {off.numel()} values wrong, the worst by "
                        f"{off.max():.3g} where {allowed:.3g} is allowed"
                    )
            elif wrong := int((ours != plain).sum()):
                yield f"{where}: {wrong} of {ours.numel()} values differ"

    def _wrong_labels(self, where: str, labels: Tensor) -> Iterator[str]:
        logits = self.logits
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        if int(labels.max()) >= logits.shape[1]:
            yield f"{where}: a label {int(labels.max())} of {logits.shape[1]} classes"
            return
        chosen = logits.gather(1, labels.long().unsqueeze(1))[:, 0]
        missed = logits.amax(dim=1) - chosen
        if wrong := int((missed > self.limit).sum()):
            yield (
                f"{where}: {wrong} of {labels.numel()} labels wrong, the worst by a logit "
                f"{missed.max():.3g} smaller than the largest, where {self.limit:.3g} is allowed"
            )


def _far(enlarged: Tensor, logits: Tensor) -> float:
    """By how much rounded places move the values of an enlarged map.

    Each of four interpolations (up to twice, along two axes) rounds a place three times, by 2^-24
    of the longest side; the value moves by at most twice the largest logit times that.
    """
    side = max(*enlarged.shape[2:], *logits.shape[2:])
    return 4 * 3 * 2 * side * 2.0**-24 * enlarged.abs().max().item()


def compared(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Runs everything in the backend that was chosen; gives what differs, in words."""
    for size in MAPS:
        x = drawn(dtype, *size)
        for name, operation in OPERATIONS.items():
            twin = None if dtype != torch.float32 and operation.chooses else Twin(operation, x)
            for channels_last in (False, True):
                where = f"{name}, {dtype}, maps {' x '.join(map(str, size))}"
                where += ", channels-last" * channels_last
                try:
                    results = operation.run(placed(x, device, channels_last))
                    for words in twin.differences(results) if twin else ():
                        yield f"{where}, {words}"
                except Exception as error:  # the others are of interest too
                    yield f"{where}: {type(error).__name__}: {error}"
                    if device.type == "cuda":
                        torch.cuda.synchronize()  # ends this where the GPU answers no more


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if device.type != "cuda":
        print("the kernels do not run here: the twin is compared with itself")
    wrong = 0
    with ops.backend("triton" if device.type == "cuda" else "reference"):
        for dtype in dtypes_on(device):
            for words in compared(dtype, device):
                wrong += 1
                print(f"differs: {words}", flush=True)
            print(f"ran: {dtype}, {device}", flush=True)
    print(f"{wrong} results differ" if wrong else "all as the twin")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
