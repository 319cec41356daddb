"""What a reader of a measurement must know about the machine and the software behind it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("triton", "numpy", "opencv-python-headless")
_ROOT = Path(__file__).resolve().parents[1]


def environment(device: torch.device) -> dict[str, object]:
    """Date, commit, device and versions, as plain values for a result file.

    `commit` ends in "+" where files of the clone differ from it, and is None outside a clone.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            # its own word: of a CUDA build, the installed metadata may leave out which
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in PACKAGES},
        },
    }


def _processor() -> str:
    """The processor's name and how many of its cores may be used."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    commit = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
    if commit is None or not (_ROOT / ".git").exists():
        return None
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a program prints; None where it is absent, fails or prints nothing."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip().partition("\n")[0] or None
