"""The whole refinement, coarse logits and features in, labels or logits of the image out.

python -m benchmarks.bench_refine --only cityscapes_labels
"""

import sys
from functools import partial

from benchmarks import floors, harness, inputs, stock
from pointrend_triton import ops


def make(s, dtype, device):
    return {
        "coarse": inputs.logits((s["N"], s["C"], s["H"], s["W"]), dtype, device),
        "fine": inputs.features((s["N"], s["F"], s["fh"], s["fw"]), dtype, device),
        **inputs.layers(s, dtype, device),
    }


def sizes_of(s):
    return (s["image_h"], s["image_w"]), (s["h"], s["w"])


def theirs(x, s, output):
    return stock.refine(
        x["coarse"], x["fine"], x["weights"], x["biases"], s["k"], sizes_of(s), output
    )


def ours(x, s, output):
    image_size, size = sizes_of(s)
    return ops.refine(
        x["coarse"],
        x["fine"],
        x["weights"],
        x["biases"],
        num_points=s["k"],
        output=output,
        image_size=image_size,
        size=size,
    )


def work(s, size, output):
    return {"forward": floors.refine(s, size, output=output, pixels=s["h"] * s["w"])}


NAMES = ("C", "H", "W", "image_h", "image_w", "h", "w")
CASES = [
    harness.Case(
        f"{name}_{output}",
        {"N": 1, "F": 256, "D": 256, "L": 3, "k": 8196, "fh": sizes[1], "fw": sizes[2]}
        | dict(zip(NAMES, sizes, strict=True)),
        make,
        partial(theirs, output=output),
        partial(ours, output=output),
        partial(work, output=output),
        maps=("coarse", "fine"),
    )
    for output in ("labels", "logits")
    for name, *sizes in [
        ("cityscapes", 19, 256, 512, 1024, 2048, 1024, 2048),
        ("ade20k", 150, 128, 171, 512, 683, 768, 1024),
    ]
]


def main(argv=None) -> int:
    return harness.main("refine", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
