"""Trains beside the real mmsegmentation 1.2.2 on a CPU: same weights, batches, point draws and
learning rates on both sides.

It needs make_golden.py's environment with two packages more, CamVid, and some minutes:

    .peer/bin/pip install tqdm tensorboard
    .peer/bin/python tests/golden/recipe.py path/to/camvid

This makes three files again:

- tests/golden/r18_recipe.npz: three steps of a small network on drawn pictures, which
  tests/test_recipe.py takes too, without mmsegmentation;
- benchmarks/results/recipe.json: 20 single steps on CamVid, each from mmsegmentation's own state,
  and 200 iterations in which both run freely, beside five runs of mmsegmentation whose initial
  weights were changed by 1e-7, about the spacing of fp32;
- benchmarks/results/recipe.png: the losses of the free runs.

It exits with 1 if a single step misses a limit. Their side is `train_step` with the optimiser of
their own configuration: preprocessing, losses, backward and SGD are theirs. Ours is the iteration
of train.py. What is replaced is torch.rand, which hands out the draws, and on their side the
learning rate: the published models were trained under the curve of mmcv 1.x, and mmsegmentation
1.x has another.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import io
import sys
import warnings
from importlib import metadata
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from drawn import draw_images, draw_labels, draw_points, draw_state  # noqa: E402
from make_golden import _Absent, injected_rand, point_counts  # noqa: E402

import train  # noqa: E402
from pointrend_triton.config import load_config  # noqa: E402
from pointrend_triton.data import build_dataset, train_loader  # noqa: E402
from pointrend_triton.data.loader import to_device  # noqa: E402
from pointrend_triton.environment import environment  # noqa: E402
from pointrend_triton.models import PointRend  # noqa: E402
from pointrend_triton.report import to_json  # noqa: E402
from pointrend_triton.training_report import smooth  # noqa: E402
from pointrend_triton.visualize import write_atomic  # noqa: E402

GOLDEN = HERE / "r18_recipe.npz"
RESULT = ROOT / "benchmarks" / "results" / "recipe.json"
SMALL = {
    "model": {
        **{"depth": 18, "num_classes": 5},
        **{"base_channels": 4, "fpn_channels": 8, "head_channels": 8},
        "point_head": {"channels": 8, "num_points": 64},
    },
    "train": {"iterations": 4, "warmup_iterations": 2, "batch_size": 2, "lr": 0.05},
    "data": {"crop_size": [64, 96]},
}
SMALL_STEPS = 3
# on top of configs/camvid_r18.yaml
CAMVID = (
    *("iterations=200", "lr=0.01", "warmup_iterations=50", "batch_size=4", "crop_size=[64,96]"),
    *("base_channels=32", "num_points=256", "amp=false", "channels_last=false", "workers=0"),
)
EVERY = 10  # iterations from one single step to the next
CHANGE, CHANGED_RUNS = 1e-7, 5
RAISED = 1.01  # of the learning rate, in a run that is meant to leave the band
WINDOW = 10  # iterations that a loss is averaged over
THEIRS = "mmsegmentation"  # begins the names of its runs
LOSSES = ("loss", "loss_coarse", "loss_point")
LIMITS = {
    "loss": 1e-5,
    "loss_coarse": 1e-5,
    "loss_point": 1e-5,
    "update": 1e-4,
    "weights": 1e-4,
    "all_weights": 1e-4,
    "statistics": 1e-5,
    "batch_counts": 0,
}
MEASURES = {
    "loss": "|ours - theirs| / |theirs|; likewise loss_coarse and loss_point",
    "update": "momentum after the step, which times the learning rate is the update: per tensor "
    "max|ours - theirs| / max|theirs|; the worst tensor",
    "weights": "weights after the step: per tensor, what exceeds the spacing of fp32 at the weight "
    "(2^-23 of it) in max|ours - theirs|, / max|theirs - before|; the worst tensor",
    "all_weights": "weights after the step, all tensors joined, rounding included: "
    "norm(ours - theirs) / norm(theirs - before)",
    "statistics": "BatchNorm's running means and variances: per tensor "
    "max|ours - theirs| / max|theirs|; the worst tensor",
    "batch_counts": "BatchNorm's batch counts that differ",
}
FREE_MEASURE = (
    f"losses averaged over {WINDOW} iterations (fewer at the start) against the span, from lowest "
    f"to highest, of mmsegmentation's runs: the original one and {CHANGED_RUNS} whose initial "
    f"weights were multiplied by 1 + {CHANGE} x a standard normal draw; each of these against the "
    "other five. inside: 1 or 0 for every iteration. Of runs that differ by chance alone, one is "
    "outside the span of n others in 2 of n + 1 cases: 29 % of the iterations for ours, 33 % for "
    "theirs. farthest: relative to the loss. multiple: distance from their mean over that of the "
    "farthest of them and the spacing of fp32, at the worst iteration; it is what tells another "
    "recipe apart, since after some 25 iterations all runs have parted by chance"
)


# ---------------------------------------------------------------- the two sides


class Side:
    """A model in training mode and its optimiser; `step` is one iteration -> its three losses."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def state(self):
        """Copies of the weights, BatchNorm statistics and momenta, by name."""
        state = {f"model/{name}": t.clone() for name, t in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            state[f"momentum/{name}"] = (
                torch.zeros_like(parameter) if momentum is None else momentum.clone()
            )
        return state

    def load(self, state):
        model = {n.removeprefix("model/"): t for n, t in state.items() if n.startswith("model/")}
        self.model.load_state_dict(model)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = state[f"momentum/{name}"].clone()

    def set_learning_rate(self, iteration):
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate(iteration, self.config.train)


class Ours(Side):
    def __init__(self, config):
        self.config = config
        self.model = PointRend(config.model).train()
        self.optimizer = train.make_optimizer(self.model, config.train)

    def step(self, iteration, batch, draws):
        images, labels, _ = to_device(batch, torch.device("cpu"))
        self.set_learning_rate(iteration)
        self.optimizer.zero_grad(set_to_none=True)
        with injected_rand(draws):
            losses = train.backward(self.model, images, labels, self.config.train)
        train.guarded_step(self.optimizer, self.model)
        return {name: losses[name].item() for name in LOSSES}


class Theirs(Side):
    def __init__(self, config):
        whole = peer_config(config)
        import mmseg.models  # noqa: F401, registers the classes
        from mmengine.logging import MMLogger
        from mmengine.optim import build_optim_wrapper
        from mmengine.registry import init_default_scope
        from mmseg.registry import MODELS

        MMLogger.get_instance("mmengine", log_level="ERROR")
        init_default_scope("mmseg")
        self.config = config
        self.model = MODELS.build(whole.model).train()
        self.wrapper = build_optim_wrapper(self.model, whole.optim_wrapper)
        self.optimizer = self.wrapper.optimizer

    def step(self, iteration, batch, draws):
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        pixels, classes, _, _ = batch
        size = {"img_shape": classes.shape[1:], "ori_shape": classes.shape[1:]}
        samples = [
            SegDataSample(gt_sem_seg=PixelData(data=one[None].long()), metainfo=size)
            for one in classes
        ]
        self.set_learning_rate(iteration)
        data = {"inputs": list(pixels.permute(0, 3, 1, 2)), "data_samples": samples}
        with injected_rand(draws):
            out = self.model.train_step(data, self.wrapper)
        names = {"loss_coarse": "decode_0.loss_ce", "loss_point": "decode_1.pointloss_ce"}
        return {name: out[names.get(name, name)].item() for name in LOSSES}


def peer_config(config):
    """mmsegmentation's published configuration, for one CPU and the sizes of ours."""
    if "mmcv._ext" not in sys.modules:
        stub = _Absent("mmcv._ext")
        stub.__spec__ = importlib.machinery.ModuleSpec("mmcv._ext", None)
        sys.modules["mmcv._ext"] = stub
    import mmseg
    from mmengine.config import Config

    folder = Path(mmseg.__file__).parent / ".mim" / "configs" / "point_rend"
    whole = Config.fromfile(f"{folder}/pointrend_r50_4xb2-80k_cityscapes-512x1024.py")
    ours, theirs = config.model, whole.model
    coarse, points = theirs.decode_head
    theirs.pretrained = None
    theirs.data_preprocessor.size = config.data.crop_size
    width = ours.base_channels
    theirs.backbone.update(depth=ours.depth, base_channels=width, stem_channels=width)
    theirs.backbone.norm_cfg.type = coarse.norm_cfg.type = "BN"
    theirs.neck.in_channels = PointRend(ours).backbone.out_channels
    theirs.neck.out_channels = ours.fpn_channels
    coarse.update(in_channels=[ours.fpn_channels] * 4, channels=ours.head_channels)
    points.update(in_channels=[ours.fpn_channels], channels=ours.point_head.channels)
    for head in (coarse, points):
        head.num_classes = ours.num_classes
    theirs.train_cfg.num_points = ours.point_head.num_points
    for name in ("momentum", "weight_decay"):
        assert whole.optim_wrapper.optimizer[name] == getattr(config.train, name)
    return whole


# ---------------------------------------------------------------- single steps


def differences(before, theirs, ours):
    """What MEASURES says, of the losses in a step from `before` and the states after it."""
    (their_losses, their_state), (our_losses, our_state) = theirs, ours
    gaps = {name: (our_state[name] - their_state[name]).abs() for name in before}
    momenta = [name for name in before if name.startswith("momentum/")]
    weights = [name.replace("momentum/", "model/") for name in momenta]
    statistics = [name for name in before if "running_" in name]
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    updates = {name: their_state[name] - before[name] for name in weights}
    beyond = {
        name: (gaps[name] - 2**-23 * their_state[name].abs()).clamp(min=0) for name in weights
    }
    return {
        **{n: abs(our_losses[n] - their_losses[n]) / abs(their_losses[n]) for n in LOSSES},
        "update": _worst(gaps, their_state, momenta),
        "weights": _worst(beyond, updates, weights),
        "all_weights": (_joined(gaps, weights).norm() / _joined(updates, weights).norm()).item(),
        "statistics": _worst(gaps, their_state, statistics),
        "batch_counts": sum(gaps[name].item() != 0 for name in counts),
    }


def _worst(gaps, scales, names):
    """The largest gap over the largest magnitude, of the worst tensor; 0 where nothing differs."""
    ratios = [gaps[name].max() / scales[name].abs().max() for name in names if gaps[name].any()]
    return torch.stack([torch.tensor(0.0), *ratios]).max().item()


def _joined(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names])


