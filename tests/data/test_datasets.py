"""Layouts, label values and messages of the data sets on disk, on small folders made here."""

import numpy as np
import pytest
from PIL import Image

from pointrend_triton.config import DataConfig
from pointrend_triton.data import DataError, MissingDataError, ade20k, build_dataset, cityscapes

# id -> trainId as cityscapesscripts lists them; every other id of 0..33 is not evaluated
TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def image(height=4, width=6):
    return np.full((height, width, 3), 90)


def folder_set(root, names=("b", "a", "c"), split="train", suffix=".png"):
    for value, name in enumerate(names):
        write(root / "images" / split / f"{name}{suffix}", image())
        write(root / "labels" / split / f"{name}.png", np.full((4, 6), value % 2))
    (root / "classes.csv").write_text(
        "index,name,r,g,b\n0,road,1,2,3\n1,car,4,5,6\n255,void,0,0,0\n"
    )
    return DataConfig(dataset="folder", root=str(root))


def cityscapes_set(root, label, kind="labelIds", stem="aachen_000000_000019"):
    city = stem.split("_")[0]
    label = np.asarray(label, np.uint8)
    write(root / "leftImg8bit/train" / city / f"{stem}_leftImg8bit.png", image(*label.shape))
    write(root / "gtFine/train" / city / f"{stem}_gtFine_{kind}.png", label)
    return DataConfig(dataset="cityscapes", root=str(root))


def ade_set(root, label, name="ADE_train_00000001"):
    label = np.asarray(label, np.uint8)
    write(root / "images/training" / f"{name}.jpg", image(*label.shape))
    write(root / "annotations/training" / f"{name}.png", label)
    return DataConfig(dataset="ade20k", root=str(root))


# folder


def test_folder(tmp_path):
    data = build_dataset(folder_set(tmp_path / "mine", suffix=".JPG"), "train")
    assert data.name == "mine"
    assert data.classes == ("road", "car")
    assert data.palette.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert [data.stem(i) for i in range(len(data))] == ["a", "b", "c"]
    picture, label = data.load(0)
    assert picture.shape == (4, 6, 3)
    assert (label == 1).all()
    assert data.files(2) == str(tmp_path / "mine/images/train/c.JPG")
    assert np.array_equal(data.encode(label), label)


def test_hidden_files_are_no_images(tmp_path):
    data = folder_set(tmp_path)
    (tmp_path / "images/train/._a.png").write_bytes(b"macOS leaves these")
    assert len(build_dataset(data, "train")) == 3


def test_image_without_label_and_the_reverse(tmp_path):
    data = folder_set(tmp_path)
    (tmp_path / "labels/train/b.png").unlink()
    with pytest.raises(
        MissingDataError, match=r"images/train/b\.png has no label of the same stem; 1"
    ):
        build_dataset(data, "train")
    (tmp_path / "images/train/b.png").unlink()
    (tmp_path / "images/train/c.png").unlink()
    with pytest.raises(
        MissingDataError, match=r"labels/train/c\.png has no image of the same stem; 1"
    ):
        build_dataset(data, "train")


def test_two_images_of_one_stem(tmp_path):
    data = folder_set(tmp_path)
    write(tmp_path / "images/train/a.jpg", image())
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png have the same stem"):
        build_dataset(data, "train")


def test_empty_split(tmp_path):
    data = folder_set(tmp_path)
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir()
    with pytest.raises(MissingDataError, match=r"\[val\]: no images and no labels"):
        build_dataset(data, "val")


def test_unknown_split_lists_the_splits(tmp_path):
    data = folder_set(tmp_path)
    folder_set(tmp_path, split="test")
    with pytest.raises(MissingDataError, match=r"images has no split 'val'; it has test/, train/"):
        build_dataset(data, "val")


def test_splits_are_folders(tmp_path):
    data = folder_set(tmp_path)
    (tmp_path / "images/list.txt").touch()
    with pytest.raises(MissingDataError, match=r"images has no split 'val'; it has train/$"):
        build_dataset(data, "val")
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").rename(tmp_path / kind / ".hidden")
    with pytest.raises(MissingDataError, match=r"images has no split 'val'; it has no folders$"):
        build_dataset(data, "val")


@pytest.mark.parametrize(
    ("dataset", "wanted"),
    [("folder", "images"), ("ade20k", "images"), ("cityscapes", "leftImg8bit")],
)
def test_a_wrong_root_says_what_is_wanted_and_what_is_there(tmp_path, dataset, wanted):
    (tmp_path / "something").mkdir()
    with pytest.raises(
        MissingDataError, match=rf"{wanted}: no such folder; need ROOT/.* has something/"
    ):
        build_dataset(DataConfig(dataset=dataset, root=str(tmp_path)), "train")
    with pytest.raises(MissingDataError, match="absent has nothing: it is no folder"):
        build_dataset(DataConfig(dataset=dataset, root=str(tmp_path / "absent")), "train")
    with pytest.raises(DataError, match=f"data.root is not set.*{dataset}"):
        build_dataset(DataConfig(dataset=dataset), "train")


