"""Pictures in the device's memory: the crops cut there are those of the loader without."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import TINY, run

from pointrend_triton import reference
from pointrend_triton.config import ConfigError, DataConfig, from_dict
from pointrend_triton.data import DataError, TrainTransform, build_dataset, resident, train_loader
from pointrend_triton.data.cache import cached
from pointrend_triton.data.loader import prepare
from pointrend_triton.data.transforms import MEAN, STD, Colours, distort, normalise

ROOT = Path(__file__).resolve().parents[2]
# elsewhere OpenCV's way back from HSV rounds twice, and in other columns to the nearest
HAS_AVX2 = cv2.checkHardwareSupport(resident.CPU_AVX2)
CPU = torch.device("cpu")


def assert_same(ours, theirs):
    if HAS_AVX2:
        assert torch.equal(ours, theirs)
    else:
        greys = torch.tensor(STD).view(3, 1, 1)
        assert ((ours - theirs).abs() * greys).max() < 8.5


def picture(height, width, seed, smooth):
    """Uniform noise, or regions with edges between them."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    if smooth:
        image = cv2.medianBlur(cv2.GaussianBlur(image, (7, 7), 0), 5)
    return image, rng.choice(np.array([0, 0, 0, 1, 2, 255], np.uint8), (height, width))


def both(pairs, data, seed):
    """Images and labels of a batch by the loader's transform, and by `reference.augment`."""
    transform, places, colours, expected, start = TrainTransform(data), [], [], [], 7
    for image, label in pairs:
        cut = transform.draw(label, np.random.default_rng(seed))
        expected.append(transform(image, label, np.random.default_rng(seed)))
        places.append(resident.place_of(cut, start, label.shape))
        colours.append(cut.colours)
        start, seed = start + label.size, seed + 1
    packed = [cv2.merge([image, label]).reshape(-1, 4) for image, label in pairs]
    ours = reference.augment(
        torch.from_numpy(np.concatenate([np.zeros((7, 4), np.uint8), *packed])),
        torch.tensor(places),
        torch.tensor(colours, dtype=torch.float32),
        data.crop_size,
        mean=MEAN,
        std=STD,
    )
    return ours, [torch.stack(tensors) for tensors in zip(*expected, strict=True)]


sides = st.integers(9, 80)


@settings(max_examples=120)
@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=3),
    scale=st.tuples(sides, sides),
    crop=st.tuples(*[st.integers(1, 90)] * 2),
    seed=st.integers(0, 10**6),
    smooth=st.booleans(),
)
def test_any_crop_is_that_of_the_loader(sizes, scale, crop, seed, smooth):
    pairs = [picture(*size, seed + i, smooth) for i, size in enumerate(sizes)]
    data = DataConfig(scale=scale, crop_size=crop, scale_range=(0.5, 2.0))
    (images, labels), (wanted, truth) = both(pairs, data, seed)
    assert_same(images, wanted)
    assert torch.equal(labels, truth)


@pytest.mark.parametrize(
    ("size", "scale", "crop"),
    # halved, which OpenCV does in a way of its own; as it is; doubled; enlarged 13-fold
    [((64, 96), (48, 32), (32, 48)), ((40, 64), (64, 40), (40, 64))]
    + [((30, 20), (60, 40), (64, 64)), ((9, 9), (117, 117), (100, 117))]
    # so narrow that a column would be rounded away, and so low that a row would be
    + [((400, 2), (64, 48), (48, 48)), ((3, 700), (64, 48), (48, 48))],
)
def test_sizes_of_a_kind(size, scale, crop):
    data = DataConfig(scale=scale, crop_size=crop, scale_range=(1.0, 1.0))
    pairs = [picture(*size, seed, smooth=False) for seed in range(4)]
    for seed in range(10):
        (images, labels), (wanted, truth) = both(pairs, data, seed)
        assert_same(images, wanted)
        assert torch.equal(labels, truth)


@pytest.mark.slow
def test_the_published_size():
    data = DataConfig(scale=(2048, 1024), crop_size=(512, 1024))
    image, label = picture(1024, 2048, 0, smooth=True)
    for seed in range(5):
        (images, labels), (wanted, truth) = both([(image, label)], data, seed)
        assert_same(images, wanted)
        assert torch.equal(labels, truth)