def missed(found):
    """The names of LIMITS that are not kept; NaN keeps none."""
    return [name for name, limit in LIMITS.items() if not found[name] <= limit]


# ---------------------------------------------------------------- the golden file


def small_start(side):
    """The drawn state, without momentum, that the golden steps begin with."""
    model = draw_state(side.model.state_dict(), seed=0)
    state = {f"model/{name}": tensor for name, tensor in model.items()}
    return state | {n: torch.zeros_like(t) for n, t in side.state().items() if "momentum/" in n}


def small_step(config, step):
    """Batch and draws of a golden step."""
    count, size = config.train.batch_size, config.data.crop_size
    pixels = (60 * draw_images(count, size, step) + 128).clamp(0, 255).byte()
    classes = draw_labels(count, size, config.model.num_classes, step).byte()
    batch = (pixels.permute(0, 2, 3, 1), classes, [size] * count, [""] * count)
    return batch, draw_points(count, point_counts(config.model.point_head.num_points), step)


def pack(state):
    """A state as one vector, in the order of its names."""
    return torch.cat([state[name].flatten().float() for name in sorted(state)])


def unpack(vector, like):
    """The vector of `pack` as a state with the names, shapes and types of `like`."""
    names = sorted(like)
    parts = vector.split([like[name].numel() for name in names])
    return {n: p.view_as(like[n]).to(like[n].dtype) for n, p in zip(names, parts, strict=True)}


