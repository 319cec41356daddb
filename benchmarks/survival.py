"""Kills training runs at random moments, resumes them, and compares with a run left alone.

    python -m benchmarks.survival --kills 50 --json benchmarks/results/survival.json

Every start is train.py's `main` in a process of its own, with a loader process beside it; a kill is
SIGKILL to both. Kills take turns: at any moment, in the midst of writing a checkpoint, and during
an evaluation. A run that is killed is resumed, over and over, until it ends; then its last.pth,
best.pth and metrics.csv must be those of the run left alone, bit for bit, but for clocks, and no
file may be left over. The network is tiny, so that a run takes seconds and writes all the time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

import train
from benchmarks import record
from pointrend_triton.checkpoint import read_checkpoint
from pointrend_triton.report import to_json
from pointrend_triton.run import is_scored, whole_rows
from pointrend_triton.snapshot import drafts
from pointrend_triton.visualize import write_atomic

ITERATIONS, EVAL_EVERY = 48, 6
TINY = {
    "model": {
        **{"depth": 18, "num_classes": 8},
        **{"base_channels": 8, "fpn_channels": 8, "head_channels": 8},
        "point_head": {"channels": 8, "num_points": 32, "subdivision_num_points": 64},
    },
    "data": {
        **{"dataset": "shapes", "shapes_size": [64, 64], "crop_size": [64, 64], "scale": [64, 64]},
        **{"test_scale": None, "shapes_train_images": 10, "shapes_eval_images": 4, "workers": 1},
    },
    "train": {
        **{"iterations": ITERATIONS, "batch_size": 2, "warmup_iterations": 2, "log_every": 1},
        **{"eval_every": EVAL_EVERY, "checkpoint_every": 2, "pictures": 1, "device": "cpu"},
    },
}
# what may differ between two runs of the same trajectory
CLOCKS = {"images_per_second", "data_wait", "peak_memory_gb"}
AIMS = ("any moment", "write", "evaluation")
PATIENCE = 300  # seconds, for a process that ought to end

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train"])


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        aim: what it waited for.
        found: what the folder shows that it hit: "start", "training", "write", "evaluation", "end".
        iteration: of last.pth then; 0 if there was none.
        seconds: since the process was started.
    """

    aim: str
    found: str
    iteration: int
    seconds: float


