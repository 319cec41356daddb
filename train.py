"""Trains PointRend from a configuration, on one GPU or on the CPU.

    python train.py shapes_r18                              # from scratch, minutes on a CPU
    python train.py camvid_r18 data.root=path/to/camvid     # real photographs
    python train.py cityscapes_r50 data.root=path/to/cityscapes amp=true channels_last=true
    python train.py my.yaml lr=0.02 model.point_head=null   # any YAML file, any key overridden
    python train.py shapes_r18 resume=auto                  # go on where the run folder stands

The first argument is a YAML file or the name of a bundled configuration (configs/*.yaml); the
others are key=value overrides, whose last name is enough where it is unique. The run folder
(train.run_dir, by default runs/NAME) gets config.yaml, environment.json, metrics.csv,
TensorBoard events (tensorboard --logdir runs), last.pth and best.pth (highest mIoU).

It is the recipe of the published runs (SGD, poly schedule, warm-up, augmentation), in one loop to
be read top to bottom. Ctrl-C or SIGTERM finishes the iteration at hand, writes last.pth and stops;
a second one stops at once.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pointrend_triton.checkpoint import (
    FORMAT,
    VERSION,
    CheckpointError,
    load_backbone,
    load_checkpoint,
    missing_backbone_message,
    read_checkpoint,
    save_checkpoint,
)
from pointrend_triton.config import Config, TrainConfig, load_config, save_config, to_dict
from pointrend_triton.data import SegmentationDataset, build_dataset, train_loader
from pointrend_triton.environment import environment
from pointrend_triton.inference import (
    evaluate_dataset,
    example_picture,
    peak_memory,
    pick_device,
)
from pointrend_triton.models import PointRend, build_model
from pointrend_triton.report import to_json
from pointrend_triton.run import Record, StopRequest
from pointrend_triton.visualize import write_atomic

# ---------------------------------------------------------------- configuration and run folder


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file, or name of a bundled configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.lr=0.02")
    return parser.parse_args(argv)


def choose_run_dir(config: Config, name: str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to resume from; another run's folder is refused."""
    run_dir = Path(config.train.run_dir or Path("runs") / name)
    last, resume = run_dir / "last.pth", config.train.resume
    if resume == "auto":
        if not last.exists():
            print(f"no checkpoint in {run_dir}: starting from iteration 0")
        return run_dir, last if last.exists() else None
    checkpoint = Path(resume) if resume else None
    if last.exists() and (checkpoint is None or checkpoint.resolve().parent != run_dir.resolve()):
        raise FileExistsError(
            f"{run_dir} holds a run already: go on with it by resume=auto, start another with "
            "run_dir=..., or remove it"
        )
    return run_dir, checkpoint


# ---------------------------------------------------------------- model, optimiser, schedule


def make_model(config: Config, dataset: SegmentationDataset, resuming: bool) -> PointRend:
    wanted, present = max(config.model.num_classes, 2), len(dataset.classes)
    if wanted != present:
        raise ValueError(
            f"model.num_classes is {config.model.num_classes}, but the data set has {present} "
            "classes (one logit, num_classes: 1, goes with two classes)"
        )
    model = build_model(config)
    model.classes = tuple(dataset.classes)
    model.palette = dataset.palette.tolist()
    if config.model.pretrained is not None and not resuming:
        if not Path(config.model.pretrained).is_file():
            raise FileNotFoundError(
                missing_backbone_message(config.model.pretrained, config.model.depth)
            )
        print(load_backbone(model.backbone, config.model.pretrained))
    return model


def learning_rate(iteration: int, train: TrainConfig) -> float:
    """The poly schedule of mmcv 1.x with linear warm-up, `iteration` from 0.

    Poly runs from iteration 0, under the warm-up, down to min_lr; the warm-up multiplies it.
    """
    remaining = (1 - iteration / train.iterations) ** train.power
    lr = (train.lr - train.min_lr) * remaining + train.min_lr
    if iteration < train.warmup_iterations:
        lr *= 1 - (1 - train.warmup_ratio) * (1 - iteration / train.warmup_iterations)
    return lr


