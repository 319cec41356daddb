"""The package as others get it: from a wheel, without Triton; and the pins that make installs."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pointrend_triton"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # built from a copy: setuptools leaves build/ and *.egg-info in its source folder
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pointrend_triton", "configs", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    (source / "kernels").symlink_to("pointrend_triton/kernels")
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir"]
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", "wheels", ".", cwd=source)
    (built,) = (source / "wheels").glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    sources = [p for p in PACKAGE.rglob("*") if p.suffix in {".py", ".csv", ".md", ".typed"}]
    # rglob does not follow the link to the configurations
    expected = {p.relative_to(ROOT).as_posix() for p in sources}
    expected |= {f"pointrend_triton/configs/{p.name}" for p in (ROOT / "configs").glob("*.yaml")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "pointrend_triton/kernels/README.md" in names
    assert any(name.endswith(".csv") for name in names)


@pytest.mark.slow
def test_installed_package_finds_its_configurations(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import pointrend_triton
assert pointrend_triton.__file__.startswith({str(tmp_path)!r}), pointrend_triton.__file__
pointrend_triton.build_model("shapes_r18")
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_everything_but_kernels_imports_without_triton() -> None:
    code = """
import importlib, pkgutil, sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import pointrend_triton
# walk_packages leaves kernels out: it has no __init__.py; library and tune are about them
names = [m.name for m in pkgutil.walk_packages(pointrend_triton.__path__, "pointrend_triton.")]
for name in names:
    if name not in ("pointrend_triton.library", "pointrend_triton.tune"):
        importlib.import_module(name)
assert "triton" not in sys.modules
print(*names)
"""
    names = run(sys.executable, "-c", code, cwd=ROOT).split()
    assert "pointrend_triton.models.pointrend" in names


def test_kernels_is_a_namespace_folder_with_a_link_at_the_top() -> None:
    # a kernels/__init__.py would shadow the distribution `kernels` for scripts started in the root
    assert not (PACKAGE / "kernels" / "__init__.py").exists()
    link = ROOT / "kernels"
    assert link.is_symlink() and link.resolve() == PACKAGE / "kernels"


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    listed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(r.specifier)) for r in listed)
    return {canonicalize_name(r.name): r for r in listed}


def test_pins_lie_within_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    pinned = pins()
    for required in map(Requirement, ranges):
        if required.name == project["name"]:  # an extra that takes another one in
            continue
        pin = pinned[canonicalize_name(required.name)]
        version = str(pin.specifier).removeprefix("==")
        assert required.specifier.contains(version), f"{pin} is outside of {required}"
        assert pin.marker == required.marker


def test_nothing_that_pins_require_is_left_unpinned() -> None:
    pinned = pins()
    for pin in pinned.values():
        if pin.marker and not pin.marker.evaluate():
            continue
        try:
            requires = metadata.requires(pin.name) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"{pin.name} is not installed here; make test installs it")
        for required in map(Requirement, requires):
            if required.marker and not required.marker.evaluate({"extra": ""}):
                continue
            # a CUDA build of torch says itself which ones it wants, and they differ by build
            if required.name.startswith(("nvidia-", "cuda-")):
                continue
            assert canonicalize_name(required.name) in pinned, f"{pin} requires {required}"
