"""Evaluate a checkpoint: how good its class maps are, above all at borders, and how fast it is.

    python evaluate.py cityscapes_r50 FILE.pth data.root=data/cityscapes
    python evaluate.py cityscapes_r50 FILE.pth data.root=data/cityscapes --ms-flip --json cs.json
    python evaluate.py ade20k_r50 FILE.pth data.root=data/ade/ADEChallengeData2016 --both
    python evaluate.py shapes_r18 runs/demo/last.pth --both --pictures runs/demo/pictures
    python evaluate.py shapes_r18 runs/demo/last.pth --both --report runs/demo/report
    python evaluate.py runs/mine/config.yaml runs/mine/last.pth --limit 200 --speed
    torchrun --nproc_per_node=4 evaluate.py cityscapes_r50 FILE.pth --ms-flip    # the same scores

CONFIG says which data and which protocol; the network is what CHECKPOINT holds, except that the
steps and points of the subdivision are CONFIG's: they leave no trace in tensors. mmsegmentation's
published checkpoints load as they are. float32 is without TF32, as published; --amp is faster.

Scores are percentages over the whole split, images at their own size:
  IoU, Acc     per class; mIoU and mAcc their means, aAcc over all pixels (as mmsegmentation)
  Boundary IoU per class, of the pixels within 2 % of the image diagonal of its border (Cheng et
               al. 2021), and the mean
  band mIoU    over pixels within 1, 3 or 5 pixels of a change of class in the truth
The last two leave out pixels within those 2 % of an ignored pixel.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import shlex
import sys
import tempfile
from collections import ChainMap
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from pointrend_triton import precision
from pointrend_triton.arguments import UsageError, positive
from pointrend_triton.checkpoint import CheckpointError, from_checkpoint, read_checkpoint
from pointrend_triton.config import Config, ConfigError, load_config
from pointrend_triton.data import DataError, SegmentationDataset, build_dataset
from pointrend_triton.distributed import World, gather, joined
from pointrend_triton.environment import environment
from pointrend_triton.html_report import collect, write_report
from pointrend_triton.inference import (
    WARMUP_IMAGES,
    Speed,
    evaluate_dataset,
    example_picture,
    measure_speed,
)
from pointrend_triton.metrics import SegmentationMetrics
from pointrend_triton.models.pointrend import PointRend
from pointrend_triton.report import result, tables, to_json
from pointrend_triton.visualize import colorize, save_png, write_atomic


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    args.command = shlex.join(["python", "evaluate.py", *argv])
    try:
        with contextlib.ExitStack() as stack:
            try:
                world = stack.enter_context(joined(args.device))
            except ValueError as error:
                raise UsageError(f"--device {error}") from None
            # float32 as published: on a V100, which has no TF32
            stack.enter_context(precision.tf32(False))
            evaluate(args, world)
    except (UsageError, ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; no scores were written", file=sys.stderr)
        return 130
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a YAML file or the name of a bundled configuration")
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a file of train.py or mmsegmentation")
    add("overrides", metavar="key=value", nargs="*", help="changes to CONFIG: data.root=/data/ade")
    add("--split", help="which split; data.eval_split of CONFIG by default")
    method = parser.add_mutually_exclusive_group()
    method.add_argument("--coarse", action="store_true", help="evaluate without the refinement")
    method.add_argument(
        "--both", action="store_true", help="evaluate without and with it, and compare"
    )
    add("--ms-flip", action="store_true", help="six scales, each also mirrored: twelve passes")
    add("--limit", metavar="N", type=positive, help="only the first N images")
    add("--only", metavar="GLOB", help="only images whose stem matches, such as 'frankfurt_*'")
    add(
        "--save",
        metavar="DIR",
        type=Path,
        help="write color/ and, for test servers, submission/; needs no labels",
    )
    add("--pictures", metavar="DIR", type=Path, help="write pictures: truth, points, errors")
    add("--picture-count", metavar="N", type=positive, default=8, help="how many (default: 8)")
    add(
        "--report",
        metavar="DIR",
        type=Path,
        help="write DIR/index.html: scores, confusions, the best and worst images; one page of 1 "
        "to 10 MB that needs no other file and no network",
    )
    add("--speed", action="store_true", help="also time 195 images (or N), single scale, after 5")
    add("--json", metavar="FILE", type=Path, help="write everything that was measured")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--amp", action="store_true", help="run the network in bfloat16 where autocast allows it")
    return parser.parse_intermixed_args(argv)


def evaluate(args: argparse.Namespace, world: World) -> None:
    if args.json and args.json.is_dir():
        raise UsageError(f"--json {args.json} is a folder; it must name a file")
    if args.report and args.report.exists() and not args.report.is_dir():
        raise UsageError(f"--report {args.report} is a file; it must name a folder")
    config = load_config(args.config, args.overrides)
    split = args.split or config.data.eval_split
    scale = config.data.test_scale
    # pictures need no truth
    predicts_only = args.save is not None or args.pictures is not None
    dataset = build_dataset(config.data, split, labels_optional=predicts_only)
    if args.report and not dataset.has_labels:
        raise UsageError(f"--report needs labels; {config.data.dataset} {split} has none")
    chosen = choose_images(dataset, args.only, args.limit)
    model = load_model(args.checkpoint, config, dataset, args.both).to(world.device)

    only = "coarse" if args.coarse or model.point_head is None else "refined"
    methods = ["coarse", "refined"] if args.both else [only]
    run = functools.partial(
        evaluate_dataset,
        model,
        dataset,
        scale,
        multi_scale=args.ms_flip,
        amp=args.amp,
        workers=config.data.workers,
    )
    metrics: dict[str, SegmentationMetrics] = {}
    speeds: dict[str, Speed] = {}
    image_scores: dict[str, dict[int, float]] = {}
    for folder in (args.report, args.json and args.json.parent):
        if folder:
            check_writable(folder)
    for method in methods:
        folder = args.save / method if args.save and args.both else args.save
        own: dict[int, float] = {}
        metrics[method] = run(
            coarse=method == "coarse",
            indices=chosen,
            on_prediction=saver(dataset, folder) if folder else None,
            on_score=functools.partial(keep_miou, own) if args.report else None,
            world=world,
        )
        image_scores[method] = dict(ChainMap(*gather(own)))
        if args.speed and world.is_main:
            images = min(200, WARMUP_IMAGES + (args.limit or 200))
            speeds[method] = measure_speed(
                model, dataset, scale, images=images, coarse=method == "coarse", amp=args.amp
            )
    if not world.is_main:
        return
    scores = {method: counted.compute() for method, counted in metrics.items()}
    passes = "six scales and flip" if args.ms_flip else "single scale"
    print(f"{len(chosen)} images of {config.data.dataset} {split}, {passes}\n")
    if dataset.has_labels:
        print(tables(dataset.classes, scores, speeds))
    else:
        print("The split has no labels: there are predictions, and no scores.")
    if args.pictures:
        every = max(1, len(chosen) // args.picture_count)
        for index in chosen[::every][: args.picture_count]:
            picture = example_picture(model, *dataset.load(index), scale, dataset.palette)
            save_png(args.pictures / f"{dataset.stem(index)}.png", picture)
    if not (args.json or args.report):
        return
    record = facts(args, config, split, len(dataset), model, world.device)
    record["results"] = {
        method: result(dataset.classes, metrics[method], speeds.get(method)) for method in methods
    }
    if args.json:
        write_atomic(args.json, to_json(record))
    if args.report:
        examples = collect(model, dataset, scale, image_scores, functools.partial(predict, run))
        confusions = {method: counted.confusion for method, counted in metrics.items()}
        path = write_report(args.report, record, confusions, examples, dataset.palette)
        print(f"\n{path}")


def load_model(path: Path, config: Config, dataset: SegmentationDataset, both: bool) -> PointRend:
    """The checkpoint's model, checked against the data, subdividing as the configuration says."""
    model = from_checkpoint(path)
    predicted, needed = model.config.num_classes, len(dataset.classes)
    # one logit tells two classes apart
    if max(predicted, 2) != needed:
        raise UsageError(
            f"{path} predicts {predicted} classes, the data set {config.data.dataset} has {needed}"
        )
    if model.classes and tuple(name.strip() for name in model.classes) != tuple(dataset.classes):
        print(f"note: {path} names its classes otherwise than the data set", file=sys.stderr)
    if model.point_head is None and both:
        raise UsageError(f"{path} has no point head, so --both has nothing to compare")
    if model.point_head is not None and config.model.point_head is not None:
        for name in ("subdivision_steps", "subdivision_num_points"):
            own, wanted = (
                getattr(c, name) for c in (model.point_head.config, config.model.point_head)
            )
            if own != wanted:
                print(
                    f"note: {name} is {wanted}, as configured; {path} says {own}", file=sys.stderr
                )
            setattr(model.point_head.config, name, wanted)
    return model


