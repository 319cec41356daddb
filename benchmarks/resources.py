"""The compile table: what each kernel needs of a GPU, from ahead-of-time compiles without one.

python -m benchmarks.resources --out benchmarks/results/resources.json
python -m benchmarks.resources --kernel point_head --arch 90 --default

Every kernel in every configuration of its list, for every architecture: registers, spills, shared
memory, tensor-core instructions, code size. Each compile runs in a process of its own, with a time
limit. What is compiled are the launches of `pointrend_triton.workloads`, recorded on tensors
without memory, so that types, constants and alignment are those of real launches.

The status is 1 if a configuration that a GPU could be given does not compile, spills, does not fit
or misses the tensor cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Triton is imported in the worker processes alone: it reads TRITON_INTERPRET when it is imported

ARCHS = (80, 86, 89, 90, 100)
DTYPES = ("bfloat16", "float32")
MODULE = "pointrend_triton.workloads"
TENSOR_CORES = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma.sync": "mma.sync"}

Row = dict[str, Any]


def table(
    module: str = MODULE,
    *,
    workloads: Sequence[str] = (),
    dtypes: Sequence[str] = DTYPES,
    kernels: Sequence[str] = (),
    archs: Sequence[int] = ARCHS,
    default: bool = False,
    jobs: int = 2,
    limit: float = 300,
) -> list[Row]:
    """Compiles and measures.

    Args:
        module: whose WORKLOADS are recorded.
        workloads: names of those; all by default.
        dtypes: of the tensors in them.
        kernels: names of kernels or beginnings of them; all by default.
        archs: compute capabilities, 90 for 9.0.
        default: only the first configuration of each list that fits the architecture.
        jobs: compiles at a time.
        limit: seconds for one compile.
    """
    tasks: list[tuple[Any, ...]] = [(module, workloads, dtypes, archs)]
    [(_, rows)] = in_processes(list_rows, tasks, 1, limit)
    if isinstance(rows, str):
        raise RuntimeError(rows)
    names = sorted({row["kernel"] for row in rows})
    for kernel in kernels:
        if not any(name.startswith(kernel) for name in names):
            raise ValueError(f"no kernel is called {kernel}; there are {', '.join(names)}")
    rows = [
        row
        for row in rows
        if row["kernel"].startswith(tuple(kernels) or "") and (row["default"] or not default)
    ]
    tasks = [(module, row) for row in rows]
    results = in_processes(compile_row, tasks, jobs, limit)
    with tqdm(results, total=len(tasks), unit="compile", disable=None) as progress:
        for (_, row), found in progress:
            row.update(found if isinstance(found, dict) else {"problem": found})
    return rows


def list_rows(
    module: str, workloads: Sequence[str], dtypes: Sequence[str], archs: Sequence[int]
) -> list[Row]:
    """What is to be compiled: the distinct kernels, configurations and architectures."""
    import torch

    from pointrend_triton.kernels import launch

    known = import_module(module).WORKLOADS
    for workload in workloads:
        if workload not in known:
            raise ValueError(f"no workload is called {workload}; there are {', '.join(known)}")
    rows: dict[str, Row] = {}
    for workload in workloads or known:
        for dtype in dtypes:
            for number, made in enumerate(record(module, workload, getattr(torch, dtype))):
                configs = made.kernel.configs(made.constants)
                for arch in archs:
                    fitting = fitting_configs(made, launch.shared_memory(arch))
                    for i, config in enumerate(configs):
                        source, options = source_of(made, config, arch)
                        description = launch.describe(config)
                        row = {
                            "kernel": made.kernel.name,
                            "key": made.key.partition(" size=")[0],
                            "config": description,
                            "arch": arch,
                            "default": description == (fitting[0] if fitting else None),
                            "left_out": description not in fitting,
                            "workload": workload,
                            "dtype": dtype,
                            "launch": number,
                            "number": i,
                        }
                        rows.setdefault(f"{source.hash()} {options}", row)
    return sorted(rows.values(), key=lambda row: (row["kernel"], row["key"], row["number"]))


def fitting_configs(made: Any, limit: int) -> list[str]:
    """Those that a GPU with that much shared memory would be given."""
    from pointrend_triton.kernels import launch

    try:
        return [launch.describe(c) for c in made.kernel.fitting(made.constants, limit)]
    except RuntimeError:  # none fits
        return []


def record(module: str, workload: str, dtype: Any) -> list[Any]:
    import torch

    from pointrend_triton.kernels import launch

    with launch.recording() as launches:
        import_module(module).WORKLOADS[workload](torch.device("meta"), dtype)
    return launches


def source_of(made: Any, config: Any, arch: int) -> tuple[Any, Any]:
    """What a launch compiles: by the functions that Triton itself calls in a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    function = made.kernel.function
    backend = make_backend(GPUTarget("cuda", arch, 32))
    keywords = {**made.constants, **config.all_kwargs(), **made.kernel.options}
    binder = create_function_from_signature(function.signature, function.params, backend)
    arguments, specialization, options = binder(*made.arguments, **keywords)
    options, signature, constants, attributes = function._pack_args(
        backend, keywords, arguments, specialization, options
    )
    return ASTSource(function, signature, constants, attributes), options