def test_missing_class_table(tmp_path):
    data = folder_set(tmp_path)
    (tmp_path / "classes.csv").unlink()
    with pytest.raises(MissingDataError, match=r"classes\.csv: no such file"):
        build_dataset(data, "train")


def test_label_value_out_of_range_names_file_and_value(tmp_path):
    data = folder_set(tmp_path)
    label = np.zeros((4, 6))
    label[0, :3] = 2
    write(tmp_path / "labels/train/a.png", label)
    with pytest.raises(DataError, match=r"a\.png: value 2 \(3 px\) is no class; .* 0\.\.1, 255"):
        build_dataset(data, "train").load(0)


def test_sizes_must_agree(tmp_path):
    data = folder_set(tmp_path)
    write(tmp_path / "labels/train/a.png", np.zeros((6, 4)))
    with pytest.raises(DataError, match=r"a\.png is 6x4 .*labels/train/a\.png is 4x6"):
        build_dataset(data, "train").load(0)


# holding out


@pytest.mark.parametrize("every", [2, 3, 5])
def test_holdout_is_every_nth_image_and_training_the_rest(tmp_path, every):
    names = [f"{i:02d}" for i in range(11)]
    data = folder_set(tmp_path, names=names[::-1])
    folder_set(tmp_path, names=names, split="val")
    data.holdout_every = every
    parts = {s: build_dataset(data, s) for s in ("train", "holdout", "val")}
    stems = {s: [part.stem(i) for i in range(len(part))] for s, part in parts.items()}
    assert stems["holdout"] == names[every - 1 :: every]
    assert sorted(stems["train"] + stems["holdout"]) == names
    assert not set(stems["train"]) & set(stems["holdout"])
    assert stems["val"] == names
    assert parts["holdout"].files(0).endswith(f"{stems['holdout'][0]}.png")


def test_holdout_of_too_few_images(tmp_path):
    data = folder_set(tmp_path)
    data.holdout_every = 4
    with pytest.raises(DataError, match="3 images, so data.holdout_every 4 holds out none"):
        build_dataset(data, "holdout")


def test_holdout_is_an_ordinary_name_when_nothing_is_held_out(tmp_path):
    with pytest.raises(
        MissingDataError, match="no split 'holdout'; it has train/; data.holdout_every"
    ):
        build_dataset(folder_set(tmp_path), "holdout")
    assert len(build_dataset(folder_set(tmp_path, split="holdout"), "holdout")) == 3


# splits without labels


def without_labels(root, dataset):
    """A training split with labels and a split "test" of one image, without."""
    if dataset == "folder":
        write(root / "images/test/t.jpg", image())
        return folder_set(root)
    if dataset == "ade20k":
        write(root / "images/test/t.jpg", image())
        return ade_set(root, [[1]])
    write(root / "leftImg8bit/test/ulm/t_leftImg8bit.png", image())
    return cityscapes_set(root, [[7]])


@pytest.mark.parametrize(
    ("dataset", "kind"), [("folder", "labels"), ("ade20k", "annotations"), ("cityscapes", "gtFine")]
)
def test_a_split_without_labels_can_be_had_on_request(tmp_path, dataset, kind):
    config = without_labels(tmp_path, dataset)
    with pytest.raises(
        MissingDataError,
        match=rf"{kind} has no split 'test'; it has .*evaluate.py --save works without labels",
    ):
        build_dataset(config, "test")
    data = build_dataset(config, "test", labels_optional=True)
    assert not data.has_labels
    assert [data.stem(i) for i in range(len(data))] == ["t"]
    picture, label = data.load(0)
    assert picture.shape == (4, 6, 3)
    assert label.shape == (4, 6) and label.dtype == np.uint8 and (label == 255).all()
    assert build_dataset(config, "train", labels_optional=True).has_labels


def test_a_folder_of_photographs_needs_no_labels_at_all(tmp_path):
    config = without_labels(tmp_path, "folder")
    (tmp_path / "labels").rename(tmp_path / "elsewhere")
    assert not build_dataset(config, "test", labels_optional=True).has_labels
    # what is trained on, the part held out included, has to have them
    config.holdout_every = 2
    for split in ("train", "holdout"):
        with pytest.raises(MissingDataError, match="labels: no such folder"):
            build_dataset(config, split, labels_optional=True)
    with pytest.raises(MissingDataError, match="images has no split 'absent'"):
        build_dataset(config, "absent", labels_optional=True)


def test_a_folder_of_too_few_labels_stays_an_error(tmp_path):
    config = without_labels(tmp_path, "folder")
    (tmp_path / "labels/test").mkdir()
    with pytest.raises(MissingDataError, match=r"t\.jpg has no label of the same stem"):
        build_dataset(config, "test", labels_optional=True)
    (tmp_path / "labels/test").rmdir()
    (tmp_path / "images/test/t.jpg").unlink()
    with pytest.raises(MissingDataError, match=r"\[test\]: no images"):
        build_dataset(config, "test", labels_optional=True)


# Cityscapes


