"""Runs the real mmsegmentation 1.2.2 on a CPU: writes the golden files, or compares this project
with it in full.

It needs an environment of its own, made from the package index alone:

    python3.11 -m venv .peer
    .peer/bin/pip install "setuptools<81" wheel torch==2.13.0 numpy==1.26.4
    .peer/bin/pip install --no-build-isolation \\
        mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0 \\
        ftfy==6.3.1 regex einops==0.8.2 numpy==1.26.4 opencv-python==4.11.0.86 tqdm

and then

    .peer/bin/python tests/golden/make_golden.py write
    .peer/bin/python tests/golden/make_golden.py compare \\
        --json benchmarks/results/parity_mmsegmentation.json

`write` makes tests/golden/*.npz, which tests/test_parity.py checks without mmsegmentation.
`compare` takes some minutes; it covers both depths and class counts at the sizes below and exits
with 1 if a tolerance is missed. Their numerics are untouched: torch.rand is replaced while the
training loss is computed, methods are wrapped to record what they return, and mmcv's compiled
extension, which PointRend never calls, is a placeholder.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import sys
import tempfile
import types
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from drawn import draw_images, draw_labels, draw_points, draw_state  # noqa: E402

warnings.filterwarnings("ignore")

# the golden files: few test points, so that choosing them is still a choice on small maps
GOLDEN = {
    "r18_c5": {
        "depth": 18,
        "classes": 5,
        "size": (33, 65),
        "points": 128,
        "subdivision_points": 200,
    },
    "r50_c19": {
        "depth": 50,
        "classes": 19,
        "size": (64, 128),
        "points": 256,
        "subdivision_points": 400,
    },
    "r101_c150": {
        "depth": 101,
        "classes": 150,
        "size": (65, 97),
        "points": 256,
        "subdivision_points": 400,
    },
}
COMPARED_SIZES = {19: [(512, 1024), (33, 65), (8, 8)], 150: [(512, 683), (33, 65), (8, 8)]}
SEED, BATCH = 0, 2


class _Absent(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: (_ for _ in ()).throw(
            RuntimeError(f"mmcv op {name} is not compiled")
        )


def build_peer(depth, classes, points=2048, subdivision_points=8196):
    """The published configuration for one CPU (BN for SyncBN), with weights drawn by name."""
    if "mmcv._ext" not in sys.modules:
        stub = _Absent("mmcv._ext")
        stub.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
        sys.modules["mmcv._ext"] = stub
    import mmseg
    import mmseg.models  # registers the classes
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    MMLogger.get_instance("mmengine", log_level="ERROR")
    init_default_scope("mmseg")
    folder = Path(mmseg.__file__).parent / ".mim" / "configs" / "point_rend"
    name = "4xb4-160k_ade20k-512x512" if classes == 150 else "4xb2-80k_cityscapes-512x1024"
    whole = Config.fromfile(f"{folder}/pointrend_r{101 if depth == 101 else 50}_{name}.py")
    config = whole.model
    config.pretrained = None
    config.backbone.depth = depth
    if depth < 50:
        config.neck.in_channels = [64, 128, 256, 512]
    config.backbone.norm_cfg.type = config.decode_head[0].norm_cfg.type = "BN"
    for head in config.decode_head:
        head.num_classes = classes
    config.train_cfg.num_points = points
    config.test_cfg.subdivision_num_points = subdivision_points
    model = MODELS.build(config)
    model.load_state_dict(draw_state(model.state_dict(), SEED))
    model.cfg = whole  # where their inference finds the test pipeline
    return model.eval()


@contextmanager
def recorded(*methods):
    """Within, keeps what each (object, method name) returns -> one list per method."""

    def wrap(method, returned):
        def wrapper(*args, **kwargs):
            returned.append(method(*args, **kwargs))
            return returned[-1]

        return wrapper

    with ExitStack() as stack:
        lists = [[] for _ in methods]
        for (owner, name), returned in zip(methods, lists, strict=True):
            stack.enter_context(
                mock.patch.object(owner, name, wrap(getattr(owner, name), returned))
            )
        yield lists


@contextmanager
def injected_rand(draws):
    """Within, torch.rand hands out `draws` in turn, checking their shapes."""
    queue = list(draws)

    def next_draw(*shape, **kwargs):
        assert tuple(shape) == tuple(queue[0].shape), (shape, queue[0].shape)
        return queue.pop(0).clone()

    with mock.patch.object(torch, "rand", next_draw):
        yield
    assert not queue, f"{len(queue)} draws were not asked for"


def point_counts(points):
    return int(points * 3.0), points - int(0.75 * points)


def evaluate_peer(model, images):
    coarse_head, point_head = model.decode_head
    model.eval()
    with (
        torch.no_grad(),
        recorded(
            (coarse_head, "forward"), (model, "extract_feat"), (point_head, "get_points_test")
        ) as (coarse, pyramid, points),
    ):
        final = torch.stack([sample.seg_logits.data for sample in model.predict(images)])
    return {"coarse": coarse[0], "pyramid": list(pyramid[0]), "points": points, "final": final}


def model_buffers(model):
    """BatchNorm's, without the image mean and std that mmsegmentation 1.x keeps beside them."""
    return {
        name: b for name, b in model.named_buffers() if not name.startswith("data_preprocessor")
    }