def write_golden():
    config = load_config(SMALL)
    peer = Theirs(config)
    peer.load(small_start(peer))
    states, losses = [], []
    for step in range(SMALL_STEPS):
        out = peer.step(step, *small_step(config, step))
        losses.append([out[name] for name in LOSSES])
        states.append(pack(peer.state()).numpy())
    rates = [train.learning_rate(step, config.train) for step in range(SMALL_STEPS)]
    np.savez_compressed(GOLDEN, states=np.stack(states), losses=losses, rates=rates)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size / 1024:.0f} KB, losses {losses}")


# ---------------------------------------------------------------- on CamVid


def inputs(config):
    """Batch and draws of every iteration."""
    settings = config.train
    dataset = build_dataset(config.data, config.data.train_split)
    loader = train_loader(
        dataset, config.data, settings.batch_size, settings.seed, 0, settings.iterations
    )
    counts = point_counts(config.model.point_head.num_points)
    return [
        (batch, draw_points(settings.batch_size, counts, iteration))
        for iteration, batch in enumerate(loader.host_batches())
    ]


def original_run(config, start, fed):
    """Their run, and single steps of ours from its states -> its losses, and rows of figures."""
    peer, ours = Theirs(config), Ours(config)
    peer.load(start)
    losses, rows = [], []
    for iteration, given in enumerate(fed):
        if iteration % EVERY:
            losses.append(peer.step(iteration, *given)["loss"])
            continue
        before = peer.state()
        out = peer.step(iteration, *given)
        losses.append(out["loss"])
        ours.load(before)
        ours_out = ours.step(iteration, *given)
        found = differences(before, (out, peer.state()), (ours_out, ours.state()))
        rate = train.learning_rate(iteration, config.train)
        rows.append({"iteration": iteration, "lr": rate, "theirs": out, "ours": ours_out, **found})
        print(f"step {iteration}:", {name: f"{value:.1e}" for name, value in found.items()})
    return losses, rows


def free_run(side, start, fed):
    side.load(start)
    return [side.step(iteration, *given)["loss"] for iteration, given in enumerate(fed)]