class Runs:
    """Runs of one configuration in one folder, each started anew until it has ended by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(TINY))

    def start(self, run_dir: Path) -> Any:
        arguments = [str(self.config), f"run_dir={run_dir}", "resume=auto"]
        process = _context.Process(target=_train, args=(arguments, self.folder / "log.txt"))
        process.start()
        return process

    def finish(self, process: Any) -> None:
        """Waits for the process. Raises RuntimeError, with its last words, if it fails."""
        process.join(PATIENCE)
        if process.exitcode != 0:
            words = (self.folder / "log.txt").read_text()[-2000:]
            raise RuntimeError(f"a run ended with status {process.exitcode}:\n{words}")

    def kill(self, run_dir: Path, aim: str, delay: float) -> Kill | None:
        """Starts or resumes a run and kills it after `delay` seconds, once at what is aimed at.

        None if it ended before.
        """
        started = time.time()
        process = self.start(run_dir)
        process.join(delay)
        hit: dict[str, Callable[[Path], bool]] = {"write": is_writing, "evaluation": is_evaluating}
        while process.is_alive() and aim in hit and not hit[aim](run_dir):
            time.sleep(0.0005)
        if not (process.is_alive() and _kill_group(process.pid)):
            self.finish(process)
            return None
        process.join(PATIENCE)
        last = run_dir / "last.pth"
        iteration = read_checkpoint(last)["meta"]["iteration"] if last.exists() else 0
        return Kill(aim, what_it_did(run_dir, started), iteration, time.time() - started)


def survive(folder: Path, kills: int, seed: int = 0) -> tuple[list[Kill], int, list[str]]:
    """Kills runs in `folder` -> the kills, the number of runs, and how they differ: no line if not.

    Raises RuntimeError where a run cannot be resumed.
    """
    runs, rng = Runs(folder), random.Random(seed)
    alone, run_dir = folder / "alone", folder / "run-0"
    start = time.monotonic()
    runs.finish(runs.start(alone))
    # several kills a run
    reach = (time.monotonic() - start) / 2
    done: list[Kill] = []
    differences: list[str] = []
    count = 1
    with tqdm(total=kills, unit="kill", dynamic_ncols=True, disable=None) as bar:
        while len(done) < kills:
            kill = runs.kill(run_dir, AIMS[len(done) % len(AIMS)], rng.uniform(0, reach))
            if kill:
                done.append(kill)
                bar.update()
                continue
            differences += compare(alone, run_dir)
            run_dir, count = folder / f"run-{count}", count + 1
    runs.finish(runs.start(run_dir))
    return done, count, differences + compare(alone, run_dir)


def is_writing(run_dir: Path) -> bool:
    return any(".pth" in path.name for path in drafts(run_dir))


def is_evaluating(run_dir: Path) -> bool:
    """Whether the last row waits for its scores, and the checkpoint before them is written."""
    rows, last = whole_rows(run_dir / "metrics.csv"), run_dir / "last.pth"
    if not rows or rows[-1]["miou"] or int(rows[-1]["iteration"]) % EVAL_EVERY:
        return False
    row_time = (run_dir / "metrics.csv").stat().st_mtime_ns
    return last.exists() and last.stat().st_mtime_ns > row_time and not is_writing(run_dir)


def what_it_did(run_dir: Path, started: float) -> str:
    """What a run that was started then was about when it was killed, from what it has left."""
    about = run_dir / "environment.json"
    if not about.exists() or about.stat().st_mtime < started:
        return "start"
    if is_writing(run_dir):
        return "write"
    if is_scored(run_dir, ITERATIONS):
        return "end"
    return "evaluation" if is_evaluating(run_dir) else "training"


def compare(alone: Path, run_dir: Path) -> list[str]:
    """How a run differs from another of the same configuration, a line for each difference."""
    name = run_dir.name
    files = [{p.name for p in d.iterdir() if "tfevents" not in p.name} for d in (alone, run_dir)]
    lines = [f"{name} has {file}, or lacks it" for file in sorted(files[0] ^ files[1])]
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in whole_rows(d / "metrics.csv")]
        for d in (alone, run_dir)
    ]
    lines += [f"{name}/metrics.csv{where}" for where in unequal(*rows)]
    for file in ("last.pth", "best.pth"):
        contents = [read_checkpoint(d / file) for d in (alone, run_dir)]
        for content in contents:
            for key in ("run_dir", "resume"):
                content["meta"]["config"]["train"].pop(key)
        lines += [f"{name}/{file}{where}" for where in unequal(*contents)]
    return lines


def unequal(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two nested containers differ, tensors by their bits."""
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        for key in a:
            yield from unequal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for number, pair in enumerate(zip(a, b, strict=True)):
            yield from unequal(*pair, f"{where}[{number}]")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if not torch.equal(a, b):
            yield f"{where} differs"
    elif a != b:
        yield f"{where} is {str(a)[:80]} alone, {str(b)[:80]} here"


def _train(arguments: list[str], log: Path) -> None:
    """The process that is killed; its loader joins its process group."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.exit(train.main(arguments))


def _kill_group(leader: int) -> bool:
    """Whether there was still something to kill."""
    try:
        while os.getpgid(leader) != leader:  # it is about to
            time.sleep(0.001)
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, 1 where a run differs."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="the result file")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.survival", *argv])
    header = record.header(torch.device("cpu"), command)
    # what is killed gives nothing back, and Python would say so at the end
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    with tempfile.TemporaryDirectory() as folder:
        kills, count, differences = survive(Path(folder), args.kills, args.seed)
    found = Counter(kill.found for kill in kills)
    result = {"kills": len(kills), "runs": count, "hit": found, "differences": differences}
    if args.json:
        write_atomic(args.json, to_json({**header, **result, "config": TINY, "each": kills}))
    hits = ", ".join(f"{number} in {name}" for name, number in found.most_common())
    print(f"{len(kills)} kills ({hits}) of {count} runs: {len(differences)} differences")
    print("\n".join(differences))
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
