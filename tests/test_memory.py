"""How much memory there is to take."""

import pytest
import torch

from pointrend_triton import memory


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/jobs/7\n", {"jobs/7": ("max", 9), "jobs": ("5000", 1200)}, 3800),
        ("0::/jobs/7\n", {"jobs/7": ("4000", 900), "jobs": ("5000", 1200)}, 3100),
        ("0::/\n", {".": ("4000", 5000)}, 0),
        ("0::/known/outside/only\n", {".": ("4000", 1000)}, 3000),
        ("9:name=systemd:/x\n4:cpu,memory:/x/y\n0::/\n", {"memory/x": ("4000", 1000)}, 3000),
        ("4:memory:/x\n", {"memory": (str(2**63 - 4096), 1), "memory/x": ("70", 1)}, 69),
        ("0::/\n", {}, 2**63),
        (None, {}, 2**63),
    ],
)
def test_memory_that_control_groups_leave(tmp_path, groups, files, left):
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, (limit, used) in files.items():
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        old = name.startswith("memory")
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(f"{limit}\n")
        key = "total_rss" if old else "anon"
        stat = f"rss 5\nanon_thp 3\n{key} {used}\nfile 99\ntotal_rss_huge 7\n"
        (folder / "memory.stat").write_text(stat)
    assert memory.group_limit(tmp_path) == left


def test_memory_of_this_machine():
    assert 2**20 < memory.available_memory(torch.device("cpu")) < 2**50