def make_optimizer(model: PointRend, train: TrainConfig) -> torch.optim.Optimizer:
    # one group: weight decay on every parameter, BatchNorm and biases too, as published
    return torch.optim.SGD(
        model.parameters(), train.lr, momentum=train.momentum, weight_decay=train.weight_decay
    )


# ---------------------------------------------------------------- checkpoints


def save(
    path: Path,
    model: PointRend,
    optimizer: torch.optim.Optimizer,
    config: Config,
    iteration: int,
    best: float,
) -> None:
    """Everything that the rest of the run depends on, after `iteration` iterations."""
    device = next(model.parameters()).device
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    meta = {
        "model": to_dict(config.model),
        "classes": list(model.classes or ()),
        "palette": model.palette,
        "iteration": iteration,
        "best": best,
        "config": to_dict(config),
    }
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "meta": meta,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng,
    }
    save_checkpoint(path, payload)


# what may change between the parts of one run
FREE = {
    *("log_every", "eval_every", "eval_images", "checkpoint_every", "pictures"),
    *("resume", "run_dir", "device", "root", "workers", "pretrained"),
}


def restore(
    path: Path, model: PointRend, optimizer: torch.optim.Optimizer, config: Config
) -> tuple[int, float]:
    """Puts a run back where `save` left it -> iterations done, best mIoU; refuses another run's."""
    saved = read_checkpoint(path)
    try:
        rng, meta = saved["rng"], saved["meta"]
        iteration, best = int(meta["iteration"]), float(meta["best"])
        changed = [
            f"{section}.{key}: {then[key]} then, {value} now"
            for section, then in ((s, meta["config"][s]) for s in ("model", "data", "train"))
            for key, value in to_dict(getattr(config, section)).items()
            if key not in FREE and then[key] != value
        ]
        momentum = saved["optimizer"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a training checkpoint of this project, to be resumed: {error!r}"
        ) from None
    if changed:
        raise CheckpointError(
            f"{path} was trained with another configuration ({'; '.join(changed)}); "
            "start another run with run_dir=..., or remove this one"
        )
    load_checkpoint(model, path, saved)
    optimizer.load_state_dict(momentum)
    torch.set_rng_state(rng["cpu"])
    device = next(model.parameters()).device
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)
    return iteration, best


# ---------------------------------------------------------------- checks and evaluation


def check_finite(losses: list[Tensor], batches: list[tuple[int, list[str]]]) -> None:
    """The only reading of losses back to the host: once a log line, not once an iteration."""
    for value, (iteration, files) in zip(torch.stack(losses).tolist(), batches, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at iteration {iteration}; the batch's files: "
                f"{', '.join(files)}"
            )


def evaluate(
    model: PointRend, dataset: SegmentationDataset, config: Config, record: Record, iteration: int
) -> dict[str, float]:
    scale, amp = config.data.test_scale, config.train.amp
    scores = evaluate_dataset(
        model,
        dataset,
        scale,
        amp=amp,
        limit=config.train.eval_images,
        workers=max(1, config.data.workers),
    ).compute()
    for index in range(min(config.train.pictures, len(dataset))):
        picture = example_picture(model, *dataset.load(index), scale, dataset.palette)
        record.board.add_image(
            f"prediction/{dataset.stem(index)}", picture, iteration, dataformats="HWC"
        )
    return {"miou": scores["miou"], "boundary_iou": scores["mean_boundary_iou"]}


