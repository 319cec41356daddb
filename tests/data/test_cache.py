"""A cache gives what decoding gives, survives its writer, and says what is wrong with it."""

import json
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pointrend_triton.config import DataConfig
from pointrend_triton.data import DataError, build_dataset, cache, train_loader
from pointrend_triton.data.cache import cached


def folder_set(root, count=5):
    """Pictures of different sizes, one of them turned by its EXIF orientation."""
    rng = np.random.default_rng(0)
    (root / "images/train").mkdir(parents=True)
    (root / "labels/train").mkdir(parents=True)
    (root / "classes.csv").write_text("index,name\n0,road\n1,car\n")
    for number in range(count):
        height, width = 8 + number, 15 - number
        exif = Image.Exif()
        stored = (height, width)
        if number == 1:
            exif[0x0112] = 6
            stored = (width, height)
        image = rng.integers(0, 256, (*stored, 3), np.uint8)
        label = rng.choice(np.array([0, 1, 255], np.uint8), (height, width))
        Image.fromarray(image).save(root / f"images/train/{number:03d}.png", exif=exif)
        Image.fromarray(label).save(root / f"labels/train/{number:03d}.png")
    return DataConfig(dataset="folder", root=str(root), crop_size=(8, 8), scale=(16, 16), workers=0)


@pytest.fixture
def data(tmp_path):
    return folder_set(tmp_path / "mine")


@pytest.fixture
def dataset(data):
    return build_dataset(data, "train")


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b)
        for i in range(len(ours))
        for a, b in zip(ours.load(i), theirs.load(i), strict=True)
    )


def place(tmp_path):
    (found,) = (tmp_path / "cache").iterdir()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_is_what_decoding_gives(tmp_path, dataset, workers, capsys):
    ours = cached(dataset, tmp_path / "cache", workers)
    assert same(ours, dataset)
    assert (ours.name, ours.classes, ours.files(3)) == ("mine", ("road", "car"), dataset.files(3))
    assert ours.stem(3) == dataset.stem(3)
    assert not ours.load(0)[0].flags.writeable
    pixels = sum(dataset.load(i)[1].size for i in range(5))
    assert (place(tmp_path) / "images.bin").stat().st_size == 3 * pixels
    assert "data.cache: 5 images, decoded 0.00 GB, in " in capsys.readouterr().out
    # a worker under spawn gets neither pictures nor maps
    assert same(pickle.loads(pickle.dumps(ours)), dataset)


def test_a_finished_cache_is_read_and_not_written(tmp_path, dataset, monkeypatch):
    cached(dataset, tmp_path / "cache", 0)
    monkeypatch.setattr(cache, "_write", None)
    assert same(cached(dataset, tmp_path / "cache", 0), dataset)


