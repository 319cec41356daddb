"""Training crops of 8-bit pictures in device memory: resized, flipped, distorted, normalised.

python -m benchmarks.bench_augment --only cityscapes

Plain PyTorch is the twin here too: nothing else in PyTorch gives OpenCV's grey levels.
"""

import sys

import numpy as np
import torch

from benchmarks import floors, harness
from pointrend_triton import ops, reference
from pointrend_triton.config import DataConfig
from pointrend_triton.data import MEAN, STD, TrainTransform
from pointrend_triton.data.resident import place_of


def cuts(s):
    """What training draws for N pictures of H x W and crops of h x w."""
    scale, crop = (s["W"], s["H"]), (s["h"], s["w"])
    transform = TrainTransform(DataConfig(scale=scale, crop_size=crop, crop_max_share=1.0))
    label = np.zeros((s["H"], s["W"]), np.uint8)
    return [transform.draw(label, np.random.default_rng([0, 1, n])) for n in range(s["N"])]


def make(s, dtype, device):
    size = (s["H"], s["W"])
    count = size[0] * size[1]
    places = [place_of(cut, n * count, size) for n, cut in enumerate(cuts(s))]
    colours = torch.tensor([cut.colours for cut in cuts(s)], dtype=torch.float32)
    return {
        "pictures": torch.randint(256, (s["N"] * count, 4), dtype=torch.uint8, device=device),
        "places": torch.tensor(places).to(device),
        "colours": colours.to(device),
    }


def run(function):
    return lambda x, s: function(
        x["pictures"], x["places"], x["colours"], (s["h"], s["w"]), mean=MEAN, std=STD
    )


def work(s, size):
    """Each pixel that a crop needs once, at most four for one of its own; 20 bytes written."""
    read = written = 0
    for cut in cuts(s):
        factor = cut.size[0] * cut.size[1] / (s["H"] * s["W"])
        sides = (min(side, whole) for side, whole in zip((s["h"], s["w"]), cut.size, strict=True))
        read += 4 * np.prod([*sides]) * min(4, 1 / factor)
        written += 20 * s["h"] * s["w"]
    return {"forward": floors.Work(float(read + written))}


CASES = [
    harness.Case(
        name,
        {"N": n, "H": height, "W": width, "h": crop[0], "w": crop[1]},
        make,
        run(reference.augment),
        run(ops.augment),
        work,
        dtypes=("fp32",),
    )
    for name, n, height, width, crop in [
        ("cityscapes", 8, 1024, 2048, (512, 1024)),
        ("ade20k", 16, 512, 683, (512, 512)),
    ]
]


def main(argv=None) -> int:
    return harness.main("augment", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