# ---------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 128 and the number of the signal that ended the run early."""
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    train, data = config.train, config.data
    run_dir, checkpoint = choose_run_dir(config, Path(arguments.config).stem)
    device = pick_device(train.device)
    torch.manual_seed(train.seed)

    train_set = build_dataset(data, data.train_split)
    eval_set = build_dataset(data, data.eval_split)
    model = make_model(config, train_set, resuming=checkpoint is not None).to(device)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, train)
    start, best = restore(checkpoint, model, optimizer, config) if checkpoint else (0, -1.0)
    if start >= train.iterations:
        print(f"{checkpoint} is trained to its last iteration, {start}; nothing is left to do")
        return 0
    loss_of = torch.compile(model) if train.compile else model

    torch.backends.cudnn.benchmark = True  # as published; image sizes never change
    run_dir.mkdir(parents=True, exist_ok=True)
    config.train.run_dir = str(run_dir)  # so that config.yaml finds its run again
    save_config(config, run_dir / "config.yaml")
    write_atomic(run_dir / "environment.json", to_json(environment(device)))
    record = Record(run_dir, start)
    loader = train_loader(
        train_set,
        data,
        train.batch_size,
        train.seed,
        start,
        train.iterations,
        pin_memory=device.type == "cuda",
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{run_dir}: {parameters / 1e6:.1f} M parameters on {device}, {len(train_set)} training "
        f"and {len(eval_set)} evaluation images, iterations {start} to {train.iterations}"
    )

    last = run_dir / "last.pth"
    model.train()
    stop = StopRequest()
    bar = tqdm(total=train.iterations, initial=start, unit="it", dynamic_ncols=True, disable=None)
    done, saves = start, False
    since, losses, batches = time.perf_counter(), [], []
    try:
        for iteration, (images, labels, files) in enumerate(stop.until(loader), start):
            done = iteration + 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration, train)
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            if train.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)

            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=train.amp):
                out = loss_of(images, labels)
            out["loss"].backward()
            optimizer.step()

            losses.append(out["loss"].detach())
            batches.append((done, files))
            bar.update()
            stopping = bool(stop.name)
            evaluates = done % train.eval_every == 0 or done == train.iterations
            saves = stopping or evaluates or done % train.checkpoint_every == 0
            if not (saves or done % train.log_every == 0):
                continue

            check_finite(losses, batches)
            values = {name: value.item() for name, value in out.items()}
            values["lr"] = learning_rate(iteration, train)
            values["images_per_second"] = len(losses) * len(images) / (time.perf_counter() - since)
            values["peak_memory_gb"] = peak_memory(device)[0] * 2**20 / 1e9
            record.write(done, values)
            bar.set_postfix(loss=f"{values['loss']:.3f}", acc=f"{values['acc_coarse']:.1f}%")
            if bar.disable:
                print(f"iteration {done}/{train.iterations}: loss {values['loss']:.3f}", flush=True)
            if saves:  # before the evaluation, which may take long or fail
                save(last, model, optimizer, config, done, best)
            if evaluates and not stopping:
                scores = evaluate(model, eval_set, config, record, done)
                record.write(done, scores)
                line = "{miou:.2f} mIoU, {boundary_iou:.2f} Boundary IoU".format(**scores)
                bar.write(f"iteration {done}: {line}")
                if scores["miou"] > best:
                    best = scores["miou"]
                    for path in (run_dir / "best.pth", last):
                        save(path, model, optimizer, config, done, best)
            if stop.name and saves:
                break
            since, losses, batches = time.perf_counter(), [], []
        if done < train.iterations and not saves:  # the loader ended early
            save(last, model, optimizer, config, done, best)
        if stop.name:
            bar.write(f"{stop.name} after iteration {done}; resume=auto goes on from {last}")
            return 128 + stop.number
        bar.write(f"done: {last}; best.pth has {best:.2f} mIoU")
    finally:
        bar.close()
        record.board.close()
        stop.release()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: resume=auto goes on from the last checkpoint, if there is one")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: {error}\nbatch_size and crop_size decide what is needed; amp=true needs less"
        )
    except (ValueError, OSError, FloatingPointError) as error:
        text = str(error).strip()
        # of an error in a loader's process, PyTorch puts the traceback before its text
        sys.exit(f"error: {text.splitlines()[-1] if 'Original Traceback' in text else text}")
