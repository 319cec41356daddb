"""Data sets, the published pipelines, and reproducible training batches."""

from __future__ import annotations

from pointrend_triton.config import DataConfig
from pointrend_triton.data.base import SegmentationDataset
from pointrend_triton.data.io import IGNORE, DataError, MissingDataError, read_image, read_label
from pointrend_triton.data.loader import TrainBatches, prepare, train_loader
from pointrend_triton.data.transforms import (
    MEAN,
    STD,
    TestTransform,
    TrainTransform,
    denormalise,
    keep_ratio_size,
    multi_scale_sizes,
)

__all__ = [
    "IGNORE",
    "MEAN",
    "STD",
    "DataError",
    "MissingDataError",
    "SegmentationDataset",
    "TestTransform",
    "TrainBatches",
    "TrainTransform",
    "build_dataset",
    "denormalise",
    "keep_ratio_size",
    "multi_scale_sizes",
    "prepare",
    "read_image",
    "read_label",
    "train_loader",
]


def build_dataset(
    data: DataConfig, split: str, labels_optional: bool = False
) -> SegmentationDataset:
    """The split of the configured data set, for instance data.train_split.

    With data.holdout_every n, every n-th image of the training split (by stem) is the split
    "holdout" and the training split is the rest. With `labels_optional`, any other split may lack
    its folder of labels (has_labels is False then). DataError says what is unusable, and where.
    """
    # imported here so that `python -m pointrend_triton.data.shapes` does not import itself twice
    from pointrend_triton.data.ade20k import ADE20K
    from pointrend_triton.data.cityscapes import Cityscapes
    from pointrend_triton.data.folder import Folder
    from pointrend_triton.data.shapes import Shapes

    if data.dataset == "shapes":
        if data.holdout_every:
            raise DataError("data.holdout_every is for sets of files; shapes has a split 'val'")
        train = split == "train"
        length = data.shapes_train_images if train else data.shapes_eval_images
        return Shapes(split, length, data.shapes_size)
    if data.root is None:
        rule = f"data.dataset {data.dataset} is read from the folder that it names"
        raise DataError(f"data.root is not set; {rule}")
    kinds = {"cityscapes": Cityscapes, "ade20k": ADE20K, "folder": Folder}
    held = split == "holdout" and data.holdout_every > 0
    trained = held or split == data.train_split
    dataset = kinds[data.dataset](
        data.root, data.train_split if held else split, labels_optional and not trained
    )
    if data.holdout_every and trained:
        return dataset.hold_out(data.holdout_every, held=held)
    return dataset
