"""The stored table under all that can happen to a file; CUDA is played by `fake_gpu`."""

import errno
import fcntl
import json
import multiprocessing
from pathlib import Path

import pytest
from fake_gpu import FakeGpu, run

from pointrend_triton.kernels import store


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return FakeGpu(monkeypatch, tmp_path)


def test_round_trip(gpu):
    store.remember(0, "toy", "key", "BLOCK=1", {"BLOCK=1": 0.123456789, "BLOCK=2": 1})
    gpu.forget()
    assert store.find(0, "toy", "key") == "BLOCK=1"
    assert store.table(0)["toy"]["key"]["ms"] == {"BLOCK=1": 0.123457, "BLOCK=2": 1}
    assert store.find(0, "toy", "other") is None
    assert store.find(0, "other", "key") is None


def test_the_file_says_what_it_is_for(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "source_hash", lambda: "0123456789ab")
    path = store.path_for(0)
    assert path.parent == tmp_path / "cache"
    assert path.name.startswith("Fake_GPU_3000-")
    assert path.name.endswith("-0123456789ab.json")
    store.remember(0, "toy", "key", "BLOCK=1", {})
    content = json.loads(path.read_text())
    assert {name: content[name] for name in store.identity(0)} == store.identity(0)


def test_another_state_of_the_kernels_is_another_table(gpu, monkeypatch):
    store.remember(0, "toy", "key", "BLOCK=1", {})
    monkeypatch.setattr(store, "source_hash", lambda: "changed")
    assert store.find(0, "toy", "key") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"kernels": {"toy"',
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"7",
        b"[" * 100_000,
        b'{"kernels": 3}',
        b'{"kernels": {"toy": []}}',
        b'{"kernels": {"toy": {"key": "BLOCK=1"}}}',
        b'{"kernels": {"toy": {"key": {"config": 3, "ms": {}}}}}',
        b'{"kernels": {"toy": {"key": {"config": "BLOCK=1", "ms": 3}}}}',
        b'{"kernels": {"toy": {"key": {"config": "BLOCK=1", "ms": {"BLOCK=1": "x"}}}}}',
    ],
)
def test_what_cannot_be_read_counts_as_absent_and_is_replaced(gpu, content):
    path = store.path_for(0)
    path.parent.mkdir()
    path.write_bytes(content)
    assert store.find(0, "toy", "key") is None
    store.remember(0, "toy", "key", "BLOCK=2", {})
    gpu.forget()
    assert store.find(0, "toy", "key") == "BLOCK=2"


def test_good_entries_beside_bad_ones_count(gpu):
    path = store.path_for(0)
    path.parent.mkdir()
    good = {"config": "BLOCK=1", "ms": {}}
    path.write_text(json.dumps({"kernels": {"toy": {"bad": 1, "key": good}, "other": 2}}))
    assert store.table(0) == {"toy": {"key": good}}


def test_a_hostile_configuration_is_only_ever_compared(gpu):
    kernel = gpu.kernel()
    run(kernel)
    path = store.path_for(0)
    path.write_text(path.read_text().replace("BLOCK=128,", "__import__('os').abort(),"))
    gpu.forget()
    run(kernel)
    assert gpu.benched == 6
    assert gpu.function.blocks[-1] == 128


def test_a_folder_that_cannot_be_written(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POINTREND_CACHE", str(tmp_path / "file" / "folder"))
    kernel = gpu.kernel()
    run(kernel)
    kernel._chosen.clear()
    run(kernel)
    assert gpu.benched == 3  # known in this process
    gpu.forget()
    run(kernel)
    assert gpu.benched == 6


def test_a_full_disk_leaves_the_old_table_and_nothing_else(gpu, monkeypatch):
    store.remember(0, "toy", "key", "BLOCK=1", {})
    path = store.path_for(0)
    before = path.read_text()

    def half(self, text):
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", half)
        store.remember(0, "toy", "other", "BLOCK=1", {})
    assert path.read_text() == before
    assert {p.suffix for p in path.parent.iterdir()} == {".json", ".lock"}


def test_without_a_home(gpu, monkeypatch):
    monkeypatch.delenv("POINTREND_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert store.path_for(0) is None
    run(gpu.kernel())
    assert gpu.function.blocks[-1] == 128


@pytest.mark.parametrize("cache", ["xdg", None])
def test_where_the_table_is_by_default(gpu, monkeypatch, tmp_path, cache):
    monkeypatch.setenv("POINTREND_CACHE", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache) if cache else "")
    expected = tmp_path / (cache or "home/.cache") / "pointrend_triton"
    assert store.path_for(0).parent == expected


def _remember(process):
    for i in range(10):
        store.remember(0, f"kernel {i % 3}", f"key {process} {i}", "BLOCK=1", {"BLOCK=1": 1.0})


def test_several_processes_write_one_table(gpu):
    context = multiprocessing.get_context("fork")  # with the fixture's answers
    processes = [context.Process(target=_remember, args=(i,)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sum(map(len, store.table(0).values())) == 40


@pytest.mark.parametrize("error", [None, OSError(errno.ENOLCK, "no locks here")])
def test_a_lock_that_cannot_be_had_is_not_waited_for_forever(gpu, monkeypatch, error):
    path = store.path_for(0)
    path.parent.mkdir()
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if error is not None:

            def fail(*arguments):
                raise error

            monkeypatch.setattr(fcntl, "flock", fail)
        monkeypatch.setattr(store, "PATIENCE", 0.05)
        store.remember(0, "toy", "key", "BLOCK=1", {})
    gpu.forget()
    assert store.find(0, "toy", "key") == "BLOCK=1"


def test_source_hash_changes_with_any_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "__file__", str(tmp_path / "store.py"))
    hashes = set()
    for text in ("a", "b"):
        (tmp_path / "kernel.py").write_text(text)
        hashes.add(store.source_hash.__wrapped__())
    assert len(hashes) == 2
    assert all(len(value) == 12 for value in hashes)
