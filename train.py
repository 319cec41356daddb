"""Trains PointRend from a configuration, on one GPU, on many, or on the CPU.

    python train.py shapes_r18                              # from scratch, minutes on a CPU
    python train.py camvid_r18 data.root=path/to/camvid     # real photographs
    python train.py cityscapes_r50 data.root=path/to/cityscapes amp=true channels_last=true
    torchrun --nproc_per_node=4 train.py cityscapes_r50 data.root=path/to/cityscapes amp=true
    python train.py my.yaml lr=0.02 model.point_head=null   # any YAML file, any key overridden
    python train.py shapes_r18 resume=auto                  # go on where the run folder stands

The first argument is a YAML file or the name of a bundled configuration (configs/*.yaml); the
others are key=value overrides, whose last name is enough where it is unique. The run folder
(train.run_dir, by default runs/NAME) gets config.yaml, environment.json, metrics.csv, report.md,
TensorBoard events (tensorboard --logdir runs), last.pth and best.pth (highest mIoU).

It is the recipe of the published runs (SGD, poly schedule, warm-up, augmentation), in one loop to
be read top to bottom. train.batch_size counts all GPUs together, so that their number changes the
speed and not the recipe. Ctrl-C or SIGTERM finishes the iteration at hand, writes last.pth and
stops; a second one stops at once (under torchrun, the first one kills after 30 seconds).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing import errors
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from pointrend_triton import precision
from pointrend_triton.checkpoint import load_backbone, missing_backbone_message
from pointrend_triton.config import Config, TrainConfig, load_config, save_config
from pointrend_triton.data import SegmentationDataset, build_dataset, prepare, train_loader
from pointrend_triton.distributed import World, agree, gather, joined, mean, sync_batchnorm
from pointrend_triton.environment import environment
from pointrend_triton.inference import evaluate_dataset, example_picture, peak_memory
from pointrend_triton.models import PointRend, build_model
from pointrend_triton.report import to_json
from pointrend_triton.run import Record, StopRequest, check, is_scored
from pointrend_triton.snapshot import restore, save, seed_iteration, tidy
from pointrend_triton.training_report import write_report
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
        return run_dir, last if last.exists() else None
    checkpoint = Path(resume) if resume else None
    if last.exists() and (checkpoint is None or checkpoint.resolve().parent != run_dir.resolve()):
        raise FileExistsError(
            f"{run_dir} holds a run already: go on with it by resume=auto, start another with "
            "run_dir=..., or remove it"
        )
    return run_dir, checkpoint


# ---------------------------------------------------------------- model, optimiser, schedule


def make_model(
    config: Config,
    dataset: SegmentationDataset,
    resuming: bool,
    say: Any = print,
) -> PointRend:
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
        say(load_backbone(model.backbone, config.model.pretrained))
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
    # one group: weight decay on every parameter, BatchNorm and biases too, as published;
    # fused, because that kind can skip a step without the host knowing
    optimizer = torch.optim.SGD(
        model.parameters(),
        train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        fused=True,
    )
    if train.momentum:
        for parameter in model.parameters():  # a skipped first step would leave them unset
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_numerics(train: TrainConfig) -> None:
    precision.set_tf32(train.tf32)
    torch.backends.cudnn.benchmark = not train.deterministic  # as published; sizes never change
    if train.compile:  # draws the points that it draws without
        torch._inductor.config.fallback_random = True
    torch.use_deterministic_algorithms(train.deterministic)
    if train.deterministic:  # read when cuBLAS starts, which may else sum in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# ---------------------------------------------------------------- one iteration


def backward(loss_of: Any, images: Tensor, labels: Tensor, train: TrainConfig) -> dict[str, Tensor]:
    """Gradients of a batch, in train.accumulate parts -> the means of its losses and accuracies."""
    parts = list(zip(images.chunk(train.accumulate), labels.chunk(train.accumulate), strict=True))
    outs = []
    for number, (part, truth) in enumerate(parts, 1):
        # ranks exchange gradients once, with the last part
        alone = number < len(parts) and hasattr(loss_of, "no_sync")
        with loss_of.no_sync() if alone else contextlib.nullcontext():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=train.amp):
                out = loss_of(part, truth)
            (out["loss"] / len(parts)).backward()
        outs.append(out)
    return {name: torch.stack([out[name].detach() for out in outs]).mean() for name in outs[0]}


def guarded_step(optimizer: Any, model: PointRend) -> Tensor:
    """A step, or none if a gradient is not finite -> 1 if there was none, else 0, on the device."""
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    return optimizer.found_inf


def report_skipped(
    skips: list[Tensor], batches: list[tuple[int, list[str]]], before: int, limit: int
) -> int:
    """The only reading of skips back to the host, once a log line -> their number so far."""
    flags = torch.stack(skips).tolist()
    found = [batch for flag, batch in zip(flags, batches, strict=True) if flag]
    count = before + len(found)
    if found:
        iteration, files = found[0]
        text = (
            f"gradients that are not finite at iteration {iteration} (the batch's files: "
            f"{', '.join(files)}); {count} steps skipped so far"
        )
        if count > limit:
            raise FloatingPointError(f"{text}, more than train.max_skipped {limit}")
        tqdm.write(f"warning: {text}", file=sys.stderr)
    return count


def evaluate(
    model: PointRend,
    dataset: SegmentationDataset,
    config: Config,
    world: World,
    record: Record | None,
    iteration: int,
) -> dict[str, float]:
    scale, amp = config.data.test_scale, config.train.amp
    scores = evaluate_dataset(
        model,
        dataset,
        scale,
        amp=amp,
        limit=config.train.eval_images,
        workers=max(1, config.data.workers),
        world=world,
    ).compute()
    if record is not None:
        for index in range(min(config.train.pictures, len(dataset))):
            picture = example_picture(model, *dataset.load(index), scale, dataset.palette)
            record.picture(f"prediction/{dataset.stem(index)}", picture, iteration)
    return {"miou": scores["miou"], "boundary_iou": scores["mean_boundary_iou"]}


# ---------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 128 and the number of the signal that ended the run early."""
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    set_numerics(config.train)  # before CUDA starts
    with joined(config.train.device) as world:
        return run(config, Path(arguments.config).stem, world)


