"""Weights in and out: mmsegmentation's checkpoints, backbone files and this project's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pointrend_triton.architecture import (
    architecture,
    backbone_names,
    describe,
    infer_model_config,
    model_names,
    other_stem,
    strip_prefix,
)
from pointrend_triton.config import ConfigError, ModelConfig, from_dict
from pointrend_triton.models import PointRend
from pointrend_triton.published import (
    BACKBONES,
    PUBLISHED,
    PublishedFile,
    missing_backbone_message,
)
from pointrend_triton.serialization import CheckpointError, read_checkpoint, save_checkpoint

__all__ = [
    "BACKBONES",
    "FORMAT",
    "PUBLISHED",
    "VERSION",
    "CheckpointError",
    "LoadReport",
    "PublishedFile",
    "from_checkpoint",
    "infer_model_config",
    "load_backbone",
    "load_checkpoint",
    "missing_backbone_message",
    "read_checkpoint",
    "save_checkpoint",
]

# this project's files: "format" and "version", "state_dict", "meta" with the ModelConfig's fields
# under "model", and "classes", "palette", "iteration"; any training state beside them
FORMAT, VERSION = "pointrend_triton", 1


@dataclass
class LoadReport:
    """What was read from a file, and what was not.

    Attributes:
        path: the file.
        format: "mmsegmentation 0.x", "mmsegmentation 1.x", "pointrend_triton", "state dict"
            or "backbone".
        loaded: names of the model's tensors that were filled.
        ignored: entries and tensors of the file that were left out -> why.
        missing: names of the model's tensors that the file lacks and that kept their values;
            only BatchNorm's batch counters may be.
        iteration: how long the weights were trained, where the file says.
        classes, palette: names and RGB colours, where the file has them for every class.
    """

    path: Path
    format: str
    loaded: tuple[str, ...] = ()
    ignored: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    iteration: int | None = None
    classes: tuple[str, ...] | None = None
    palette: list[list[int]] | None = None

    def __str__(self) -> str:
        facts = [self.format]
        if self.iteration is not None:
            facts.append(f"iteration {self.iteration}")
        if self.classes is not None:
            facts.append(f"{len(self.classes)} class names")
        lines = [f"{self.path}: {', '.join(facts)}", f"  loaded: {len(self.loaded)} tensors"]
        for reason in dict.fromkeys(self.ignored.values()):
            names = [name for name, why in self.ignored.items() if why == reason]
            lines.append(f"  ignored ({reason}): {_some(names)}")
        if self.missing:
            lines.append(f"  not in the file, kept as they were: {_some(self.missing)}")
        return "\n".join(lines)


def load_checkpoint(
    model: PointRend, path: str | Path, read: Mapping[str, Any] | None = None
) -> LoadReport:
    """Fills a model from a PointRend or Semantic FPN checkpoint, and sets its classes and palette.

    Every tensor must fit by name and shape, otherwise nothing is changed. A leading "module." of
    names is dropped; BatchNorm's batch counters may be missing.

    Args:
        path: see `read_checkpoint`.
        read: what `read_checkpoint(path)` gave, if it was called before.

    Raises:
        CheckpointError: see `read_checkpoint`; or something does not fit.
    """
    content = read_checkpoint(path) if read is None else read
    with _naming(path):
        report = LoadReport(Path(path), _format(content))
        if "state_dict" in content:
            weights = ("state_dict", "meta", "format", "version")
            report.ignored = {str(key): "not weights" for key in content if key not in weights}
        _fill(model, model_names(_state_dict(content)), report)
    meta, num_classes = _meta(content), model.config.num_classes
    iteration = meta.get("iteration", meta.get("iter"))
    report.iteration = iteration if type(iteration) is int else None
    report.classes = _classes(meta, num_classes)
    report.palette = _palette(meta, num_classes)
    model.classes = report.classes or model.classes
    model.palette = report.palette or model.palette
    return report


def load_backbone(backbone: nn.Module, path: str | Path) -> LoadReport:
    """Fills a ResNetV1c from mmcv's resnet*_v1c files, timm's resnet50c or a whole segmenter.

    Every tensor of the backbone must fit by name and shape, otherwise nothing is changed. Leading
    "module." and "backbone." of names are dropped; BatchNorm's batch counters may be missing.

    Raises:
        CheckpointError: see `read_checkpoint`; something does not fit; or a ResNet of another stem.
    """
    content = read_checkpoint(path)
    report = LoadReport(Path(path), "backbone")
    with _naming(path):
        tensors = strip_prefix(_state_dict(content), "module.")
        whole = any(name.startswith("backbone.") for name in tensors)
        for name in tensors:
            if name.startswith("fc."):
                report.ignored[name] = "ImageNet classifier"
            elif whole and not name.startswith("backbone."):
                report.ignored[name] = "not of the backbone"
        kept = {name: tensors[name] for name in tensors if name not in report.ignored}
        kept = backbone_names(strip_prefix(kept, "backbone."))
        if "conv1.weight" in kept:
            files = ", ".join(file.name for file in BACKBONES.values())
            raise CheckpointError(f"{other_stem(kept['conv1.weight'])}, as in {files}")
        _fill(backbone, kept, report)
    return report


def from_checkpoint(path: str | Path, read: Mapping[str, Any] | None = None) -> PointRend:
    """The model that a PointRend or Semantic FPN checkpoint holds, in evaluation mode.

    A file of this project says how the model is configured; for any other, `infer_model_config`
    reads it off the tensors.

    Args:
        path: see `read_checkpoint`.
        read: what `read_checkpoint(path)` gave, if it was called before.

    Raises:
        CheckpointError: see `load_checkpoint`; or the file's configuration and tensors disagree.
    """
    content = read_checkpoint(path) if read is None else read
    with _naming(path):
        config = infer_model_config(_state_dict(content))
        if _format(content) == FORMAT and "model" in _meta(content):
            config = _own_config(_meta(content)["model"], config)
    model = PointRend(config)
    load_checkpoint(model, path, content)
    return model.eval()


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Says which file an error is about."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _own_config(mapping: Any, inferred: ModelConfig) -> ModelConfig:
    config: ModelConfig = from_dict(ModelConfig, mapping, where="model")
    said, found = architecture(config), architecture(inferred)
    if wrong := [name for name in said if said[name] != found[name]]:
        raise CheckpointError(
            "; ".join(f"its meta says {n} {said[n]}, its tensors say {found[n]}" for n in wrong)
        )
    return dataclasses.replace(config, pretrained=None)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copies `tensors` into `module`, or changes nothing and raises."""
    own = module.state_dict()
    unknown = [name for name in tensors if name not in own]
    absent = [name for name in own if name not in tensors]
    lacking = [name for name in absent if not name.endswith(".num_batches_tracked")]
    differing = [
        f"{name} is {_kind(tensors[name])} in the file, {_kind(own[name])} in the model"
        for name in tensors
        if name in own and _kind(tensors[name]) != _kind(own[name])
    ]
    if unknown or lacking or differing:
        parts = _comparison(tensors, own)
        parts += [_some(differing)] if differing else []
        parts += [f"the file lacks {_some(lacking)}"] if lacking else []
        parts += [f"the model has no {_some(unknown)}"] if unknown else []
        raise CheckpointError(f"it does not fit the model: {'; '.join(parts)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    report.loaded, report.missing = tuple(tensors), tuple(absent)


def _kind(tensor: Tensor) -> str:
    """What must agree of two tensors: the shape, and whether they hold fractions or integers."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{tensor.dtype} {shape}"


def _comparison(file: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> list[str]:
    """In words, what the file is and what the model is, if that differs and can be told."""
    try:
        theirs, ours = describe(file), describe(model)
    except (CheckpointError, ConfigError):
        return []
    return [f"the file is {theirs}, the model is {ours}"] if theirs != ours else []


def _some(names: Sequence[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _format(content: Mapping[str, Any]) -> str:
    if content.get("format") == FORMAT:
        if content.get("version") != VERSION:
            raise CheckpointError(
                f"it has version {content.get('version')!r} of the format {FORMAT}, "
                f"this program reads version {VERSION}"
            )
        return FORMAT
    meta = _meta(content)
    if "mmengine_version" in meta or "message_hub" in content:
        return "mmsegmentation 1.x"
    if any(key in meta for key in ("mmseg_version", "mmcv_version", "CLASSES")):
        return "mmsegmentation 0.x"
    return "state dict"


def _state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file: under "state_dict" or, without one, at the top."""
    state_dict = content.get("state_dict", content)
    entries = state_dict if isinstance(state_dict, Mapping) else {}
    tensors = {
        name: value
        for name, value in entries.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"it holds no tensors, its entries are {_some([*map(str, content)])}")
    if others := [str(name) for name in entries if name not in tensors]:
        raise CheckpointError(f"among its tensors are entries that are none: {_some(others)}")
    return tensors


def _meta(content: Mapping[str, Any]) -> dict[str, Any]:
    meta = content.get("meta")
    return meta if isinstance(meta, dict) else {}


def _classes(meta: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    names = _listed(meta, "classes", num_classes)
    # what a terminal would take for a command is no name
    valid = all(type(name) is str and name.isprintable() for name in names)
    return tuple(names) or None if valid else None


def _palette(meta: Mapping[str, Any], num_classes: int) -> list[list[int]] | None:
    colours = _listed(meta, "palette", num_classes)
    valid = all(
        isinstance(colour, list | tuple)
        and len(colour) == 3
        and all(type(value) is int and 0 <= value <= 255 for value in colour)
        for colour in colours
    )
    return [list(colour) for colour in colours] or None if valid else None


def _listed(meta: Mapping[str, Any], name: str, num_classes: int) -> list[Any]:
    """The list `name` of the data set if it has an entry for each class, otherwise an empty one."""
    dataset = meta.get("dataset_meta")
    # mmsegmentation 0.x writes it in capitals
    for place in (meta, dataset if isinstance(dataset, dict) else {}):
        for entries in (place.get(name), place.get(name.upper())):
            # one logit tells two classes apart
            if isinstance(entries, list | tuple) and (
                len(entries) == num_classes or (num_classes == 1 and len(entries) == 2)
            ):
                return list(entries)
    return []
