"""Batches depend on seed and iteration only, whatever reads them and wherever a run is taken up."""

import pickle

import numpy as np
import pytest
import torch

from pointrend_triton.config import DataConfig
from pointrend_triton.data import DataError, TrainBatches, build_dataset, train_loader
from pointrend_triton.data.base import SegmentationDataset
from pointrend_triton.data.transforms import TrainTransform


def config(workers=0, **options):
    options = {"crop_size": (32, 48), "scale": (64, 64), **options}
    return DataConfig(shapes_size=(64, 64), shapes_train_images=10, workers=workers, **options)


def batches(workers=0, start=0, stop=6, seed=3, context=None):
    data = config(workers)
    loader = train_loader(build_dataset(data, "train"), data, 4, seed, start, stop)
    if context is not None:
        loader.multiprocessing_context = context
    return list(loader)


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(ours, theirs, strict=True)
    )


def test_every_epoch_visits_every_picture_once():
    keys = [key for batch in TrainBatches(7, 3, 0, 0, 14) for key in batch]
    assert [number for _, number in keys] == list(range(42))
    epochs = [[index for index, _ in keys[7 * e : 7 * e + 7]] for e in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    # 6 equal orders of 5040 by chance: never
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_order_is_the_seeds_permutation():
    keys = [key for batch in TrainBatches(5, 2, 11, 0, 5) for key in batch]
    expected = [
        *np.random.default_rng([11, 0]).permutation(5),
        *np.random.default_rng([11, 1]).permutation(5),
    ]
    assert [index for index, _ in keys] == expected


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10, 12])
def test_batches_can_be_taken_up_at_any_iteration(start):
    whole = list(TrainBatches(7, 3, 5, 0, 10))
    rest = TrainBatches(7, 3, 5, start, 10)
    assert list(rest) == whole[start:]
    assert len(rest) == len(whole[start:])


def test_a_batch_larger_than_the_data_set():
    (batch,) = TrainBatches(2, 5, 0, 0, 1)
    assert sorted(index for index, _ in batch[:4]) == [0, 0, 1, 1]


def test_no_images_is_an_error():
    with pytest.raises(DataError, match="no training images"):
        TrainBatches(0, 2, 0, 0, 1)


def test_batch_contents():
    images, labels, files = batches(stop=1)[0]
    assert (images.shape, images.dtype) == ((4, 3, 32, 48), torch.float32)
    assert (labels.shape, labels.dtype) == ((4, 32, 48), torch.int64)
    data = config()
    dataset = build_dataset(data, "train")
    order = np.random.default_rng([3, 0]).permutation(10)
    assert files == [f"shapes:train:{i}" for i in order[:4]]
    for number, index in enumerate(order[:4]):
        rng = np.random.default_rng([3, 1, number])
        image, label = TrainTransform(data)(*dataset.load(int(index)), rng)
        assert torch.equal(images[number], image)
        assert torch.equal(labels[number], label)


def test_same_batches_with_and_without_workers():
    assert same(batches(workers=2), batches(workers=0))


@pytest.mark.slow
def test_same_batches_under_spawn():
    assert same(batches(workers=1, stop=2, context="spawn"), batches(stop=2))


def test_resumed_batches_are_those_of_the_whole_run():
    assert same(batches(start=4), batches()[4:])


def test_another_seed_gives_another_run():
    assert not same(batches(stop=1, seed=4), batches(stop=1, seed=3))


def test_the_same_picture_is_distorted_anew_in_the_next_epoch():
    seen = {}
    for images, _, files in batches(stop=5):
        for image, file in zip(images, files, strict=True):
            seen.setdefault(file, []).append(image)
    assert all(len(twice) == 2 and not torch.equal(*twice) for twice in seen.values())


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    batches(workers=1, stop=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]


class Broken(SegmentationDataset):
    name, classes, palette = "broken", ("a",), np.zeros((1, 3), np.uint8)

    def __len__(self):
        return 4

    def load(self, index):
        raise DataError("/data/images/x.png: value 77 is no class")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_reaches_the_user_with_its_message(workers):
    loader = train_loader(Broken(), config(workers), 2, 0, 0, 1)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    last = str(caught.value).strip().splitlines()[-1]
    assert last.endswith("/data/images/x.png: value 77 is no class")


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_parts_of_all_processes_make_up_the_batches_of_one(ranks):
    data = config()
    dataset = build_dataset(data, "train")
    parts = [train_loader(dataset, data, 4, 3, 2, 5, rank=r, ranks=ranks) for r in range(ranks)]
    joined = [
        (torch.cat(images), torch.cat(labels), sum(files, []))
        for images, labels, files in (
            zip(*shares, strict=True) for shares in zip(*parts, strict=True)
        )
    ]
    assert same(joined, batches(start=2, stop=5))


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(DataError, match=r"train\.batch_size 8 .* 3 processes; .* multiple of 3"):
        TrainBatches(10, 8, 0, 0, 1, rank=1, ranks=3)
    with pytest.raises(ValueError, match=r"rank must be within 0\.\.1, not 2"):
        TrainBatches(10, 8, 0, 0, 1, rank=2, ranks=2)