def predict_peer(model, images, size):
    """Their labels [N, H, W] at the size of an original image that `images` were resized from."""
    from mmseg.structures import SegDataSample

    shape = tuple(images.shape[2:])
    metas = {"ori_shape": size, "img_shape": shape, "pad_shape": shape, "padding_size": [0] * 4}
    model.eval()
    with torch.no_grad():
        samples = [SegDataSample(metainfo=metas) for _ in images]
        return torch.stack([s.pred_sem_seg.data[0] for s in model.predict(images, samples)])


def train_peer(model, images, labels, draws):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = [
        SegDataSample(
            gt_sem_seg=PixelData(data=one[None]),
            metainfo={"img_shape": images.shape[2:], "ori_shape": images.shape[2:]},
        )
        for one in labels
    ]
    model.train().zero_grad()
    with injected_rand(draws):
        losses = model.loss(images, samples)
    total, _ = model.parse_losses(losses)
    total.backward()
    return {
        "losses": {
            "loss": total,
            "loss_coarse": losses["decode_0.loss_ce"],
            "loss_point": losses["decode_1.pointloss_ce"],
        },
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": model_buffers(model),
    }


def probes(tensor, name, count):
    """`count` positions of a tensor, drawn from its name: a value that moved shows at them."""
    return np.random.RandomState(len(name)).randint(0, tensor.numel(), count)


def write():
    for name, case in GOLDEN.items():
        model = build_peer(
            case["depth"], case["classes"], case["points"], case["subdivision_points"]
        )
        images = draw_images(BATCH, case["size"], SEED)
        evaluated = evaluate_peer(model, images)
        labels = draw_labels(BATCH, case["size"], case["classes"], SEED)
        trained = train_peer(
            model, images, labels, draw_points(BATCH, point_counts(case["points"]), SEED)
        )
        arrays = {}
        maps = {f"pyramid{i}": level for i, level in enumerate(evaluated["pyramid"])}
        for key, tensor in {
            "coarse": evaluated["coarse"],
            "final": evaluated["final"],
            **maps,
        }.items():
            flat = tensor.flatten()
            arrays[f"{key}_probes"] = flat[probes(flat, key, 2048)]
        for step, (indices, _) in enumerate(evaluated["points"]):
            arrays[f"step{step}_indices"] = indices.int()
        for key, value in trained["losses"].items():
            arrays[key] = value.detach()
        # of every gradient: the largest magnitude, the norm, and some of its values
        for key, grad in trained["gradients"].items():
            flat = grad.flatten()
            values = [flat.abs().max(), flat.norm(), *flat[probes(flat, key, 6)]]
            arrays[f"grad/{key}"] = torch.stack(values)
        for key, buffer in trained["buffers"].items():
            if key.endswith("num_batches_tracked"):
                continue
            flat = buffer.flatten()
            arrays[f"buffer/{key}"] = torch.stack([flat.norm(), *flat[probes(flat, key, 3)]])
        arrays["batches_backbone"] = model.backbone.stem[1].num_batches_tracked
        arrays["batches_coarse_head"] = (
            model.decode_head[0].scale_heads[0][0].bn.num_batches_tracked
        )
        path = HERE / f"{name}.npz"
        np.savez_compressed(path, **{k: np.asarray(v) for k, v in arrays.items()})
        print(
            f"{path.name}: {path.stat().st_size / 1024:.0f} KB, std of logits: coarse "
            f"{evaluated['coarse'].std():.2f}, final {evaluated['final'].std():.2f}"
        )