def test_training_batches_from_a_cache(tmp_path, data, dataset):
    plain = list(train_loader(dataset, data, 2, 0, 0, 6))
    data.cache = str(tmp_path / "cache")
    for ours, theirs in zip(train_loader(dataset, data, 2, 0, 0, 6), plain, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[2] == theirs[2]
    assert place(tmp_path).name.startswith("mine-")


@pytest.mark.parametrize("change", ["content", "time", "decoder", "classes", "held out"])
def test_what_changed_gets_another_cache(tmp_path, data, dataset, monkeypatch, capsys, change):
    before = cached(dataset, tmp_path / "cache", 0)
    first = place(tmp_path)
    path = dataset.pairs[2][0]
    if change == "content":
        Image.fromarray(np.zeros((10, 13, 3), np.uint8)).save(path)
    elif change == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "decoder":
        monkeypatch.setattr(cache.cv2, "__version__", "4.0")
    elif change == "classes":
        (tmp_path / "mine/classes.csv").write_text("index,name\n0,road\n1,car\n2,bus\n")
    else:
        data.holdout_every = 2
    dataset = build_dataset(data, "train")
    capsys.readouterr()
    assert same(cached(dataset, tmp_path / "cache", 0), dataset)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert f"are there too: {first.name}" in capsys.readouterr().out
    # a run that reads the first one is not disturbed
    assert len(before) == 5
    before.load(4)


def test_a_writer_that_fails_leaves_no_index_and_is_gone_on_with(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(cache, "EVERY", 2)
    broken, whole = dataset.pairs[4][0], dataset.pairs[4][0].read_bytes()
    moment = broken.stat().st_mtime_ns
    broken.write_bytes(whole[:-30] + bytes(30))
    os.utime(broken, ns=(moment, moment))
    with pytest.raises(DataError, match=r"004\.png"):
        cached(dataset, tmp_path / "cache", 0)
    found = place(tmp_path)
    assert not (found / "index.json").exists()
    assert len(json.loads((found / "journal.json").read_text())["sizes"]) == 4
    # what came after the last entry, and may be torn
    with (found / "images.bin").open("ab") as file:
        file.write(b"torn")
    broken.write_bytes(whole)
    os.utime(broken, ns=(moment, moment))
    loaded = []
    load = type(dataset).load
    monkeypatch.setattr(type(dataset), "load", lambda s, i: loaded.append(i) or load(s, i))
    ours = cached(dataset, tmp_path / "cache", 0)
    assert loaded == [4]
    assert same(ours, dataset)
    assert not (found / "journal.json").exists()


def test_the_disk_has_the_pictures_before_a_list_says_so(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(cache, "EVERY", 2)
    synced = []

    def note(descriptor):
        number = os.fstat(descriptor).st_ino
        (name,) = (path.name for path in place(tmp_path).iterdir() if path.stat().st_ino == number)
        synced.append(name)

    monkeypatch.setattr(cache.os, "fsync", note)
    cached(dataset, tmp_path / "cache", 0)
    each = [["images.bin", "labels.bin", f"{name}.new"] for name in ("journal", "journal", "index")]
    assert synced == sum(each, [])


def forked(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kills_at_any_moment(tmp_path, workers, monkeypatch):
    data = folder_set(tmp_path / "mine", count=6)
    for number in range(6, 60):
        for kind in ("images", "labels"):
            source = tmp_path / "mine" / kind / "train" / f"{number % 6:03d}.png"
            source.with_name(f"{number:03d}.png").write_bytes(source.read_bytes())
    dataset = build_dataset(data, "train")
    load = type(dataset).load
    slow = lambda self, index: (time.sleep(0.004), load(self, index))[1]  # noqa: E731
    monkeypatch.setattr(type(dataset), "load", slow)
    monkeypatch.setattr(cache, "EVERY", 3)
    for delay in (0.02, 0.05, 0.1, 0.15):
        process = forked(cached, dataset, tmp_path / "cache", workers)
        time.sleep(delay)
        process.kill()
        process.join()
        if list(tmp_path.glob("cache/*/index.json")):
            assert same(cached(dataset, tmp_path / "cache", 0), dataset)
    assert same(cached(dataset, tmp_path / "cache", 0), dataset)


def test_of_several_writers_all_but_one_wait(tmp_path, dataset, monkeypatch):
    write = cache._write

    def noted(*args):
        with (tmp_path / "written").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        write(*args)

    monkeypatch.setattr(cache, "_write", noted)
    processes = [forked(cached, dataset, tmp_path / "cache", 0) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "written").read_text() == "x"
    assert same(cached(dataset, tmp_path / "cache", 0), dataset)


def test_too_small_a_disk(tmp_path, dataset, monkeypatch):
    class Full:
        free = 100

    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(DataError, match=r"5 images, decoded 0\.00 GB, in .*, where 0\.00 GB are f"):
        cached(dataset, tmp_path / "cache", 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"format": 1}',
        b'{"format": 1, "sizes": 3}',
        b'{"format": 1, "sizes": [[1, 2, 3]]}',
        b'{"format": 1, "sizes": [["8", "15"]]}',
        b'{"format": 1, "sizes": [[8, -15]]}',
        b'{"format": 1, "sizes": [[8, 1e9]]}',
        b'{"format": 1, "sizes": [[8, true]]}',
        b'{"format": 2, "sizes": []}',
        b'{"format": 1, "sizes": [[%s, 1]]}' % (b"9" * 5000),
    ],
)
@pytest.mark.parametrize("name", ["index", "journal"])
def test_an_index_that_is_none(tmp_path, dataset, content, name):
    cached(dataset, tmp_path / "cache", 0)
    (place(tmp_path) / "index.json").unlink()
    (place(tmp_path) / f"{name}.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"damaged: {name}\.json is not .*; remove it"):
        cached(dataset, tmp_path / "cache", 0)


def test_files_that_do_not_fit_the_index(tmp_path, dataset):
    cached(dataset, tmp_path / "cache", 0)
    images = place(tmp_path) / "images.bin"
    whole = images.read_bytes()
    for wrong in (whole[:-1], whole + b"x"):
        images.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"images\.bin has {len(wrong)} bytes, index\.json sa"):
            cached(dataset, tmp_path / "cache", 0)
    images.unlink()
    with pytest.raises(DataError, match=r"images\.bin has 0 bytes"):
        cached(dataset, tmp_path / "cache", 0)


def test_an_index_of_fewer_pictures(tmp_path, dataset):
    cached(dataset, tmp_path / "cache", 0)
    found = place(tmp_path)
    (found / "index.json").write_text('{"format": 1, "sizes": []}')
    for name in ("images.bin", "labels.bin"):
        (found / name).write_bytes(b"")
    with pytest.raises(DataError, match="does not list the 5 images"):
        cached(dataset, tmp_path / "cache", 0)


def test_a_folder_that_cannot_be_written(tmp_path, dataset):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data\.cache: .*cache"):
        cached(dataset, tmp_path / "cache", 0)


def test_drawn_data_sets_have_no_cache(tmp_path):
    shapes = build_dataset(DataConfig(), "train")
    with pytest.raises(DataError, match=r"data\.cache is for sets of files; shapes is drawn"):
        cached(shapes, tmp_path, 0)
