"""Finds the fastest configuration of every kernel on this GPU, and stores it.

python -m pointrend_triton.tune                    # minutes; later processes use what it finds
python -m pointrend_triton.tune --only select point_head --dtype bf16
python -m pointrend_triton.tune --show             # what is stored
python -m pointrend_triton.tune --adopt FILE       # what another machine with such a GPU stored

Without it each kernel is tuned when it is first used. Interrupted, it has stored what it found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pointrend_triton.workloads import WORKLOADS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pointrend_triton.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", default=[""], help="kernels, or beginnings of names")
    parser.add_argument("--ship", action="store_true", help="write the table into the package too")
    parser.add_argument("--show", action="store_true", help="print what is stored, tune nothing")
    parser.add_argument(
        "--adopt",
        metavar="FILE",
        type=Path,
        help="take over this table of such a GPU, tune nothing",
    )
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning times kernels on a CUDA GPU, and this process sees none")
    from pointrend_triton.kernels import launch, store

    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and Triton's interpreter cannot be timed: unset it")
    only = tuple(chosen.only)
    device = torch.device("cuda", torch.cuda.current_device())
    if chosen.adopt:
        try:
            print(f"stored in {store.adopt(device.index, chosen.adopt)}")
        except (OSError, ValueError) as error:
            parser.error(f"--adopt {error}")
        return 0
    if chosen.show:
        print(readable(store.table(device.index), only))
        return 0

    users = users_of_kernels()
    for name in only:
        if not any(kernel.startswith(name) for kernel in users):
            parser.error(f"no kernel is called {name}; there are {', '.join(sorted(users))}")
    wanted = {w for kernel, ws in users.items() if kernel.startswith(only) for w in ws}
    runs = [(name, dtype) for name in WORKLOADS if name in wanted for dtype in chosen.dtype]

    status = 0
    found: dict[str, dict[str, Any]] = {}
    with launch.retuning(only) as tuned, tqdm(runs, unit="workload", disable=None) as progress:
        try:
            for name, dtype in progress:
                progress.set_description(f"{name}, {dtype}")
                try:
                    WORKLOADS[name](device, DTYPES[dtype])
                    torch.cuda.synchronize()
                except Exception as error:  # too little memory for this one, say
                    status = 1
                    progress.write(f"{name}, {dtype}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            status = 130
            progress.write("interrupted: what was found so far is stored", file=sys.stderr)
    for one in tuned:
        found.setdefault(one.kernel.name, {})[one.key] = {"config": one.config, "ms": one.times}
    print(readable(found, only))
    print(f"stored in {store.path_for(device.index) or 'memory only: there is no cache folder'}")
    if chosen.ship and status != 130:
        print(f"shipped in {store.ship(device.index)}")
    return status


def users_of_kernels() -> dict[str, list[str]]:
    """Each kernel's workloads."""
    from pointrend_triton.kernels import launch

    users: dict[str, list[str]] = {}
    for name, workload in WORKLOADS.items():
        with launch.recording() as launches:
            workload(torch.device("meta"), torch.float32)
        for kernel in {made.kernel.name for made in launches}:
            users.setdefault(kernel, []).append(name)
    return users


def readable(table: dict[str, dict[str, Any]], only: tuple[str, ...]) -> str:
    """Kernel, key, configuration, its milliseconds and how much faster than the first it is."""
    lines = []
    for kernel in sorted(name for name in table if name.startswith(only)):
        lines.append(kernel)
        for key, entry in sorted(table[kernel].items()):
            times, config = entry["ms"], entry["config"]
            lines.append(f"  {key}")
            gain = next(iter(times.values())) / times[config] if times.get(config) else 1
            lines.append(f"    {times.get(config, 0):9.4f} ms  {gain:5.2f}x  {config}")
    return "\n".join(lines or ["nothing is stored"])


if __name__ == "__main__":
    sys.exit(main())
