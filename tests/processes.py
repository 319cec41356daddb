"""Python in another process: where tests run without a GPU, Triton interprets in this one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments):
    """Runs Python in the clone, with Triton's compiler and a cache that stays there."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = {"TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**cache, **kept, **paths},
        capture_output=True,
        text=True,
    )
