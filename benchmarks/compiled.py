"""Compiles what tests/kernels, `benchmarks.sanitize` and tuning launch, and looks for faults.

python -m benchmarks.compiled                  # for the GPU of this machine; without one, sm_90
python -m benchmarks.compiled --arch 90 --out benchmarks/results/compiled_sm90.json
python -m benchmarks.compiled --quick          # a quarter of them

On a machine with a GPU these programs then find what they launch in Triton's cache. The status is 1
if anything does not compile, has a fault of `resources.problem` or one of `benchmarks/ptx.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import ptx, resources

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Compile:
    """A distinct compile.

    Attributes:
        kernel, config: which kernel, in which configuration.
        signature: the types of its parameters, "constexpr" for what is compiled in.
        constants, attributes: by their places in it, as Triton's ASTSource takes them.
        options: the compiler's.
        untuned: whether a workload runs in it where nothing is tuned: there it must not spill.
        places: what needs it: the first place of each kind. "tests"; "drawn", tests whose examples
            are drawn at random; "sanitize"; "tune", with all configurations.
    """

    kernel: str
    config: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    untuned: bool = False
    places: dict[str, str] = field(default_factory=dict)

    @property
    def types(self) -> tuple[str, ...]:
        """Those of the tensors."""
        return tuple(kind for kind in map(str, self.signature.values()) if "*" in kind)

    @property
    def parameters(self) -> list[str]:
        """Names of what the compiled kernel is given, in order; one for each part of a tuple."""
        names = []
        for name, kind in self.signature.items():
            parts = kind if isinstance(kind, tuple) else [kind]
            names += [name] * sum(part != "constexpr" for part in parts)
        return names

    @property
    def known(self) -> dict[str, Any]:
        """The constants by their names."""
        names = list(self.signature)
        return {names[place[0]]: value for place, value in self.constants.items()}


def recorded(arch: int) -> list[Compile]:
    """Every distinct compile for a compute capability (90 for 9.0)."""
    switched = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "compiles"
        command = [sys.executable, "-O", "-m", "benchmarks.launches", str(arch), str(out)]
        ran = subprocess.run(
            command, cwd=ROOT, env=os.environ | switched, capture_output=True, text=True
        )
        if ran.returncode:
            raise RuntimeError(f"nothing was recorded:\n{ran.stdout}{ran.stderr}")
        return pickle.loads(out.read_bytes())


def few(compiles: Sequence[Compile]) -> list[Compile]:
    """One of each kernel, configuration and types of tensors: the first."""
    found: dict[Any, Compile] = {}
    for one in compiles:
        found.setdefault((one.kernel, one.config, one.types), one)
    return list(found.values())


def compile_one(one: Compile, arch: int, launcher: bool) -> dict[str, Any]:
    """CPU seconds, whether Triton's cache had it, and what is wrong.

    Args:
        launcher: make what calls the kernel too, which needs a GPU's driver.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pointrend_triton import library  # noqa: F401, with it come all kernels
    from pointrend_triton.kernels import launch

    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    function = launch.KERNELS[one.kernel].function
    source = ASTSource(function, one.signature, one.constants, one.attributes)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=one.options)
    if launcher:
        triton.runtime.driver.active.launcher_cls(source, compiled.metadata)
    problems = []
    if "ptx" in compiled.asm:  # a cache that was brought here may hold binaries alone
        text = compiled.asm["ptx"]
        row = {
            "left_out": False,
            "shared_bytes": compiled.metadata.shared,
            "shared_limit": launch.shared_memory(arch),
            # slow, not wrong: the tuner leaves it alone, and small tests need no speed
            "spilled_bytes": resources.usage(compiled.asm["cubin"])[1] if one.untuned else 0,
            "tensor_core_instructions": any(i in text for i in resources.TENSOR_CORES.values()),
        }
        dots = one.kernel in ptx.DOTS and one.known["PRECISION"] != "ieee"
        dots |= any(map(resources.uses_tensor_cores, compiled.asm["ttir"].splitlines()))
        problems = [resources.problem(row, text, dots)]
        problems += ptx.problems(one.kernel, text, one.parameters, one.known)
    return {
        "problem": "; ".join(filter(None, problems)),
        "cached": hits == [True],
        "cpu_seconds": sum(os.times()[:4]),
    }


def report(compiles: Sequence[Compile], arch: int, jobs: int, limit: float) -> dict[str, Any]:
    """Compiles, with a progress bar.

    Returns:
        how many, from where, what it took, and what is wrong with which.
    """
    # what calls a kernel is the same for pointers of all types; only a driver can be asked for it
    callers = {re.sub(r"\*\w+", "*", str([*one.signature.values()])): one for one in compiles}
    first = {id(one) for one in callers.values()} if architecture() == arch else set()
    tasks = [(one, arch, id(one) in first) for one in compiles]
    cached, seconds, problems = 0, 0.0, []
    results = resources.in_processes(compile_one, tasks, jobs, limit)
    with tqdm(results, total=len(tasks), unit="compile", disable=None) as progress:
        for (one, *_), found in progress:
            if isinstance(found, str):
                found = {"problem": found, "cached": False, "cpu_seconds": 0.0}
            cached += found["cached"]
            seconds += found["cpu_seconds"]
            if found["problem"]:
                place = next(iter(one.places.values()))
                row = {"kernel": one.kernel, "config": one.config, "place": place}
                problems.append(row | {"problem": found["problem"]})
    return {
        "compiled": len(compiles),
        "from_cache": cached,
        "cpu_seconds": round(seconds),
        "problems": problems,
    }


def counts(compiles: Sequence[Compile]) -> dict[str, dict[str, int]]:
    """How many each kind needs of each kernel, and of each kernel in "all"."""
    found: dict[str, Counter[str]] = {}
    for one in compiles:
        for kind in ("all", *one.places):
            found.setdefault(kind, Counter())[one.kernel] += 1
    return {kind: dict(sorted(count.items())) for kind, count in sorted(found.items())}


def architecture() -> int | None:
    """That of the GPU here."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, help="90 for 9.0; by default the GPU's here, else 90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiles at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one compile")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one of each kernel, configuration and types of tensors",
    )
    parser.add_argument("--out", type=Path, help="a .json to write")
    chosen = parser.parse_args(arguments)
    arch = chosen.arch or architecture() or 90

    os.environ.pop("TRITON_INTERPRET", None)  # the workers inherit this
    compiles = recorded(arch)
    wanted = few(compiles) if chosen.quick else compiles
    found = report(wanted, arch, chosen.jobs, chosen.limit)
    for row in found["problems"]:
        print("{kernel}, {config} ({place}): {problem}".format_map(row))
    print(
        f"sm_{arch}: {found['compiled']} of {len(compiles)} compiled, {found['from_cache']} of "
        f"them in the cache, {found['cpu_seconds']} CPU seconds, "
        f"{len(found['problems'])} with a problem"
    )
    if chosen.out:
        [(_, versions)] = resources.in_processes(resources.versions, [()], 1, 60)
        content = {"versions": versions, "arch": arch, **found, "counts": counts(compiles)}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
