"""The tests in other versions of what the package is built on: oldest, newest, a GPU machine's.

    python tests/compat/run.py                      # make compat
    python tests/compat/run.py newest --out FILE.json

Each environment is a file beside this one, which names its Python and its packages; it is made
under .cache/compat when it is missing or its file has changed. Several gigabytes and half an hour
of two cores each. Without --out nothing but logs is left, in .cache/compat too; the status is 1
where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CACHE = ROOT / ".cache" / "compat"
OPTIONS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "-n",
    "auto",
    "--maxprocesses",
    "8",
    "--dist",
    "loadfile",
]
VERSIONS = """
import json, platform, cv2, numpy, torch
try: from triton import __version__ as triton
except ImportError: triton = None
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
    "triton": triton, "numpy": numpy.__version__, "opencv": cv2.__version__}))
"""


@dataclass(frozen=True)
class Part:
    """What is run in an environment, some of whose packages may be replaced for it."""

    name: str
    tests: tuple[str, ...] = ("tests",)
    instead: tuple[str, ...] = ()
    gpu_check: str = ""


# Triton 3.6's interpreter needs an older NumPy than such a machine has
INTERPRETED = Part("kernels", ("tests/kernels", "tests/test_library.py"), ("numpy==2.3.5",))
OPENCV_4 = Part(
    "pictures",
    ("tests/data", "tests/test_train_step.py", "tests/test_predict.py", "tests/test_visualize.py"),
    ("opencv-python-headless==4.14.0.94",),
)
PARTS = {
    "gpu_machine": (
        Part("suite"),
        INTERPRETED,
        Part("right", gpu_check="right"),
        Part("worth", gpu_check="worth"),
    ),
    "newest": (Part("suite"), OPENCV_4),
}


@dataclass
class Result:
    part: str
    command: str
    versions: dict[str, str]
    status: int
    seconds: int
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def environment(name: str) -> Path:
    """The Python of an environment, which is made where it is missing or out of date."""
    wanted = (FOLDER / f"{name}.txt").read_text()
    folder = CACHE / name
    made = folder / "made-from.txt"
    if not made.exists() or made.read_text() != wanted:
        version = wanted.splitlines()[0].removeprefix("# Python ")
        print(f"{name}: installing for Python {version}: minutes, once", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter(version), "-m", "venv", folder], check=True)
        install(folder / "bin/python", "-r", str(FOLDER / f"{name}.txt"))
        made.write_text(wanted)
    return folder / "bin/python"


def interpreter(version: str) -> str:
    """A Python of that version: on the PATH, or one that pyenv has."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [f"python{version}", *map(str, sorted(versions.glob(f"{version}.*/bin/python")))]
    for candidate in found:
        code = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
        try:
            ran = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        except OSError:
            continue
        if ran.stdout.strip() == version:
            return candidate
    raise SystemExit(f"Python {version} with venv is needed: none of {', '.join(found)} is")


def install(python: Path, *what: str) -> None:
    options = ["--no-input", "--disable-pip-version-check", "--only-binary", ":all:"]
    subprocess.run([python, "-m", "pip", "install", "-q", *options, *what], check=True)


def overlay(python: Path, packages: tuple[str, ...]) -> Path:
    """A folder with other versions of some packages, for PYTHONPATH."""
    folder = python.parents[1] / "instead" / "_".join(packages)
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        install(python, "--no-deps", "--target", str(part), *packages)
        part.rename(folder)
    return folder


def run(name: str, python: Path, part: Part) -> Result:
    logs = CACHE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log, junit = logs / f"{name}-{part.name}.txt", logs / f"{name}-{part.name}.xml"
    junit.unlink(missing_ok=True)
    # caches of its own: what other versions made is no use, and may be in the way
    variables = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    variables |= {"XDG_CACHE_HOME": "xdg", "MPLCONFIGDIR": "matplotlib"}
    settings = {key: str(CACHE / f"{name}-cache" / value) for key, value in variables.items()}
    settings["HYPOTHESIS_STORAGE_DIRECTORY"] = str(CACHE / "hypothesis")
    if part.instead:
        settings["PYTHONPATH"] = str(overlay(python, part.instead))
    if part.gpu_check:
        out = logs / f"{name}-{part.name}"
        shutil.rmtree(out, ignore_errors=True)
        command = ["bash", "benchmarks/gpu_check.sh", part.gpu_check, str(out)]
        settings |= {"DEVICE": "cpu", "QUICK": "1", "PYTHON": str(python)}
    else:
        base = f"--basetemp={logs / f'{name}-tests'}"
        command = [str(python), "-m", "pytest", *OPTIONS, base, f"--junitxml={junit}", *part.tests]
    every = {**os.environ, **settings}
    ran = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, env=every)
    versions = json.loads(ran.stdout)
    print(f"{name}: {part.name}, {versions}: into {log.relative_to(ROOT)}", flush=True)
    start = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(command, cwd=ROOT, env=every, stdout=file, stderr=file).returncode
    seconds = round(time.monotonic() - start)
    shown = ["python" if word == str(python) else word for word in command]
    shown = [word.replace(f"{ROOT}/", "") for word in shown]
    result = Result(part.name, " ".join(shown), versions, status, seconds)
    if junit.exists():
        count(result, ElementTree.parse(junit).iter("testcase"))
    return result


def count(result: Result, cases: Iterator[ElementTree.Element]) -> None:
    reasons: Counter[str] = Counter()
    for case in cases:
        outcome = {child.tag: child for child in case}
        skipped = outcome.get("skipped")
        if skipped is not None:
            reasons[re.sub(r"/\S+", "...", skipped.get("message", ""))] += 1
        elif "failure" in outcome or "error" in outcome:
            result.failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            result.passed += 1
    result.skipped = dict(reasons.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of an environment's parts")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where results are put")
    args = parser.parse_args()
    for name in args.names:
        if name not in PARTS:
            parser.error(f"there is no environment {name}; there are {', '.join(PARTS)}")
    head = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"]
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    bad = 0
    for name in args.names or PARTS:
        python = environment(name)
        for part in PARTS[name]:
            if args.only and part.name not in args.only:
                continue
            result = run(name, python, part)
            bad += result.status != 0
            print(
                f"  status {result.status}, {result.passed} passed, {result.seconds} s", flush=True
            )
            for test in result.failed:
                print(f"  failed: {test}")
            for reason, number in result.skipped.items():
                print(f"  {number} skipped: {reason}")
            commit = subprocess.run(head, capture_output=True, text=True).stdout.strip() or None
            row = {"commit": commit, "date": time.strftime("%Y-%m-%d"), **asdict(result)}
            found.setdefault(name, {})[part.name] = row
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