def choose_images(dataset: SegmentationDataset, glob: str | None, limit: int | None) -> list[int]:
    chosen = [i for i in range(len(dataset)) if glob is None or fnmatch(dataset.stem(i), glob)]
    if not chosen:
        example = f"; the first is {dataset.stem(0)}" if len(dataset) else ""
        raise UsageError(f"--only {glob!r} matches none of {len(dataset)} images{example}")
    return chosen[:limit]


def keep_miou(scores: dict[int, float], index: int, counted: SegmentationMetrics) -> None:
    """Of one image, in percent; NaN where every pixel is ignored."""
    scores[index] = counted.compute()["miou"]


def check_writable(folder: Path) -> None:
    """OSError if no file can be made in the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def predict(run: Callable[..., Any], index: int, method: str) -> Any:
    """The labels [H,W] of one image, as `run` evaluates it."""
    kept: dict[int, Any] = {}
    coarse = method == "coarse"
    run(coarse=coarse, indices=[index], progress=False, on_prediction=kept.__setitem__)
    return kept[index]


def saver(dataset: SegmentationDataset, folder: Path) -> Any:
    def save(index: int, prediction: Any) -> None:
        name = f"{dataset.stem(index)}.png"
        save_png(folder / "color" / name, colorize(prediction, dataset.palette))
        save_png(folder / "submission" / name, dataset.encode(prediction))

    return save


def facts(
    args: argparse.Namespace,
    config: Config,
    split: str,
    available: int,
    model: PointRend,
    device: torch.device,
) -> dict[str, Any]:
    """What a reader of the numbers needs to know about how they came to be."""
    with args.checkpoint.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    meta = read_checkpoint(args.checkpoint).get("meta")
    iteration = meta.get("iteration", meta.get("iter")) if isinstance(meta, dict) else None
    return {
        **environment(device),
        "command": args.command,
        "config": str(args.config),
        "overrides": args.overrides,
        "checkpoint": {
            "file": args.checkpoint.name,
            "sha256": sha256,
            "iteration": iteration if isinstance(iteration, int) else None,
        },
        "data": {"dataset": config.data.dataset, "split": split, "images": available},
        "protocol": {
            "scale": config.data.test_scale,
            "multi_scale_flip": args.ms_flip,
            "amp": args.amp,
            "limit": args.limit,
            "only": args.only,
        },
        "model": model.config,
    }


if __name__ == "__main__":
    sys.exit(main())
