"""Faults put into the kernels, one at a time: does a test turn red, and say its name?

    python -m benchmarks.mutants                                # all of benchmarks.faults
    python -m benchmarks.mutants --only select. --jobs 2 --out OUT.json

Each fault is one line of a copy of the code; Triton's interpreter runs the tests of its kernel on
the CPU until the first fails. It must do so by name within a minute, the start of Python and the
imports included. The status is 1 where one does not.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.faults import FAULTS, Fault
from pointrend_triton.report import to_json
from pointrend_triton.visualize import write_atomic

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60.0  # seconds of one fault
TEST_LIMIT = 20.0  # of one test: what hangs is named before the whole is cut off
NEEDED = ("pointrend_triton", "configs", "tests", "benchmarks", "pyproject.toml")
# first failing test: its name, without the parameters in brackets too, and why
RED = re.compile(r"^(?:FAILED|ERROR) (\S+::\w+(?:\[.*?\])?)(?: - (.*))?$", re.MULTILINE)


@dataclass
class Row:
    """One fault; `test` is the first that failed, `problem` why that is not enough."""

    kernel: str
    kind: str
    function: str
    old: str
    new: str
    why: str
    tests: str
    test: str | None = None
    said: str | None = None
    seconds: float = 0.0
    problem: str | None = None


def run(fault: Fault) -> Row:
    """Runs the tests of a fault's kernel on a copy of the code that has it."""
    row = Row(
        fault.kernel, fault.kind, f"{fault.file}:{fault.function}", fault.old, fault.new,
        fault.why, shlex.join(fault.tests),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in NEEDED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        (folder / fault.path).write_text(fault.applied(ROOT))
        start = time.monotonic()
        try:
            ran = _pytest(fault.tests, folder)
        except subprocess.TimeoutExpired:
            row.problem = f"no end within {LIMIT:g} s"
        else:
            red = RED.search(ran.stdout)
            if red and ran.returncode == 1:
                row.test, row.said = red.groups()
            else:
                row.problem = "survives" if ran.returncode == 0 else f"no name: {_end(ran)}"
        row.seconds = round(time.monotonic() - start, 1)
    return row


def _pytest(tests: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    own = {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),  # no help of earlier runs
        "COLUMNS": "400",
    }
    options = ["-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    options += [f"--time-limit={TEST_LIMIT:g}", f"--basetemp={folder / 'tmp'}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def _end(ran: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in f"{ran.stdout}\n{ran.stderr}".splitlines() if line.strip()]
    return f"status {ran.returncode}, {lines[-1] if lines else 'no output'}"


def line(row: Row) -> str:
    """For people."""
    end = f"** {row.problem}" if row.problem else row.test
    return f"{row.kernel:24} {row.kind:9} {row.seconds:5.1f} s  {end}\n{'':42}{row.why}"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of kernels' names")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--out", type=Path, help="a .json to write")
    args = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if fault.kernel.startswith(tuple(args.only))]
    if not chosen:
        parser.error(f"no kernel begins with {' or '.join(args.only)}")

    command = shlex.join(["python", "-m", "benchmarks.mutants", *argv])
    head = record.header(torch.device("cpu"), command)
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(run, chosen):
            rows.append(row)
            print(line(row), flush=True)
    kinds = Counter(row.kind for row in rows)
    problems = sum(row.problem is not None for row in rows)
    slowest = max(row.seconds for row in rows)
    print(f"\n{len(rows)} faults ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})")
    print(f"{len(rows) - problems} red by name, the slowest after {slowest:.1f} s; {problems} not")
    if args.out:
        write_atomic(args.out, to_json({**head, "limit_seconds": LIMIT, "rows": rows}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
