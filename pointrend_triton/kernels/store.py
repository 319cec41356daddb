"""What tuning found, kept on disk: one JSON file per GPU, PyTorch, Triton and state of the kernels.

Read first where tuning writes (POINTREND_CACHE, by default the user's cache folder), then beside
this file in tuned/, which is shipped. A stored configuration counts only where the kernel still has
it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

SHIPPED = Path(__file__).parent / "tuned"


def find(device: int, kernel: str, key: str) -> str | None:
    """The stored configuration of a kernel and key on a GPU, or None."""
    entry = _tables(device).get(kernel, {}).get(key)
    config = entry.get("config") if isinstance(entry, dict) else None
    return config if isinstance(config, str) else None


def remember(device: int, kernel: str, key: str, config: str, times: dict[str, float]) -> None:
    """Stores the choice for a kernel and key, and the milliseconds of all that were tried.

    A folder that cannot be written leaves the choice in memory: it is tuned again by the next
    process.
    """
    entry = {"config": config, "ms": {name: round(ms, 6) for name, ms in times.items()}}
    _tables(device).setdefault(kernel, {})[key] = entry
    path = path_for(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _read(path) or describe(device)  # another process may have added to it
        content.setdefault("kernels", {}).setdefault(kernel, {})[key] = entry
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.write("\n")
        Path(file.name).replace(path)
    except OSError:
        return


def describe(device: int) -> dict[str, Any]:
    """What a table is for: GPU, versions and the state of the kernels."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "source": source_hash(),
    }


def path_for(device: int) -> Path:
    """Where the table of a GPU is written."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get("POINTREND_CACHE") or Path(cache) / "pointrend_triton"
    name = "-".join(str(value) for value in describe(device).values())
    return Path(root) / f"{_file_name(name)}.json"


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
def _tables(device: int) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for path in (shipped_path(device), path_for(device)):
        for kernel, entries in ((_read(path) or {}).get("kernels") or {}).items():
            if isinstance(entries, dict):
                merged.setdefault(kernel, {}).update(entries)
    return merged


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no readable table."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return (
        content
        if isinstance(content, dict) and isinstance(content.get("kernels", {}), dict)
        else None
    )


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)
