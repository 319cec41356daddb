"""The exact top-k of scores on a grid: one long row (inference) or many short ones (training).

python -m benchmarks.bench_select --only cityscapes_step2
"""

import sys

import torch

from benchmarks import floors, harness, inputs, stock
from pointrend_triton import ops


def make(s, dtype, device):
    # scores as a refinement has them: minus the margin between the two best classes
    logits = inputs.logits((s["N"], 4, s["H"], s["W"]), torch.float32, device)
    return {"scores": stock.uncertainty(logits).to(dtype)}


def chosen(x, result):
    """The scores of the chosen cells, ascending: indices may differ in order, and where tied."""
    return x["scores"].flatten(1).gather(1, result[0]).sort(dim=1).values


CASES = [
    harness.Case(
        name,
        {"N": n, "H": height, "W": width, "k": k},
        make,
        lambda x, s: stock.topk_on_grid(x["scores"], s["k"]),
        lambda x, s: ops.topk_on_grid(x["scores"], s["k"]),
        lambda s, size: {"forward": floors.topk(s["N"], s["H"] * s["W"], s["k"])},
        dtypes=("fp32",),
        comparable=chosen,
    )
    for name, n, height, width, k in [
        ("cityscapes_step1", 1, 512, 1024, 8196),
        ("cityscapes_step2", 1, 1024, 2048, 8196),
        ("ade20k_step1", 1, 256, 342, 8196),
        ("ade20k_step2", 1, 512, 684, 8196),
        ("train_candidates", 8, 1, 6144, 1536),
        ("mask2former_candidates", 100, 1, 37632, 9408),
    ]
]


def main(argv=None) -> int:
    return harness.main("select", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