def run(config: Config, name: str, world: World) -> int:
    train, data, device = config.train, config.data, world.device
    run_dir, checkpoint = choose_run_dir(config, name)
    last = run_dir / "last.pth"

    def say(text: str) -> None:
        if world.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    check(train, device, world.size)
    torch.manual_seed(train.seed)

    train_set = build_dataset(data, data.train_split)
    eval_set = build_dataset(data, data.eval_split)
    model = make_model(config, train_set, checkpoint is not None, say).to(device)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    sync_batchnorm(model, world)
    optimizer = make_optimizer(model, train)
    start, best, skipped = 0, -1.0, 0
    if checkpoint:
        start, best, skipped = restore(checkpoint, model, optimizer, config)
    if not (run_dir / "best.pth").exists():  # it goes on in another folder
        best = -1.0
    if len(set(gather(start))) > 1:
        raise ValueError(f"{run_dir} must be one folder that all machines share, to resume from")
    if world.is_main:
        tidy(run_dir)
    # an evaluation that a kill cut short, or that a stop left out, comes first
    is_due = start > 0 and (start % train.eval_every == 0 or start == train.iterations)
    owed = agree(world.is_main and is_due and not is_scored(run_dir, start))
    if start >= train.iterations and not owed:
        if world.is_main and (run_dir / "metrics.csv").exists():
            write_report(run_dir)
        say(f"{checkpoint} is trained to its last iteration, {start}; nothing is left to do")
        return 0
    # compiled inside the wrapper: its forward would break the graph
    loss_of: Any = torch.compile(model) if train.compile else model
    if world.size > 1:
        loss_of = DistributedDataParallel(
            loss_of,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    record = None
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        config.train.run_dir = str(run_dir)  # so that config.yaml finds its run again
        save_config(config, run_dir / "next.yaml")
        (run_dir / "next.yaml").replace(run_dir / "config.yaml")  # never there by half
        write_atomic(run_dir / "environment.json", to_json(environment(device)))
        record = Record(run_dir, start)
        record.text("config", (run_dir / "config.yaml").read_text(), start)
        record.settings(config)

    def loader(first: int, workers: int) -> Any:
        return train_loader(
            *(train_set, dataclasses.replace(data, workers=workers), train.batch_size, train.seed),
            *(first, train.iterations, device, world.rank, world.size),
        )

    def score(done: int, best: float) -> float:
        """Evaluates -> the highest mIoU so far; the row comes last, it says that all is written."""
        scores = evaluate(model, eval_set, config, world, record, done)
        miou, border = scores["miou"], scores["boundary_iou"]
        say(f"iteration {done}: {miou:.2f} mIoU, {border:.2f} Boundary IoU")
        if record is not None:
            if miou > best:
                save(run_dir, model, optimizer, config, done, miou, skipped, is_best=True)
            record.write(done, scores)
        return max(best, miou)

    parameters = sum(p.numel() for p in model.parameters())
    where = f"{world.size} x {device.type}" if world.size > 1 else str(device)
    say(
        f"{run_dir}: {parameters / 1e6:.1f} M parameters on {where}, {len(train_set)} training "
        f"and {len(eval_set)} evaluation images, iterations {start} to {train.iterations}"
    )

    if train.accumulate > 1:
        crops = train.batch_size // train.accumulate
        say(f"train.accumulate: BatchNorm sees {crops} of the {train.batch_size} crops at a time")
    model.train()
    train_set = prepare(train_set, data, device, quiet=not world.is_main)  # may take minutes
    first_loader = loader(start, data.workers)
    stop = StopRequest()
    hidden = None if world.is_main else True
    bar = tqdm(total=train.iterations, initial=start, unit="it", dynamic_ncols=True, disable=hidden)
    done, stopping = start, False
    since, waited, skips, batches = time.perf_counter(), 0.0, [], []
    # where a signal ended the workers too, the batch that is still due is made here
    feed = stop.until(first_loader, lambda count: loader(start + count, workers=0))
    try:
        if owed:
            best, owed = score(done, best), False
            stopping = agree(bool(stop.name))
        while done < train.iterations and not stopping:
            asked = time.perf_counter()
            images, labels, files = next(feed)
            waited += time.perf_counter() - asked
            if train.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, train)
            seed_iteration(train.seed, done, world.rank)

            optimizer.zero_grad(set_to_none=True)
            out = backward(loss_of, images, labels, train)
            skips.append(guarded_step(optimizer, model))

            done += 1
            batches.append((done, files))
            bar.update()
            stopping = agree(bool(stop.name))
            evaluates = done % train.eval_every == 0 or done == train.iterations
            saves = stopping or evaluates or done % train.checkpoint_every == 0
            if not (saves or done % train.log_every == 0):
                continue

            skipped = report_skipped(skips, batches, skipped, train.max_skipped)
            values = dict(zip(out, mean(torch.stack([*out.values()])).tolist(), strict=True))
            seconds = time.perf_counter() - since
            values["lr"] = learning_rate(done - 1, train)
            values["images_per_second"] = len(skips) * train.batch_size / seconds
            values["data_wait"] = waited / seconds
            values["peak_memory_gb"] = peak_memory(device)[0] * 2**20 / 1e9
            values["skipped"] = skipped
            if record is not None:
                record.write(done, values)
            bar.set_postfix(loss=f"{values['loss']:.3f}", acc=f"{values['acc_coarse']:.1f}%")
            if bar.disable:
                say(f"iteration {done}/{train.iterations}: loss {values['loss']:.3f}")
            if saves and record is not None:  # before the evaluation, which may take long or fail
                save(run_dir, model, optimizer, config, done, best, skipped)
            owed = evaluates and stopping
            if evaluates and not stopping:
                best = score(done, best)
                stopping = agree(bool(stop.name))
            since, waited, skips, batches = time.perf_counter(), 0.0, [], []
        if record is not None:
            write_report(run_dir)
        number = max(gather(stop.number))
        if number and (owed or done < train.iterations):
            name = signal.Signals(number).name
            say(f"{name} after iteration {done}; resume=auto goes on from {last}")
            return 128 + number
        say(f"done: {last}; best.pth has {best:.2f} mIoU")
    finally:
        bar.close()
        stop.release()
        if record is not None:
            with contextlib.suppress(OSError):  # it would hide the error that ended the run
                record.board.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(errors.record(main)())  # so that torchrun can say whose error came first
    except KeyboardInterrupt:
        sys.exit("interrupted: resume=auto goes on from the last checkpoint, if there is one")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: {error}\nbatch_size and crop_size decide what is needed; amp=true and "
            "data.resident=false need less"
        )
    except (ValueError, OSError, FloatingPointError) as error:
        text = str(error).strip()
        # of an error in a loader's process, PyTorch puts the traceback before its text
        sys.exit(f"error: {text.splitlines()[-1] if 'Original Traceback' in text else text}")
