"""How much memory there is to take."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken now: of a CUDA GPU's memory, else of this machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what PyTorch has taken and does not use
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_free_memory(), group_limit())


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        # not Linux: a machine of modest size
        return 4 * 2**30


def group_limit(root: Path = Path("/")) -> int:
    """What this process's control groups may still take; without a limit, more than there is."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return 2**63
    left = [2**63]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, anonymous = root / "sys/fs/cgroup", "memory.max", "anon"
        elif "memory" in controllers.split(","):
            base, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            anonymous = "total_rss"
        else:
            continue
        # the groups around it limit it too; in a container, its path may be known outside only
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                left.append(_left(folder, limit, anonymous))
    return max(min(left), 0)


def _left(group: Path, limit: str, anonymous: str) -> int:
    try:
        most = int((group / limit).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        # the rest of what is in use are files, which are given up
        used = next(int(line.split()[1]) for line in lines if line.startswith(f"{anonymous} "))
    except (OSError, StopIteration, ValueError):
        return 2**63
    return most - used
