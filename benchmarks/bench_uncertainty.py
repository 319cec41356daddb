"""Scores: twofold enlargement with margins (and labels), and the selection of points to train on.

python -m benchmarks.bench_uncertainty --only cityscapes_step2_labels
"""

import sys

from benchmarks import floors, harness, inputs, stock
from pointrend_triton import ops


def enlarge(name, classes, height, width, labels):
    """Step 1 gives logits, step 2 labels instead."""
    options = {"return_logits": not labels, "return_labels": labels}
    return harness.Case(
        name,
        {"N": 1, "C": classes, "H": height, "W": width},
        lambda s, dtype, device: {
            "logits": inputs.logits((s["N"], s["C"], s["H"], s["W"]), dtype, device)
        },
        lambda x, s: stock.upsample_uncertainty(x["logits"], **options),
        lambda x, s: ops.upsample_uncertainty(x["logits"], **options),
        lambda s, size: {
            "forward": floors.upsample(
                s["N"], s["C"], s["H"] * s["W"], size, logits=not labels, labels=labels
            )
        },
        maps=("logits",),
    )


def make_training(s, dtype, device):
    logits = inputs.logits((s["N"], s["C"], s["H"], s["W"]), dtype, device)
    return {"logits": logits, "draws": inputs.draws(s["N"], s["P"], device)}


def select(name, n, classes, height, width, points):
    return harness.Case(
        name,
        {"N": n, "C": classes, "H": height, "W": width, "P": points},
        make_training,
        lambda x, s: stock.select_uncertain_points(x["logits"], s["P"], x["draws"]),
        lambda x, s: ops.select_uncertain_points(x["logits"], s["P"], draws=tuple(x["draws"])),
        lambda s, size: {
            "forward": floors.select_points(s["N"], s["C"], s["H"] * s["W"], s["P"], size)
        },
        maps=("logits",) if classes > 1 else (),
        # the uncertain ones may come in any order
        comparable=lambda x, coords: coords[..., 0].sort(dim=1).values,
    )


CASES = [
    enlarge("cityscapes_step1", 19, 256, 512, labels=False),
    enlarge("cityscapes_step2_labels", 19, 512, 1024, labels=True),
    enlarge("ade20k_step1", 150, 128, 171, labels=False),
    enlarge("ade20k_step2_labels", 150, 256, 342, labels=True),
    select("train_select", 8, 19, 128, 256, 2048),
    select("mask2former_select", 100, 1, 256, 256, 12544),
]


def main(argv=None) -> int:
    return harness.main("uncertainty", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
