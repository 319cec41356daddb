"""What the point head adds to a training step: points, their logits, their labels and the loss.

The gradient goes to the maps and to the head. `mask2former` is the point loss of its masks instead.

python -m benchmarks.bench_training_branch --only cityscapes
"""

import sys

import torch
import torch.nn.functional as F

from benchmarks import floors, harness, inputs, stock
from benchmarks.bench_point_head import LAYERS, MAPS
from pointrend_triton import ops


def make(s, dtype, device):
    labels = torch.randint(s["C"], (s["N"], s["image_h"], s["image_w"]), device=device)
    return {
        "fine": inputs.features((s["N"], s["F"], s["fh"], s["fw"]), dtype, device),
        "coarse": inputs.logits((s["N"], s["C"], s["H"], s["W"]), dtype, device),
        "labels": labels,
        "draws": inputs.draws(s["N"], s["P"], device),
        **inputs.layers(s, dtype, device),
    }


def theirs(x, s):
    coords = stock.select_uncertain_points(x["coarse"].detach(), s["P"], x["draws"])
    logits = stock.point_head(x["fine"], x["coarse"], coords, x["weights"], x["biases"])
    return stock.point_loss(logits, x["labels"], coords)


def ours(x, s):
    coords = ops.select_uncertain_points(x["coarse"].detach(), s["P"], draws=tuple(x["draws"]))
    logits = ops.point_head(x["fine"], x["coarse"], coords, x["weights"], x["biases"])
    target = ops.point_sample(x["labels"].unsqueeze(1), coords, mode="nearest")[:, 0]
    return F.cross_entropy(logits.float(), target, ignore_index=255)


def work(s, size):
    select = floors.select_points(s["N"], s["C"], s["H"] * s["W"], s["P"], size)
    labels = floors.Work(s["N"] * s["P"] * 8)
    head = floors.head(s, s["P"], size)
    return floors.both(head["forward"] + select + labels, head["backward"])


def make_masks(s, dtype, device):
    shape = (s["N"], 1, s["image_h"], s["image_w"])
    return {
        "logits": inputs.logits((s["N"], 1, s["H"], s["W"]), dtype, device),
        "masks": inputs.logits(shape, torch.float32, device)[:, 0] > 0,
        "draws": inputs.draws(s["N"], s["P"], device),
    }


def their_masks(x, s):
    coords = stock.select_uncertain_points(x["logits"].detach(), s["P"], x["draws"])
    return stock.mask_loss(x["logits"], x["masks"], coords)


def our_masks(x, s):
    coords = ops.select_uncertain_points(x["logits"].detach(), s["P"], draws=tuple(x["draws"]))
    target = ops.point_sample(x["masks"].unsqueeze(1), coords)
    logits = ops.point_sample(x["logits"], coords)
    return F.binary_cross_entropy_with_logits(logits.float(), target)


def work_masks(s, size):
    n, points, cells = s["N"], s["P"], s["H"] * s["W"]
    select = floors.select_points(n, 1, cells, points, size)
    masks = floors.sample(n, 1, s["image_h"] * s["image_w"], points, 1, 4)["forward"]
    logits = floors.sample(n, 1, cells, points, size, 4)
    return floors.both(logits["forward"] + select + masks, logits["backward"])


NAMES = ("N", "C", "H", "W", "image_h", "image_w", "P")
CASES = [
    harness.Case(
        name,
        {"F": 256, "D": 256, "L": 3, "fh": sizes[2], "fw": sizes[3]}
        | dict(zip(NAMES, sizes, strict=True)),
        make,
        theirs,
        ours,
        work,
        maps=MAPS,
        wrt=(*MAPS, *LAYERS),
    )
    for name, *sizes in [
        ("cityscapes", 8, 19, 128, 256, 512, 1024, 2048),
        ("ade20k", 8, 150, 128, 128, 512, 512, 2048),
    ]
] + [
    harness.Case(
        "mask2former",
        {"N": 20, "H": 256, "W": 256, "image_h": 1024, "image_w": 1024, "P": 12544},
        make_masks,
        their_masks,
        our_masks,
        work_masks,
        wrt=("logits",),
    )
]


def main(argv=None) -> int:
    return harness.main("training_branch", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
