"""Logits of a grid to labels: at the grid's size, enlarged, and by way of the network's input size.

python -m benchmarks.bench_decode --only ade20k_refined
"""

import sys

from benchmarks import floors, harness, inputs, stock
from pointrend_triton import ops


def make(s, dtype, device):
    return {"logits": inputs.logits((s["N"], s["C"], s["H"], s["W"]), dtype, device)}


def sizes_of(s):
    return (s["image_h"], s["image_w"]), (s["h"], s["w"])


def ours(x, s):
    image_size, size = sizes_of(s)
    return ops.decode(x["logits"], image_size=image_size, size=size)


def work(s, size):
    return {"forward": floors.decode(s["N"], s["C"], s["H"] * s["W"], s["h"] * s["w"], size)}


NAMES = ("N", "C", "H", "W", "image_h", "image_w", "h", "w")
CASES = [
    harness.Case(
        name,
        dict(zip(NAMES, sizes, strict=True)),
        make,
        lambda x, s: stock.decode(x["logits"], sizes_of(s)),
        ours,
        work,
        maps=("logits",),
    )
    for name, *sizes in [
        ("cityscapes_coarse", 1, 19, 256, 512, 1024, 2048, 1024, 2048),
        ("cityscapes_refined", 1, 19, 1024, 2048, 1024, 2048, 1024, 2048),
        ("ade20k_coarse", 1, 150, 128, 171, 512, 683, 768, 1024),
        ("ade20k_refined", 1, 150, 512, 684, 512, 683, 768, 1024),
    ]
]


def main(argv=None) -> int:
    return harness.main("decode", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