def changed(start, seed):
    """The weights times 1 + CHANGE x a standard normal draw, rounded to fp32."""
    random = torch.Generator().manual_seed(seed)
    state = dict(start)
    for momentum in [name for name in start if name.startswith("momentum/")]:
        name = momentum.replace("momentum/", "model/")
        weight = start[name].double()
        noise = torch.randn(weight.shape, generator=random, dtype=torch.float64)
        state[name] = (weight * (1 + CHANGE * noise)).float()
    return state


def outside(run, others):
    """How often and how far a loss, averaged over WINDOW iterations, leaves the span of others."""
    mine, rest = smooth(run, WINDOW), np.stack([smooth(other, WINDOW) for other in others])
    mean, spacing = rest.mean(axis=0), 2**-23 * mine
    beyond = np.maximum(np.maximum(rest.min(axis=0) - mine, mine - rest.max(axis=0)), 0)
    distance, theirs = np.abs(mine - mean), np.abs(rest - mean).max(axis=0)
    return {
        "inside": "".join("1" if gap == 0 else "0" for gap in beyond),
        "iterations_outside": int((beyond > 0).sum()),
        "farthest_outside": (beyond / mine).max(),
        "farthest_from_the_mean": (distance / mine).max(),
        "largest_multiple_of_their_distance": (distance / (theirs + spacing)).max(),
    }


def compare(config):
    """All figures on CamVid, for the result file."""
    torch.manual_seed(config.train.seed)
    start, fed = Ours(config).state(), inputs(config)
    original, rows = original_run(config, start, fed)
    theirs = {THEIRS: original}
    for seed in range(1, CHANGED_RUNS + 1):
        theirs[f"{THEIRS}, changed {seed}"] = free_run(Theirs(config), changed(start, seed), fed)
    raised = load_config(config, [f"lr={RAISED * config.train.lr}"])
    ours = {
        "ours": free_run(Ours(config), start, fed),
        f"ours, learning rate x {RAISED}": free_run(Ours(raised), start, fed),
    }
    steps = {
        "measures": MEASURES,
        "limits": LIMITS,
        "worst": {name: max(row[name] for row in rows) for name in LIMITS},
        "missed": sum(len(missed(row)) for row in rows),
        "rows": rows,
    }
    losses = theirs | ours
    free = {"measure": FREE_MEASURE, "figures": band(losses), "losses": losses}
    return {"steps": steps, "free": free}


def band(losses):
    """What FREE_MEASURE says, of each run against mmsegmentation's others."""
    theirs = {name: run for name, run in losses.items() if name.startswith(THEIRS)}
    return {
        name: outside(run, [other for key, other in theirs.items() if key != name])
        for name, run in losses.items()
    }


def draw(losses):
    """The band, its mean and our losses; beside it each run's distance from the mean: a PNG."""
    runs = {name: smooth(run, WINDOW) for name, run in losses.items()}
    theirs = np.stack([run for name, run in runs.items() if name.startswith(THEIRS)])
    mean, iterations = theirs.mean(axis=0), np.arange(1, theirs.shape[1] + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    left.fill_between(iterations, theirs.min(axis=0), theirs.max(axis=0), alpha=0.4, color="gray")
    left.plot(iterations, mean, "k-", label=f"{THEIRS}, mean and span of {len(theirs)} runs")
    # a run without any distance has no place on a log scale
    right.plot(iterations, np.abs(theirs - mean).T / mean[:, None] + 1e-9, color="gray", lw=0.8)
    right.plot([], [], color="gray", label=f"{THEIRS}, each run")
    styles = iter(("C1-", "C0:"))
    for name, run in runs.items():
        if not name.startswith(THEIRS):
            style = next(styles)
            left.plot(iterations, run, style, label=name)
            right.plot(iterations, np.abs(run - mean) / mean + 1e-9, style, label=name)
    left.set(xlabel="iteration", ylabel=f"loss, mean of {WINDOW} iterations")
    right.set(xlabel="iteration", ylabel="distance from their mean / loss", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    plt.close(figure)
    return png.getvalue()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("camvid", help="the folder that holds CamVid")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # of mmengine's and mmsegmentation's own making
    torch.use_deterministic_algorithms(True)
    write_golden()
    about = {"command": "python tests/golden/recipe.py path/to/camvid"}
    about |= environment(torch.device("cpu"))
    about["versions"]["mmsegmentation"] = metadata.version("mmsegmentation")
    about["config"] = {"file": "configs/camvid_r18.yaml", "overrides": CAMVID}
    figures = compare(load_config("camvid_r18", [*CAMVID, f"root={args.camvid}"]))
    write_atomic(RESULT, to_json(about | figures))
    write_atomic(RESULT.with_suffix(".png"), draw(figures["free"]["losses"]))
    for name, row in figures["free"]["figures"].items():
        print(f"{name}: {row['iterations_outside']} iterations outside the span of the others")
    print(f"{figures['steps']['missed']} limits missed, worst {figures['steps']['worst']}")
    return 1 if figures["steps"]["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
