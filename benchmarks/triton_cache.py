"""Takes Triton's cache from one machine to another, so that nothing is compiled twice.

python -m benchmarks.triton_cache pack FILE.tar.xz      # of TRITON_CACHE_DIR, what running needs
python -m benchmarks.triton_cache unpack FILE.tar.xz    # into TRITON_CACHE_DIR

Triton takes a kernel from it where its own version, Python's, the GPU's architecture and the
kernel's file are the same to the last line; others are compiled as ever.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from pathlib import Path

# binaries, what Triton must know of them, and what launches them: a twentieth of the whole
KEPT = ("*/*.cubin", "*/*.json", "*/*.so")


def pack(folder: Path, file: Path) -> int:
    """Writes the archive, whole or not at all, and returns how many kernels it holds."""
    new = file.with_name(f"{file.name}.new")
    with tarfile.open(new, "w:xz", preset=3) as archive:
        for path in sorted(path for pattern in KEPT for path in folder.glob(pattern)):
            archive.add(path, path.relative_to(folder))
    new.replace(file)
    return len(list(folder.glob(KEPT[0])))


def unpack(file: Path, folder: Path) -> int:
    """Adds what the archive holds to a cache, and returns how many kernels that has."""
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    # the one place where a cache has paths: which files belong together
    for path in folder.glob("*/__grp__*.json"):
        names = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.parent / name) for name in names}
        path.write_text(json.dumps({"child_paths": here}))
    return len(list(folder.glob(KEPT[0])))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)

    import triton  # has no build for some systems

    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    count = pack(folder, args.file) if args.what == "pack" else unpack(args.file, folder)
    print(f"{args.what}ed: {count} kernels, {args.file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
