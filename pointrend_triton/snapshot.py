"""The checkpoints of a training run: written so that the last good one survives, and resumed from.

A run is a function of its configuration, the iteration and the state here: batches and point draws
are drawn anew for every iteration from the seed (`pointrend_triton.data`, `seed_iteration`), so the
iteration is all that is kept of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointrend_triton.checkpoint import (
    FORMAT,
    VERSION,
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from pointrend_triton.config import Config, to_dict
from pointrend_triton.models import PointRend

# what may change between the parts of one run
FREE = {
    *("log_every", "eval_every", "eval_images", "checkpoint_every", "keep_checkpoints", "pictures"),
    *("resume", "run_dir", "device", "root", "cache", "resident"),
    *("workers", "pretrained", "max_skipped"),
}
# files under the names that they have until they are whole; numbers are those of processes
_DRAFTS = re.compile(
    r"next\.(pth|yaml)|metrics\.csv\.partial|\.(next|best|last(-\d+)?)\.pth\.\d+\.tmp"
    r"|\.(environment\.json|curves\.png|report\.md)\.\d+"
)


def drafts(run_dir: Path) -> list[Path]:
    """What is being written in a run folder, or was when the run was killed."""
    return [path for path in run_dir.glob("*") if _DRAFTS.fullmatch(path.name)]


def tidy(run_dir: Path) -> None:
    """Removes what a killed run has left half-written."""
    for path in drafts(run_dir):
        path.unlink()


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seeds PyTorch's generators for the draws of one iteration on one rank."""
    state = np.random.SeedSequence([seed, 2, iteration, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def save(
    run_dir: Path,
    model: PointRend,
    optimizer: torch.optim.Optimizer,
    config: Config,
    iteration: int,
    best: float,
    skipped: int = 0,
    *,
    is_best: bool = False,
) -> None:
    """Writes last.pth (and best.pth) with all that the rest of the run depends on.

    Args:
        iteration: how many are done.
        best: the highest mIoU so far.
        skipped: how many steps were skipped so far.
        is_best: whether this is the one of the highest mIoU.

    The last.pth before becomes last-1.pth, and so on, train.keep_checkpoints in all (but not for
    the best: it is saved again with its score); at every moment there is a whole one. Weights or
    statistics that are not finite never take the place of good ones: FloatingPointError. Where the
    file cannot be written: CheckpointError, and last.pth stays.
    """
    state = model.state_dict()
    broken = not_finite(state)
    if broken:
        raise FloatingPointError(
            f"{broken} is not finite after iteration {iteration}; nothing was written, "
            f"{run_dir / 'last.pth'} is as it was"
        )
    meta = {
        "model": to_dict(config.model),
        "classes": list(model.classes or ()),
        "palette": model.palette,
        "iteration": iteration,
        "best": best,
        "skipped": skipped,
        "config": to_dict(config),
    }
    payload = {
        "format": FORMAT,
        "version": VERSION,
        "meta": meta,
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
    }
    last, fresh = run_dir / "last.pth", run_dir / "next.pth"
    try:
        save_checkpoint(fresh, payload)
    except CheckpointError as error:  # such as a full disk
        state_of = "is as it was" if last.exists() else "was not written yet"
        raise CheckpointError(f"{error}; {last} {state_of}") from error
    kept = 1 if is_best else config.train.keep_checkpoints
    for age in range(kept - 1, 0, -1):
        older = run_dir / f"last-{age}.pth"
        newer = run_dir / (f"last-{age - 1}.pth" if age > 1 else "last.pth")
        if newer.exists():
            _link(newer, older)
    if is_best:
        _link(fresh, run_dir / "best.pth")
    fresh.replace(last)


def restore(
    path: Path, model: PointRend, optimizer: torch.optim.Optimizer, config: Config
) -> tuple[int, float, int]:
    """Puts a run back where `save` left it -> iterations done, best mIoU, steps skipped.

    Raises CheckpointError for a file that is damaged or is another run's.
    """
    try:
        saved = read_checkpoint(path)
    except CheckpointError as error:
        before = path.with_name("last-1.pth")
        if path.name != "last.pth" or not before.exists():
            raise
        raise CheckpointError(
            f"{error}; {before} is the checkpoint before it: resume={before} goes on from there"
        ) from None
    try:
        meta, momentum = saved["meta"], saved["optimizer"]
        iteration, best = int(meta["iteration"]), float(meta["best"])
        skipped = int(meta.get("skipped", 0))
        changed = [
            f"{section}.{key}: {_then(then, key)} then, {value} now"
            for section, then in ((s, meta["config"][s]) for s in ("model", "data", "train"))
            for key, value in to_dict(getattr(config, section)).items()
            if key not in FREE and _then(then, key) != value
        ]
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
    return iteration, best, skipped


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or infinity, None if there is none."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    # a sum is finite only if all are: cheaper than a mask of every tensor
    sums = torch.stack([tensor.double().sum() for tensor in floats.values()])
    if bool(sums.isfinite().all()):
        return None
    return next(
        name for name, finite in zip(floats, sums.isfinite().tolist(), strict=True) if not finite
    )


def _then(section: dict[str, Any], key: str) -> Any:
    """A value of the saved configuration; of a key that is younger than the file, nothing."""
    return section.get(key, "unset")


def _link(source: Path, target: Path) -> None:
    """`target` becomes `source`'s content in one step, without copying it where links exist."""
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    draft.unlink(missing_ok=True)
    try:
        os.link(source, draft)
    except OSError:  # a file system without links
        draft.write_bytes(source.read_bytes())
    draft.replace(target)
