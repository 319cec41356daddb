"""What a result must be read with: versions, the GPU, what is at hand.

python -m benchmarks.identity --device cuda

Imports whatever the tests and benchmarks import. The status is 1 where a package is missing, or
the device.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys

import torch

from benchmarks import record
from pointrend_triton.inference import pick_device

PACKAGES = ("triton", "numpy", "cv2", "einops", "yaml", "PIL", "matplotlib", "tensorboard")
PACKAGES += ("pytest", "xdist", "hypothesis")
# compile launchers, look into memory, assemble
TOOLS = ("nvidia-smi", "gcc", "compute-sanitizer", "ptxas", "nvcc")
SETTINGS = ("TRITON_", "POINTREND_", "TORCH", "CUDA_", "NVIDIA_")


def version(package: str) -> str | None:
    """Its own word where it has one; None where it cannot be imported."""
    try:
        module = importlib.import_module(package)
    except Exception:  # some need a library of the system that may be absent
        return None
    return getattr(module, "__version__", "of no version")


def gpu(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return (
        f"{found.name}, compute capability {found.major}.{found.minor}, "
        f"{found.multi_processor_count} multiprocessors, {found.total_memory / 2**30:.0f} GiB, "
        f"{found.L2_cache_size / 2**20:.0f} MiB of L2, "
        f"{found.shared_memory_per_block_optin} bytes of shared memory in a block"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    device = pick_device(parser.parse_args(argv).device)
    head = record.header(device, "")
    for name in ("date", "commit", "device", "driver", "cpu", "system"):
        print(f"{name}: {head[name]}")
    if device.type == "cuda":
        print(f"gpu: {gpu(device)}")
    versions = {name: version(name) for name in PACKAGES}
    print(f"python: {sys.version}")
    print(f"torch: {torch.__version__}, CUDA {torch.version.cuda}, cuDNN", end=" ")
    print(torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None)
    for name, found in {**versions, **{tool: shutil.which(tool) for tool in TOOLS}}.items():
        print(f"{name}: {found or 'absent'}")
    for name, value in sorted(os.environ.items()):
        if name.startswith(SETTINGS):
            print(f"{name}={value}")
    return int(None in versions.values())


if __name__ == "__main__":
    sys.exit(main())
