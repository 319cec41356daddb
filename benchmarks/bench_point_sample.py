"""Sampling maps at points: features, logits, labels and masks; forward and backward.

"row gather" is a floor of `features_dense`: the same four rows of channels per point are added up,
with no arithmetic on coordinates and weights.

python -m benchmarks.bench_point_sample --only features_dense
"""

import sys
from functools import partial

import torch

from benchmarks import floors, harness, inputs, row_gather, stock
from pointrend_triton import ops


def make(s, dtype, device, shared=False):
    shape = (s["N"], s["C"], s["H"], s["W"])
    if dtype == torch.bool:
        maps = inputs.logits(shape, torch.float32, device) > 0
    elif dtype == torch.int64:
        maps = torch.randint(19, shape, device=device)
    else:
        maps = inputs.features(shape, dtype, device)
    return {"map": maps, "coords": inputs.coords(1 if shared else s["N"], s["P"], device)}


def make_dense(s, dtype, device):
    made = make(s, dtype, device)
    return {**made, "rows": row_gather.taps(made["coords"], s["H"], s["W"])}


def ours(x, s, mode):
    # what stock writes: the type of the map where that is a float
    out_dtype = x["map"].dtype if x["map"].is_floating_point() else None
    return ops.point_sample(x["map"], x["coords"], mode=mode, out_dtype=out_dtype)


def case(name, sizes, dtypes, *, mode="bilinear", shared=False, gradient=True, dense=False):
    def work(s, size):
        out = {"bool": 4}.get(dtypes[0], size)
        return floors.sample(s["N"], s["C"], s["H"] * s["W"], s["P"], size, out, shared)

    return harness.Case(
        name,
        dict(zip(("N", "C", "H", "W", "P"), sizes, strict=True)),
        make_dense if dense else partial(make, shared=shared),
        lambda x, s: stock.point_sample(x["map"], x["coords"], mode),
        lambda x, s: ours(x, s, mode),
        work,
        dtypes,
        maps=("map",) if sizes[1] > 1 else (),
        wrt=("map",) if gradient else (),
        extra={"row gather": lambda x, s: row_gather.gather(x["map"], x["rows"])} if dense else {},
    )


FLOATS = ("bf16", "fp32")
CASES = [
    case("features_dense", (8, 256, 128, 256, 65536), FLOATS, dense=True),
    case("train_features", (8, 256, 128, 256, 2048), FLOATS),
    case("train_candidates", (8, 19, 128, 256, 6144), FLOATS, gradient=False),
    case("train_labels", (8, 1, 512, 1024, 2048), ("int64",), mode="nearest", gradient=False),
    case("cityscapes_features", (1, 256, 256, 512, 8196), FLOATS, gradient=False),
    case("mask2former_logits", (100, 1, 256, 256, 12544), FLOATS),
    # all masks of an image at the same points, as the matcher wants them
    case("mask2former_masks", (20, 1, 1024, 1024, 12544), ("bool",), shared=True, gradient=False),
]


def main(argv=None) -> int:
    return harness.main("point_sample", CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
