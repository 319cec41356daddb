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
from torch import Tensor

from benchmarks import inputs
from pointrend_triton import ops
from pointrend_triton.data import MEAN, STD
from pointrend_triton.inference import pick_device

# 7 x 5 maps lie wholly in one block, 33 x 41 do not; C = 1, 2 and 19 take different paths
MAPS = [(1, 7, 5), (2, 7, 5), (19, 33, 41)]


def run(dtype: torch.dtype, channels_last: bool, device: torch.device) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for classes, height, width in MAPS:
        sizes = {"N": 2, "C": classes, "F": 21, "D": 32, "L": 2}
        shape = (2, classes, height, width)
        coarse = inputs.logits(shape, dtype, device).contiguous(memory_format=layout)
        fine = inputs.features((2, 21, 2 * height, width), dtype, device)
        fine = fine.contiguous(memory_format=layout).requires_grad_()
        head = inputs.layers(sizes, dtype, device)
        # beyond the map too
        coords = inputs.coords(2, 70, device) * 1.2 - 0.1
        labels = torch.randint(classes, (2, 1, height, width), device=device)

        chosen = ops.select_uncertain_points(coarse, 70)
        leaves = [coarse.requires_grad_(), fine, *head["weights"], *head["biases"]]
        for leaf in leaves:
            leaf.requires_grad_()
        points = ops.point_head(fine, coarse, chosen, head["weights"], head["biases"])
        sampled = ops.point_sample(fine, coords)
        total = points.float().sum() + sampled.float().square().sum()
        _check(*torch.autograd.grad(total, leaves))

        detached = coarse.detach()
        scores, large, _ = ops.upsample_uncertainty(detached)
        _check(scores, large, ops.upsample_uncertainty(detached, return_labels=True)[2])
        _check(ops.topk_on_grid(scores, 37)[1], ops.decode(detached, size=(2 * height, 50)))
        _check(
            ops.point_sample(labels, coords, mode="nearest"),
            ops.point_sample(labels > 0, coords[:1]),
        )
        for output in ("labels", "logits"):
            arguments = detached, fine.detach(), head["weights"], head["biases"]
            options = {"num_points": 40, "output": output}
            _check(
                ops.refine(*arguments, **options),
                ops.refine(*arguments, **options, image_size=(30, 19), size=(41, 23)),
            )


def crop(device: torch.device) -> None:
    """A training crop that ends in a picture's last corner, and one of a picture as it is."""
    pictures = torch.randint(256, (35, 4), dtype=torch.uint8, device=device)
    places = torch.tensor([[0, 5, 7, 9, 13, 2, 3, 1], [0, 5, 7, 5, 7, 0, 0, 0]], device=device)
    colours = torch.tensor([[5, 1.1, 0.9, 7, 1.2], [0, 1, 0, -1, 1]], device=device)
    images, labels = ops.augment(pictures, places, colours, (9, 41), mean=MEAN, std=STD)
    _check(images, labels)


def _check(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            raise AssertionError("a result is not finite")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    torch.manual_seed(0)
    crop(device)
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for dtype, channels_last in itertools.product(dtypes, (False, True)):
        run(dtype, channels_last, device)
        print(f"ran: {dtype}, {'channels-last' if channels_last else 'contiguous'} maps, {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