@pytest.mark.slow
def test_every_colour_goes_to_hsv_and_back_as_in_opencv():
    """All 16.7 million colours there, all hues, saturations and values back."""
    greys = torch.arange(256, dtype=torch.int32)
    for blue in range(256):
        planes = [
            torch.full((256, 256), blue, dtype=torch.int32),
            *torch.meshgrid(greys, greys, indexing="ij"),
        ]
        ours = torch.stack(reference._to_hsv(*planes), dim=2)
        theirs = cv2.cvtColor(torch.stack(planes, dim=2).byte().numpy(), cv2.COLOR_BGR2HSV)
        assert np.array_equal(ours.numpy(), theirs)
    # 16 more columns than OpenCV has groups for: they are rounded, the others cut off
    values = torch.arange(256 * 256, dtype=torch.int32).reshape(1, -1, 128)
    values = torch.cat([values, values[..., :16]], dim=2)
    for hue in range(180):
        planes = [torch.full_like(values, hue), values // 256, values % 256]
        ours = torch.stack(reference._to_bgr(*planes, torch.tensor([[144]])), dim=3)[0]
        hsv = torch.stack(planes, dim=3)[0].byte().numpy()
        theirs = torch.from_numpy(cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR))
        if HAS_AVX2:
            assert torch.equal(ours, theirs.int())
        else:
            assert (ours - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("field", Colours._fields)
def test_every_step_of_the_distortion(field):
    image, label = picture(20, 45, 0, smooth=False)
    # at 0 the saturation is left alone, at -1 the hue
    for value in (-1, 0, 0.5, 1, 1.5, 17, 31.7, 179):
        if field in ("early_contrast", "late_contrast") and value < 0:
            continue
        colours = Colours(**{field: value})
        places = torch.tensor([[0, 20, 45, 20, 45, 0, 0, 0]])
        pictures = torch.from_numpy(cv2.merge([image, label]).reshape(-1, 4))
        images, _ = reference.augment(
            pictures,
            places,
            torch.tensor([colours], dtype=torch.float32),
            (20, 45),
            mean=MEAN,
            std=STD,
        )
        assert_same(images[0], torch.from_numpy(normalise(distort(image, colours))))


# data sets and loaders


@pytest.fixture
def data(tmp_path):
    """Pictures of different sizes, with regions, for training and evaluation."""
    root = tmp_path / "mine"
    for split, count in (("train", 6), ("val", 2)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for number in range(count):
            size = (40 + number, 64 - 3 * number)
            image, _ = picture(*size, number, smooth=True)
            label = cv2.resize(
                np.random.default_rng(number).integers(0, 8, (3, 4), np.uint8),
                size[::-1],
                interpolation=cv2.INTER_NEAREST,
            )
            Image.fromarray(image).save(root / "images" / split / f"{number}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{number}.png")
    names = "".join(f"{index},class {index}\n" for index in range(8))
    (root / "classes.csv").write_text("index,name\n" + names)
    options = {"crop_size": (32, 48), "scale": (64, 48), "cache": str(tmp_path / "cache")}
    return DataConfig(dataset="folder", root=str(root), workers=0, **options)


def batches(data, dataset, start=0, **options):
    return list(train_loader(dataset, data, 4, 3, start, 6, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_resident_or_not_the_batches_are_the_same(data, workers, capsys):
    dataset = build_dataset(data, "train")
    plain = batches(data, dataset)
    data.resident, data.workers = True, workers
    ours = batches(data, dataset)
    assert len(ours) == 6
    for (images, labels, files), (wanted, truth, names) in zip(ours, plain, strict=True):
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert_same(images, wanted)
        assert torch.equal(labels, truth)
        assert files == names
    out = capsys.readouterr().out
    assert "data.resident: 6 images, 0.00 GB, in the memory of cpu, which leaves" in out
    assert ("no AVX2" in out) != HAS_AVX2


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_made_on_a_gpu_are_those_of_the_cpu(data, workers):
    data.resident, data.workers = True, workers
    dataset, device = build_dataset(data, "train"), torch.device("cuda")
    expected = batches(data, dataset)
    for ours, theirs in zip(batches_beside_work(data, dataset, device), expected, strict=True):
        assert torch.equal(ours[0].cpu(), theirs[0])
        assert torch.equal(ours[1].cpu(), theirs[1])
        assert ours[2] == theirs[2]


def batches_beside_work(data, dataset, device):
    feed = iter(train_loader(dataset, data, 4, 3, 0, 6, device))
    for number in range(6):
        # for the main stream; memory that came back too early, or was not written yet, would show
        busy = torch.randn(2048, 2048, device=device)
        for _ in range(10):
            busy = busy @ busy.sigmoid()
        if number == 2:  # the kernel has been compiled and tuned
            torch.cuda.set_sync_debug_mode("error")
        try:
            batch = next(feed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield batch


def test_the_memory_is_filled_once(data, monkeypatch):
    data.resident = True
    dataset = prepare(build_dataset(data, "train"), data, CPU)
    assert dataset.pictures.shape == (sum(dataset.load(i)[1].size for i in range(6)), 4)
    image, label = dataset.load(1)
    first = dataset.load(0)[1].size
    mine = dataset.pictures[first : first + label.size].numpy()
    assert np.array_equal(mine[:, :3], image.reshape(-1, 3))
    assert np.array_equal(mine[:, 3], label.ravel())
    monkeypatch.setattr(resident, "_upload", None)
    whole = batches(data, dataset)
    for ours, theirs in zip(batches(data, dataset, start=4), whole[4:], strict=True):
        assert torch.equal(ours[0], theirs[0])
    parts = [batches(data, dataset, rank=rank, ranks=2)[0][0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole[0][0])


def test_loader_processes_get_no_pictures(data):
    data.resident = True
    loader = train_loader(build_dataset(data, "train"), data, 2, 0, 0, 1)
    pickled = pickle.dumps(loader.dataset)
    assert len(pickled) < 10_000
    place, colours, _ = pickle.loads(pickled)[(0, 0)]
    assert (place.shape, place.dtype, colours.shape) == ((8,), torch.int64, (5,))


def test_too_small_a_memory(data, monkeypatch):
    data.resident, dataset = True, cached(build_dataset(data, "train"), data.cache, 0)
    monkeypatch.setattr(resident, "available_memory", lambda device: 10**4)
    monkeypatch.setattr(torch, "empty", None)
    rule = r"data\.resident: 6 images, 0\.00 GB, in the memory of cpu, where 0\.00 GB are free; dat"
    with pytest.raises(DataError, match=rule):
        prepare(dataset, data, CPU)


def test_the_size_comes_with_what_is_left(data, monkeypatch, capsys):
    monkeypatch.setattr(resident, "available_memory", lambda device: 2 * 10**9)
    monkeypatch.setattr(cv2, "checkHardwareSupport", lambda feature: feature != 11)
    data.resident, dataset = True, cached(build_dataset(data, "train"), data.cache, 0)
    capsys.readouterr()
    assert len(prepare(dataset, data, CPU, quiet=True).pictures)
    assert capsys.readouterr() == ("", "")
    prepare(dataset, data, CPU)
    assert capsys.readouterr().out == (
        "data.resident: 6 images, 0.00 GB, in the memory of cpu, "
        "which leaves 2.00 GB for training\n"
        "data.resident: no AVX2 here: some grey levels differ from those of data.cache\n"
    )


def test_resident_needs_a_cache():
    with pytest.raises(ConfigError, match=r"data\.resident needs data\.cache"):
        from_dict(DataConfig, {"resident": True})


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_is_the_same_and_goes_on_either_way(data, tmp_path, device):
    config = tmp_path / "tiny.yaml"
    tree = {**TINY, "data": {"dataset": "folder", "root": data.root, "cache": data.cache}}
    tree["data"] |= {"crop_size": [32, 48], "scale": [64, 48], "workers": 0, "test_scale": None}
    tree["train"] = {**TINY["train"], "device": device}
    config.write_text(yaml.safe_dump(tree))
    plain = run(config, tmp_path / "plain")
    ours = run(config, tmp_path / "ours", "resident=true")
    rest = run(config, tmp_path / "rest", f"resume={tmp_path / 'ours' / 'last-1.pth'}")
    # each with losses or, after an evaluation, with scores
    assert [(row["iteration"], row["loss"] != "") for row in ours] == [
        *[(str(n), True) for n in (1, 2, 3, 4)],
        ("4", False),
        *[(str(n), True) for n in (5, 6, 7, 8)],
        ("8", False),
    ]
    assert len(plain) == 10 and [row["iteration"] for row in rest] == ["7", "8", "8"]
    if device == "cuda" or not HAS_AVX2:
        # a GPU adds up gradients in any order; the first loss comes before those
        assert float(ours[0]["loss"]) == pytest.approx(float(plain[0]["loss"]), rel=0.02)
    else:
        assert ours == plain
        assert rest == ours[-3:]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_AVX2, reason="compares with a processor that has AVX2")
def test_without_avx2_the_crops_are_nearly_the_same():
    """The tests above, in a process whose OpenCV leaves AVX2 alone."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "any_crop or every_step", __file__]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OPENCV_CPU_DISABLE": "AVX2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
