"""How float32 is multiplied: set whatever was set before, and put back as it was."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# what a user may have done, by either set of names, or both
BEFORE = [
    "pass",
    "matmul.allow_tf32 = True",
    "backends.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "backends.fp32_precision = 'tf32'",
    "backends.fp32_precision = 'ieee'",
    "backends.cudnn.fp32_precision = 'tf32'",
    "backends.cudnn.conv.fp32_precision = 'ieee'",
    "backends.cudnn.rnn.fp32_precision = 'ieee'",
    "matmul.fp32_precision = 'tf32'",
    "matmul.fp32_precision = 'ieee'",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "backends.mkldnn.conv.fp32_precision = 'tf32'",
    "torch.set_float32_matmul_precision('high'); matmul.fp32_precision = 'ieee'",
    "backends.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'",
    "matmul.allow_tf32 = True; backends.cudnn.conv.fp32_precision = 'ieee'",
]

SEEN = """
import torch
from torch import backends
from torch.backends.cuda import matmul

from pointrend_triton import precision

def read(name):
    try:
        return eval(name)
    except RuntimeError:
        return "raises"

NEWER = [f"backends.{place}.fp32_precision" for place in (
    "cudnn.conv", "cudnn.rnn", "cuda.matmul", "mkldnn.conv", "mkldnn.rnn", "mkldnn.matmul"
)]
OLDER = ["matmul.allow_tf32", "backends.cudnn.allow_tf32"]
COMPILER = "torch.get_float32_matmul_precision()"

def seen():
    return [read(name) for name in (*NEWER, *OLDER, COMPILER)]
"""


def run(code):
    """In a process of its own: some of what is set cannot be unset."""
    done = subprocess.run(
        [sys.executable, "-c", SEEN + code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_set_and_put_back_after_whatever_a_user_set():
    cases = "\n".join(
        f"""
def before():
    {before}
check(before, {before!r})
"""
        for before in BEFORE
    )
    run(
        """
import os

def check(before, name):
    child = os.fork()  # each from what PyTorch starts with
    if child:
        assert os.waitpid(child, 0)[1] == 0, name
        return
    status = 1
    try:
        inside(before)
        status = 0
    finally:
        os._exit(status)

def inside(before):
    before()
    found = seen()
    with precision.tf32(False):
        assert {read(name) for name in NEWER} == {"ieee"}, seen()
        assert not precision.matmul_is_tf32()
        assert [read(name) for name in OLDER] == [False, False], seen()
        assert read(COMPILER) == "highest"
    assert seen() == found
    with precision.tf32(True):
        assert precision.matmul_is_tf32()
        assert {read(name) for name in NEWER[:3]} == {"tf32"}
        assert [read(name) for name in OLDER] == [True, True], seen()
    assert seen() == found
    try:
        with precision.tf32(False):
            raise KeyError
    except KeyError:
        assert seen() == found
"""
        + cases
    )


@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_set_stays(allowed):
    run(
        f"""
precision.set_tf32({allowed})
assert precision.matmul_is_tf32() == {allowed}
assert [read(name) for name in OLDER] == [{allowed}, {allowed}]
assert read(COMPILER) == ("high" if {allowed} else "highest")
"""
    )