def test_cityscapes_ids_map_to_train_ids(tmp_path):
    ids = np.append(np.arange(34), 255)[None]
    _, label = build_dataset(cityscapes_set(tmp_path, ids), "train").load(0)
    assert label[0].tolist() == [TRAIN_IDS.get(i, 255) for i in ids[0]]


@pytest.mark.parametrize("value", [34, 100, 254])
def test_numbers_that_are_no_cityscapes_id_are_refused(tmp_path, value):
    data = build_dataset(cityscapes_set(tmp_path, [[7, value]]), "train")
    with pytest.raises(DataError, match=rf"labelIds\.png: value {value} \(1 px\).* 0\.\.33, 255"):
        data.load(0)


def test_cityscapes_train_ids_are_read_as_they_are_and_preferred(tmp_path):
    ids = np.array([[7, 33, 0, 11, 29]])
    from_ids = build_dataset(cityscapes_set(tmp_path / "ids", ids), "train")
    train_ids = [[0, 18, 255, 2, 255]]
    config = cityscapes_set(tmp_path / "both", train_ids, "labelTrainIds")
    # the other file's contents would show
    write(
        tmp_path / "both/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png", [[26] * 5]
    )
    preferred = build_dataset(config, "train")
    assert np.array_equal(preferred.load(0)[1], train_ids)
    assert np.array_equal(from_ids.load(0)[1], train_ids)
    write(preferred.pairs[0][1], [[19] * 5])
    with pytest.raises(DataError, match=r"labelTrainIds\.png: value 19 \(5 px\)"):
        preferred.load(0)


def test_cityscapes_files_pair_across_cities(tmp_path):
    cityscapes_set(tmp_path, [[7]], stem="ulm_000001_000019")
    data = build_dataset(cityscapes_set(tmp_path, [[8]]), "train")
    assert [data.stem(i) for i in range(2)] == ["aachen_000000_000019", "ulm_000001_000019"]
    assert [int(data.load(i)[1].item()) for i in range(2)] == [1, 0]
    data.pairs[1][1].unlink()
    with pytest.raises(MissingDataError, match="ulm_000001_000019_leftImg8bit.png has no label"):
        build_dataset(DataConfig(dataset="cityscapes", root=str(tmp_path)), "train")


def test_cityscapes_predictions_are_written_as_ids(tmp_path):
    data = build_dataset(cityscapes_set(tmp_path, [[7]]), "train")
    predicted = np.array([[*range(19), 255]], np.uint8)
    ids = data.encode(predicted)[0].tolist()
    assert [TRAIN_IDS[i] for i in ids[:19]] == list(range(19))
    assert ids[19] == 0
    with pytest.raises(DataError, match="cityscapes prediction: value 19"):
        data.encode(np.array([[19]], np.uint8))


def test_cityscapes_classes():
    assert len(cityscapes.CLASSES) == len(set(cityscapes.CLASSES)) == 19
    shown = dict(zip(cityscapes.CLASSES, cityscapes.PALETTE.tolist(), strict=True))
    assert shown["road"] == [128, 64, 128]
    assert shown["car"] == [0, 0, 142]
    assert shown["bicycle"] == [119, 11, 32]


# ADE20K


def test_ade_reduces_the_zero_label_over_all_raw_values(tmp_path):
    stored = np.append(np.arange(151), 255)[None]
    _, label = build_dataset(ade_set(tmp_path, stored), "train").load(0)
    assert label[0].tolist() == [255, *range(150), 255]
    # and, beyond what may occur, the arithmetic of mmsegmentation for every value
    raw = np.arange(256, dtype=np.uint8)
    step = raw.copy()
    step[step == 0] = 255
    step = step - np.uint8(1)
    step[step == 254] = 255
    assert np.array_equal(ade20k.FROM_RAW, step)


@pytest.mark.parametrize("value", [151, 254])
def test_numbers_beyond_150_are_no_ade_class(tmp_path, value):
    data = build_dataset(ade_set(tmp_path, [[1, value]]), "train")
    with pytest.raises(DataError, match=rf"00000001\.png: value {value} \(1 px\).* 0\.\.150, 255"):
        data.load(0)


def test_ade_splits_have_two_names(tmp_path):
    data = ade_set(tmp_path, [[1, 2]])
    assert build_dataset(data, "training").files(0) == build_dataset(data, "train").files(0)
    with pytest.raises(MissingDataError, match="no split 'validation'; it has training/"):
        build_dataset(data, "val")


def test_ade_predictions_count_from_one(tmp_path):
    data = build_dataset(ade_set(tmp_path, [[1]]), "train")
    predicted = np.array([[*range(150), 255]], np.uint8)
    assert data.encode(predicted)[0].tolist() == [*range(1, 151), 0]


def test_ade_classes():
    assert len(ade20k.CLASSES) == 150
    assert ade20k.CLASSES[:4] == ("wall", "building", "sky", "floor")
    assert ade20k.CLASSES[149] == "flag"
    assert ade20k.PALETTE.shape == (150, 3)
    first = [[120, 120, 120], [180, 120, 120], [6, 230, 230], [80, 50, 50]]
    assert ade20k.PALETTE[:4].tolist() == first