def compile_row(module: str, row: Row) -> Row:
    """What the compiler made of one row."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from pointrend_triton.kernels import launch

    made = record(module, row["workload"], getattr(torch, row["dtype"]))[row["launch"]]
    config = made.kernel.configs(made.constants)[row["number"]]
    source, options = source_of(made, config, row["arch"])
    start = time.perf_counter()
    compiled = triton.compile(
        source, target=GPUTarget("cuda", row["arch"], 32), options=options.__dict__
    )
    seconds = time.perf_counter() - start

    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, stack = usage(cubin)
    counts = {name: ptx.count(f"{text}.") for name, text in TENSOR_CORES.items()}
    found = {
        "registers": registers,
        "spilled_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": launch.shared_memory(row["arch"]),
        "tensor_cores": next((name for name, count in counts.items() if count), ""),
        "tensor_core_instructions": sum(counts.values()),
        "instructions": instructions(cubin),
        "cubin_bytes": len(cubin),
        "seconds": round(seconds, 2),
    }
    wants_tensor_cores = any(map(uses_tensor_cores, compiled.asm["ttir"].splitlines()))
    return {**found, "problem": problem({**row, **found}, ptx, wants_tensor_cores)}


def problem(row: Row, ptx: str, wants_tensor_cores: bool) -> str:
    """What is wrong with a compiled kernel, in a line; empty if nothing."""
    if not re.search(r"\b(st|atom|red)\.|\bcp\.async\.bulk\S*\.global\.shared", ptx):
        return "writes nothing: compiled to a trap"
    if row["left_out"]:
        return ""
    if row["shared_bytes"] > row["shared_limit"]:
        return f"needs {row['shared_bytes']} bytes of shared memory of {row['shared_limit']}"
    if row["spilled_bytes"]:
        return f"spills {row['spilled_bytes']} bytes"
    if wants_tensor_cores and not row["tensor_core_instructions"]:
        return "dots without tensor cores"
    return ""


def uses_tensor_cores(line: str) -> bool:
    """Whether a line of Triton's first IR is a dot for them; fp32 is one only as TF32."""
    return "tt.dot" in line and (
        "xf32>" not in line.split(" : ")[-1].split(" * ")[0] or "tf32" in line
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what it spills."""
    text = cuobjdump(cubin, "--dump-resource-usage")
    registers, stack = (re.search(rf"\b{name}:(\d+)", text) for name in ("REG", "STACK"))
    assert registers and stack, text
    return int(registers[1]), int(stack[1])


def instructions(cubin: bytes) -> int:
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", cuobjdump(cubin, "-sass"), re.MULTILINE))


def cuobjdump(cubin: bytes, option: str) -> str:
    """Runs the one in Triton's package."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def versions() -> dict[str, Any]:
    """Of what decides the table, and the machine on which it was made."""
    import torch
    import triton

    from pointrend_triton.environment import environment

    found = environment(torch.device("cpu"))
    tools = triton.knobs.nvidia
    return {
        "date": found["date"],
        "commit": found["commit"],
        "compiled_on": found["device"],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": tools.ptxas.version,
        "ptxas_blackwell": tools.ptxas_blackwell.version,
    }


def in_processes(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int, limit: float
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each task with its result, or with a line that says why there is none, as they end.

    A compiler that hangs, crashes or needs all memory takes its own process with it, nothing else.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, forks in milliseconds
    context.set_forkserver_preload(["benchmarks.forked"])
    waiting = deque(tasks)
    running: dict[Connection, tuple[tuple[Any, ...], Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, function, task), daemon=True)
                process.start()
                theirs.close()
                running[ours] = task, process, time.monotonic() + limit
            next_end = min(end for _, _, end in running.values())
            ready = wait(list(running), timeout=max(next_end - time.monotonic(), 0))
            overdue = [pipe for pipe in running if running[pipe][2] <= time.monotonic()]
            for pipe in dict.fromkeys([*ready, *overdue]):
                task, process, _ = running.pop(pipe)
                if pipe in ready:
                    try:
                        result = pipe.recv()
                    except EOFError:
                        process.join()
                        result = f"the compiler's process died (exit status {process.exitcode})"
                else:
                    result = f"not compiled within {limit:g} s"
                process.kill()
                process.join()
                pipe.close()
                yield task, result
    finally:
        for _, process, _ in running.values():
            process.kill()


def _work(pipe: Connection, function: Callable[..., Any], task: tuple[Any, ...]) -> None:
    # compilers print pages of IR when they fail
    with Path(os.devnull).open("w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    try:
        pipe.send(function(*task))
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:  # an error in a device function, in terms of its caller
            root = root.__cause__
        lines = [line.strip() for line in str(root).splitlines() if line.strip()] or [""]
        pipe.send(f"{type(root).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}")


def readable(rows: Sequence[Row]) -> str:
    lines, group = [], None
    for row in rows:
        if group != (row["kernel"], row["key"]):
            group = (row["kernel"], row["key"])
            lines.append(f"\n{row['kernel']}  {row['key']}  ({row['workload']})")
        figures = ""
        if "registers" in row:
            figures = (
                f"{row['registers']:4} regs {row['spilled_bytes']:5} spilled "
                f"{row['shared_bytes'] / 1024:6.1f} KB shared {row['instructions']:6} instructions "
                f"{row['tensor_core_instructions']:4} {row['tensor_cores'] or '-':8} "
                f"{row['seconds']:5.1f} s"
            )
        note = "default" if row["default"] else "left out" if row["left_out"] else ""
        lines.append(f"  sm_{row['arch']:<4} {figures}  {note:8}  {row['config']}")
        if row["problem"]:
            lines.append(f"    ** {row['problem']}")
    return "\n".join(lines)


def save(rows: Sequence[Row], path: Path) -> None:
    """As JSON, and as CSV beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    [(_, found)] = in_processes(versions, [()], 1, 60)
    path.write_text(json.dumps({"versions": found, "rows": rows}, indent=1) + "\n")
    columns = list(max(rows, key=len, default={}))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--kernel", nargs="+", default=(), help="names, or beginnings of names")
    parser.add_argument("--workload", nargs="+", default=(), help="of pointrend_triton.workloads")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--default", action="store_true", help="only what a GPU runs untuned")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiles at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one compile")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="take from Triton's cache what is there; seconds then say nothing",
    )
    parser.add_argument("--out", type=Path, help="a .json to write, with a .csv beside it")
    chosen = parser.parse_args(arguments)

    # the workers inherit these
    os.environ.pop("TRITON_INTERPRET", None)
    with ExitStack() as stack:
        if not chosen.reuse:
            cache = stack.enter_context(tempfile.TemporaryDirectory())
            os.environ["TRITON_CACHE_DIR"] = cache
        try:
            rows = table(
                workloads=chosen.workload,
                dtypes=chosen.dtype,
                kernels=chosen.kernel,
                archs=chosen.arch,
                default=chosen.default,
                jobs=chosen.jobs,
                limit=chosen.limit,
            )
        except (ValueError, RuntimeError) as error:
            parser.error(str(error))
        if chosen.out:
            save(rows, chosen.out)
    print(readable(rows))
    problems = [row for row in rows if row["problem"]]
    print(f"\n{len(rows)} compiles, {len(problems)} with a problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