def compare_case(depth, classes, size):
    """One model at one size -> rows of (what, measured, tolerance)."""
    from pointrend_triton import reference
    from pointrend_triton.config import ModelConfig
    from pointrend_triton.models import PointRend

    peer, ours = (
        build_peer(depth, classes),
        PointRend(ModelConfig(depth=depth, num_classes=classes)),
    )
    ours.load_state_dict(peer.state_dict())
    ours.eval()
    images = draw_images(1, size, SEED)
    theirs = evaluate_peer(peer, images)
    rows = []
    with torch.no_grad():
        pyramid = ours.features(images)
        worst = max((a - b).abs().max() for a, b in zip(pyramid, theirs["pyramid"], strict=True))
        rows.append(("pyramid, max abs", worst.item(), 1e-4))
        worst = (ours.coarse_head(pyramid) - theirs["coarse"]).abs().max()
        rows.append(("coarse logits, max abs", worst.item(), 1e-4))
        fed, unexcused = list(theirs["points"]), []

        def peer_points(uncertainty, k):
            indices, coords = fed.pop(0)
            mine, my_coords = original(uncertainty, k)
            unexcused.append(count_unexcused(uncertainty, mine, indices))
            order_mine, order_theirs = mine.argsort(dim=1), indices.argsort(dim=1)
            if torch.equal(mine.gather(1, order_mine), indices.gather(1, order_theirs)):
                sorted_mine = my_coords.gather(1, order_mine[..., None].expand_as(my_coords))
                sorted_theirs = coords.gather(1, order_theirs[..., None].expand_as(coords))
                assert torch.equal(sorted_mine, sorted_theirs), "coordinates differ in bits"
            return indices, coords

        original = reference.topk_on_grid
        with mock.patch.object(reference, "topk_on_grid", peer_points):
            final = ours(images)
        rows.append(("chosen cells that differ, not excused", sum(unexcused), 0))
        worst = (final - theirs["final"]).abs().max()
        rows.append(("refined logits at their points, max abs", worst.item(), 1e-4))
    source_size = (size[0] * 3 // 2 + 1, size[1] * 3 // 2 - 1)
    differ = ours.predict(images, source_size) != predict_peer(peer, images, source_size)
    share = differ.double().mean().item()
    rows.append(("labels at an original image's size, share that differs", share, 1e-5))
    if min(size) < 32:  # BatchNorm over one value per channel has no statistics to train with
        return rows
    size = (min(size[0], 256), min(size[1], 512))
    images, labels = draw_images(BATCH, size, SEED), draw_labels(BATCH, size, classes, SEED)
    draws = draw_points(BATCH, point_counts(2048), SEED)
    theirs = train_peer(peer, images, labels, draws)
    ours.train()
    with injected_rand(draws):
        losses = ours(images, labels)
    losses["loss"].backward()
    for key, value in theirs["losses"].items():
        rows.append((f"{key}, relative", ((losses[key] - value).abs() / value.abs()).item(), 1e-5))
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == theirs["gradients"].keys()
    worst = max(
        ((parameters[key].grad - grad).abs().max() / grad.abs().max()).item()
        for key, grad in theirs["gradients"].items()
    )
    rows.append(
        (
            f"gradients of all {len(parameters)} parameters, relative to each one's largest",
            worst,
            1e-3,
        )
    )
    buffers = model_buffers(ours)
    assert buffers.keys() == theirs["buffers"].keys()
    counts = [k for k in buffers if k.endswith("num_batches_tracked")]
    wrong = sum(not torch.equal(buffers[k], theirs["buffers"][k]) for k in counts)
    rows.append(("BatchNorm batch counts that differ", wrong, 0))
    worst = max(
        ((buffers[k] - b).abs().max() / b.abs().max()).item()
        for k, b in theirs["buffers"].items()
        if k not in counts
    )
    rows.append(("BatchNorm statistics, relative to each one's largest", worst, 1e-5))
    return rows


def compare_file(depth, classes, size):
    """From an image file to labels, through both sides' own test pipelines -> rows as above."""
    import cv2

    from pointrend_triton.config import ModelConfig
    from pointrend_triton.data import TestTransform, read_image
    from pointrend_triton.models import PointRend

    peer, ours = build_peer(depth, classes), PointRend(ModelConfig(depth, classes))
    ours.load_state_dict(peer.state_dict())
    from mmseg.apis import inference_model  # wants the placeholder that build_peer made

    pixels = (60 * draw_images(1, size, SEED)[0] + 128).clamp(0, 255).byte()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/image.png"
        assert cv2.imwrite(path, pixels.permute(1, 2, 0).numpy())
        theirs = inference_model(peer, path).pred_sem_seg.data[0]
        image = read_image(path)
    # the base scales of the published test pipelines
    transform = TestTransform((2048, 512) if classes == 150 else (2048, 1024))
    labels = ours.eval().predict(transform(image)[None], size=size)[0]
    share = (labels != theirs).double().mean().item()
    return [("labels of an image file, share that differs", share, 1e-5)]


def count_unexcused(uncertainty, mine, theirs):
    """Cells that only one side chose, unless their margin lies within 1e-5 of the k-th."""
    count = 0
    for scores, a, b in zip(uncertainty.flatten(1), mine, theirs, strict=True):
        kth = scores[a].min()
        differ = set(a.tolist()) ^ set(b.tolist())
        count += sum(abs(scores[cell] - kth).item() > 1e-5 for cell in differ)
    return count


def compare(path):
    cases, failed = [], 0
    for depth in (50, 101):
        for classes, sizes in COMPARED_SIZES.items():
            for size in sizes:
                print(f"R-{depth}, {classes} classes, {size[0]}x{size[1]}")
                rows = compare_case(depth, classes, size)
                if size == (33, 65):  # enlarged by the test pipeline, to an odd size
                    rows += compare_file(depth, classes, (301, 400))
                for what, value, limit in rows:
                    failed += not value <= limit
                    print(
                        f"  {what:68s} {value:10.3g}  limit {limit:g}"
                        f"{'' if value <= limit else '  MISSED'}"
                    )
                checks = [{"what": w, "value": v, "limit": limit} for w, v, limit in rows]
                cases.append(
                    {"depth": depth, "classes": classes, "size": list(size), "checks": checks}
                )
    if path:
        import mmseg

        from pointrend_triton.environment import environment

        record = {"command": "python tests/golden/make_golden.py compare --json FILE"}
        record |= environment(torch.device("cpu"))
        record["versions"]["mmsegmentation"] = mmseg.__version__
        record |= {"failed": failed, "cases": cases}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{failed} checks missed their limit")
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["write", "compare"])
    parser.add_argument("--json", help="where `compare` writes its figures")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    return write() if args.what == "write" else compare(args.json)


if __name__ == "__main__":
    sys.exit(main())
