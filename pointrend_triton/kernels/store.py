"""What tuning found, kept on disk: one JSON file per GPU, PyTorch, Triton and state of the kernels.

Read first where tuning writes (POINTREND_CACHE, by default the user's cache folder), then beside
this file in tuned/, which is shipped. A stored configuration counts only where the kernel still has
it: a file can choose among them, nothing else. One that cannot be read counts as absent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

SHIPPED = Path(__file__).parent / "tuned"
PATIENCE = 2.0  # seconds to wait for another process that writes

# kernel -> key -> {"config": the chosen one, "ms": {configuration: milliseconds}}
Table = dict[str, dict[str, dict[str, Any]]]


def find(device: int, kernel: str, key: str) -> str | None:
    """The stored configuration of a kernel and key on a GPU, or None."""
    entry = table(device).get(kernel, {}).get(key)
    return entry["config"] if entry else None


def remember(device: int, kernel: str, key: str, config: str, times: dict[str, float]) -> None:
    """Stores the choice for a kernel and key, and the milliseconds of all that were tried.

    Where it cannot be written it stays in memory: the next process tunes again.
    """
    entry = {"config": config, "ms": {name: round(ms, 6) for name, ms in times.items()}}
    table(device).setdefault(kernel, {})[key] = entry
    path = path_for(device)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            stored = _read(path)  # other processes may have added to it
            stored.setdefault(kernel, {})[key] = entry
            _write(path, device, stored)
    except OSError:
        return


def ship(device: int) -> Path:
    """Writes all that is known of a GPU into the package and returns the file's path."""
    path = shipped_path(device)
    path.parent.mkdir(exist_ok=True)
    _write(path, device, table(device))
    return path


def adopt(device: int, file: Path) -> Path:
    """Takes over a table that was written elsewhere, and returns where.

    It may be of other versions and of another state of the kernels: only what the kernels still
    have counts.

    Raises:
        ValueError: it is of another GPU, or no table.
    """
    content = _content(file)
    if "gpu" not in content or not _entries(content):
        raise ValueError(f"{file} holds no table of tuned kernels")
    here = torch.cuda.get_device_name(device)
    if content["gpu"] != here:
        raise ValueError(f"{file} was tuned on {content['gpu']}, and this GPU is {here}")
    path = path_for(device)
    if path is None:
        raise ValueError("there is no folder for tables: set POINTREND_CACHE")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, device, _entries(content))
    _tables.cache_clear()
    return path


def table(device: int) -> Table:
    """All that is stored for a GPU; the user's own over what is shipped."""
    return _tables(shipped_path(device), path_for(device))


def identity(device: int) -> dict[str, str]:
    """What a table is for: GPU, versions and the state of the kernels."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "source": source_hash(),
    }


def path_for(device: int) -> Path | None:
    """Where the table of a GPU is written; None where there is no folder for it."""
    folder = os.environ.get("POINTREND_CACHE")
    if not folder:
        try:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return None
        folder = str(Path(cache) / "pointrend_triton")
    return Path(folder) / f"{_file_name('-'.join(identity(device).values()))}.json"


def shipped_path(device: int) -> Path:
    """Where the table of a GPU is in the package, if there is one."""
    return SHIPPED / f"{_file_name(torch.cuda.get_device_name(device))}.json"


@functools.cache
def source_hash() -> str:
    """12 hex digits that change with any kernel."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _tables(shipped: Path, own: Path | None) -> Table:
    merged = _read(shipped)
    for kernel, entries in (_read(own) if own else {}).items():
        merged.setdefault(kernel, {}).update(entries)
    return merged


def _read(path: Path) -> Table:
    """The entries that are as they should be; none where there is no readable table."""
    return _entries(_content(path))


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _entries(content: dict[str, Any]) -> Table:
    kernels = content.get("kernels")
    return {
        kernel: {key: entry for key, entry in entries.items() if _is_entry(entry)}
        for kernel, entries in (kernels.items() if isinstance(kernels, dict) else ())
        if isinstance(entries, dict)
    }


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("config"), str)
        and isinstance(value.get("ms"), dict)
        and all(isinstance(ms, int | float) for ms in value["ms"].values())
    )


def _write(path: Path, device: int, content: Table) -> None:
    """All or nothing: a reader never sees half a table."""
    kernels = {kernel: dict(sorted(content[kernel].items())) for kernel in sorted(content)}
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        new.write_text(json.dumps({**identity(device), "kernels": kernels}, indent=1) + "\n")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; after some patience without, for losing an entry is no harm."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with path.with_name(path.name + ".lock").open("w") as file:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # another process has it
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        yield


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)
