"""The point head at points: sampling, concatenation and MLP; forward and, in training, backward.

python -m benchmarks.bench_point_head --only train_cityscapes
"""

import sys

from benchmarks import floors, harness, inputs, stock
from pointrend_triton import ops

MAPS = ("fine", "coarse")
LAYERS = ("weights", "biases")


def make(s, dtype, device):
    return {
        "fine": inputs.features((s["N"], s["F"], s["fh"], s["fw"]), dtype, device),
        "coarse": inputs.logits((s["N"], s["C"], s["H"], s["W"]), dtype, device),
        "coords": inputs.coords(s["N"], s["P"], device),
        **inputs.layers(s, dtype, device),
    }


def arguments(x):
    return x["fine"], x["coarse"], x["coords"], x["weights"], x["biases"]


CASES = [
    harness.Case(
        name,
        {"N": n, "C": c, "F": 256, "D": 256, "L": 3, "fh": h, "fw": w, "H": h, "W": w, "P": points},
        make,
        lambda x, s: stock.point_head(*arguments(x)),
        lambda x, s: ops.point_head(*arguments(x)),
        lambda s, size: floors.head(s, s["P"], size),
        maps=MAPS,
        wrt=(*MAPS, *LAYERS) if name.startswith("train") else (),
    )
    for name, n, c, h, w, points in [
        ("cityscapes", 1, 19, 256, 512, 8196),
        ("ade20k", 1, 150, 128, 171, 8196),
        ("train_cityscapes", 8, 19, 128, 256, 2048),
        ("train_ade20k", 8, 150, 128, 128, 2048),
    ]
]


def main(argv=None) -> int:
    return harness.main("point_head", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
