"""The weights that OpenMMLab publishes: where they are and how their contents are told."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class PublishedFile(NamedTuple):
    """A file on OpenMMLab's server; the last 8 digits of its name begin its sha256."""

    url: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def sha256_prefix(self) -> str:
        return Path(self.name).stem[-8:]


def _pointrend(run: str, suffix: str) -> PublishedFile:
    server = "https://download.openmmlab.com/mmsegmentation/v0.5/point_rend"
    return PublishedFile(f"{server}/{run}/{run}_{suffix}.pth")


def _backbone(name: str) -> PublishedFile:
    return PublishedFile(f"https://download.openmmlab.com/pretrain/third_party/{name}.pth")


# PointRend, by the name of the configuration (from mmsegmentation's model zoo)
PUBLISHED = {
    "cityscapes_r50": _pointrend(
        "pointrend_r50_512x1024_80k_cityscapes", "20200711_015821-bb1ff523"
    ),
    "cityscapes_r101": _pointrend(
        "pointrend_r101_512x1024_80k_cityscapes", "20200711_170850-d0ca84be"
    ),
    "ade20k_r50": _pointrend("pointrend_r50_512x512_160k_ade20k", "20200807_232644-ac3febf2"),
    "ade20k_r101": _pointrend("pointrend_r101_512x512_160k_ade20k", "20200808_030852-8834902a"),
}
# ImageNet weights of ResNetV1c, by depth (from mmcv's model zoo, which has none for 34)
BACKBONES = {
    18: _backbone("resnet18_v1c-b5776b93"),
    50: _backbone("resnet50_v1c-2cccc1ad"),
    101: _backbone("resnet101_v1c-e67eebb6"),
}


def missing_backbone_message(path: str | Path, depth: int) -> str:
    """What to do about a `model.pretrained` that names no file."""
    path = Path(path)
    problem = f"model.pretrained: there is no file {path}"
    published = BACKBONES.get(depth)
    if published is None:
        return (
            f"{problem}, and no ImageNet weights of ResNetV1c-{depth} are published; "
            "model.pretrained=null starts from scratch"
        )
    return (
        f"{problem}. Download {published.url} (its sha256 begins with {published.sha256_prefix}) "
        f"into {path.absolute().parent} and set model.pretrained={path.parent / published.name}; "
        "model.pretrained=null starts from scratch"
    )
