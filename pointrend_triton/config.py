"""Configuration: a YAML file and `key=value` overrides, checked against the dataclasses below.

Every field has a type and a default; an unknown key or a value of the wrong type is an error that
names the key, the file and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and value, and the rule."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass
class PointHeadConfig:
    """The point head (PointRend sections 3.1 and 4); the defaults are mmsegmentation's."""

    channels: int = 256
    num_layers: int = 3
    # True: coarse logits are concatenated again after every hidden layer (mmsegmentation);
    # False: only before the first (detectron2's semantic models)
    coarse_each_layer: bool = True
    num_points: int = 2048
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    subdivision_steps: int = 2
    # mmsegmentation: 8196; detectron2: 8192
    subdivision_num_points: int = 8196

    def __post_init__(self) -> None:
        for name in ("channels", "num_layers", "num_points", "subdivision_num_points"):
            _require(getattr(self, name) >= 1, f"model.point_head.{name} must be at least 1")
        _require(
            self.subdivision_steps >= 0, "model.point_head.subdivision_steps must be at least 0"
        )
        _require(self.oversample_ratio >= 1, "model.point_head.oversample_ratio must be at least 1")
        _require(
            0 <= self.importance_sample_ratio <= 1,
            "model.point_head.importance_sample_ratio must be within 0 and 1",
        )


@dataclass
class ModelConfig:
    """ResNetV1c + FPN + Semantic-FPN coarse head + point head."""

    depth: Literal[18, 34, 50, 101] = 50
    # 1 means binary: one logit, positive where the object is
    num_classes: int = 19
    # a backbone checkpoint file, or null to start from scratch
    pretrained: str | None = None
    base_channels: int = 64
    fpn_channels: int = 256
    head_channels: int = 128
    # null gives plain Semantic FPN
    point_head: PointHeadConfig | None = field(default_factory=PointHeadConfig)
    # "all": losses are averaged over all pixels, ignored ones counted (mmsegmentation);
    # "valid": over the pixels that are not ignored (detectron2)
    loss_average: Literal["all", "valid"] = "all"
    # how often the coarse head's BatchNorm statistics move in one training step with a point head:
    # mmsegmentation runs that head twice, so 2; detectron2 once
    coarse_bn_updates: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        for name in ("num_classes", "base_channels", "fpn_channels", "head_channels"):
            _require(getattr(self, name) >= 1, f"model.{name} must be at least 1")


@dataclass
class DataConfig:
    """A data set and its training and test pipelines; fields named *_size are [height, width]."""

    dataset: Literal["cityscapes", "ade20k", "folder", "shapes"] = "shapes"
    root: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    # a folder: the training split is decoded into it once and read from there; null: decoded anew
    # each time. Of sets of files only; about height x width x 4 bytes a picture
    cache: str | None = None
    # the cached pictures are copied to the memory of the device that trains, of each one where
    # there are several, and cropped and distorted there; the crops are the same to the last bit if
    # the processor has AVX2, else some grey levels are others, as OpenCV's own are there
    resident: bool = False
    # every n-th image of train_split is kept out of training, as the split "holdout"; 0: none
    holdout_every: int = 0
    # base scale: images are resized, keeping their ratio, to fit this longer and shorter side
    scale: tuple[int, int] = (2048, 1024)
    # random resize: the base scale is multiplied by a factor drawn from this range
    scale_range: tuple[float, float] = (0.5, 2.0)
    crop_size: tuple[int, int] = (512, 1024)
    # a crop is drawn again, up to ten times, while one class fills more than this share of it
    crop_max_share: float = 0.75
    flip_probability: float = 0.5
    photometric: bool = True
    # test images are resized to `scale` (keep ratio); null keeps them at their own size
    test_scale: tuple[int, int] | None = (2048, 1024)
    # "shapes" only: the size of its images and how many a split has
    shapes_size: tuple[int, int] = (128, 128)
    shapes_train_images: int = 20000
    shapes_eval_images: int = 200
    workers: int = 2

    def __post_init__(self) -> None:
        sizes = {"scale": self.scale, "crop_size": self.crop_size, "shapes_size": self.shapes_size}
        if self.test_scale is not None:
            sizes["test_scale"] = self.test_scale
        for name, size in sizes.items():
            _require(min(size) >= 1, f"data.{name} must be two positive numbers, not {list(size)}")
        low, high = self.scale_range
        _require(0 < low <= high, f"data.scale_range must be 0 < low <= high, not {[low, high]}")
        _require(0 < self.crop_max_share <= 1, "data.crop_max_share must be within 0 and 1")
        _require(0 <= self.flip_probability <= 1, "data.flip_probability must be within 0 and 1")
        for name in ("shapes_train_images", "shapes_eval_images"):
            _require(getattr(self, name) >= 1, f"data.{name} must be at least 1")
        _require(
            self.holdout_every == 0 or self.holdout_every >= 2,
            "data.holdout_every must be 0 or at least 2",
        )
        _require(
            self.cache is not None or not self.resident,
            "data.resident needs data.cache, the folder that the pictures are decoded into",
        )
        _require(self.workers >= 0, "data.workers must be at least 0")


@dataclass
class TrainConfig:
    """SGD with the poly schedule as mmsegmentation 0.x ran it."""

    iterations: int = 80000
    # in all: over the GPUs and over the parts that `accumulate` cuts it into
    batch_size: int = 8
    # a batch in this many parts, one after the other, for a small GPU; BatchNorm sees the parts
    accumulate: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    min_lr: float = 1e-4
    warmup_iterations: int = 200
    warmup_ratio: float = 0.1
    seed: int = 0
    device: str = "auto"
    amp: bool = False
    compile: bool = False
    channels_last: bool = False
    # fp32 convolutions and products in TF32, with 10 bits of fraction; the published runs had none
    tf32: bool = False
    # the same numbers again from the same machine, to the last bit; slower on a GPU
    deterministic: bool = False
    # steps whose gradients are not finite are skipped; more than this many end the run
    max_skipped: int = 10
    log_every: int = 50
    eval_every: int = 8000
    eval_images: int | None = None
    checkpoint_every: int = 8000
    # last.pth, last-1.pth, ...; best.pth is kept besides
    keep_checkpoints: int = 2
    # pictures of this many evaluation images go to TensorBoard
    pictures: int = 4
    resume: str | None = None
    run_dir: str | None = None

    def __post_init__(self) -> None:
        at_least_1 = ("iterations", "batch_size", "accumulate", "keep_checkpoints")
        for name in (*at_least_1, "log_every", "eval_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1")
        _require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} must be divisible by train.accumulate "
            f"{self.accumulate}",
        )
        _require(self.lr > 0, "train.lr must be positive")
        _require(0 <= self.min_lr <= self.lr, "train.min_lr must be within 0 and train.lr")
        at_least_0 = ("seed", "warmup_iterations", "weight_decay", "power", "pictures")
        for name in (*at_least_0, "max_skipped"):
            _require(getattr(self, name) >= 0, f"train.{name} must be at least 0")
        _require(0 <= self.momentum < 1, "train.momentum must be at least 0 and below 1")
        _require(0 <= self.warmup_ratio <= 1, "train.warmup_ratio must be within 0 and 1")
        _require(
            self.eval_images is None or self.eval_images >= 1,
            "train.eval_images must be at least 1, or null for all",
        )


@dataclass
class Config:
    """One experiment; `published` is for people: the numbers it reproduces, and their source."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    published: dict[str, str] = field(default_factory=dict)


def from_dict(cls: type[Any], mapping: Mapping[str, Any], where: str = "") -> Any:
    """Builds the dataclass `cls` from plain containers, checking names and types all the way down.

    Args:
        cls: one of the configuration dataclasses.
        mapping: field names to values, as YAML gives them; absent fields keep their defaults.
        where: the key that `mapping` was found under, such as "model", for messages.

    Raises:
        ConfigError: unknown key (the nearest valid one is named), wrong type, or a value out of
            range.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or 'the configuration'} must be a mapping, not {mapping!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ConfigError(f"unknown key '{path}'{_nearest(str(key), hints, where)}")
        values[key] = _coerce(value, hints[key], path)
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain containers that `from_dict` reads back: tuples become lists, as in YAML."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def load_config(
    source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()
) -> Config:
    """Reads a configuration and applies `key=value` overrides on top.

    Args:
        source: a YAML file, the name of a bundled configuration ("cityscapes_r50"), a mapping, or a
            Config, which is copied.
        overrides: such as "train.lr=0.02", "data.crop_size=[256,512]", "model.point_head=null"; the
            value is read as YAML, and a key's last name is enough where it is unique ("lr=0.02").

    Raises:
        ConfigError: naming the file or override, the key and the rule.
        FileNotFoundError: no such file and no bundled configuration of that name.
    """
    if isinstance(source, Config):
        tree, origin = to_dict(source), ""
    elif isinstance(source, Mapping):
        tree, origin = dict(source), ""
    else:
        path = find_config(source)
        tree, origin = _read_yaml(path), f"{path}: "
    try:
        # checked before the overrides too, so that an error is blamed on where it stands
        tree = to_dict(from_dict(Config, tree))
    except ConfigError as error:
        raise ConfigError(f"{origin}{error}") from None
    for override in overrides:
        _apply(tree, override)
    return from_dict(Config, tree)


def save_config(config: Config, path: str | Path) -> None:
    """Writes every field, defaults too, as YAML that `load_config` reads back."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def bundled_configs() -> dict[str, Path]:
    """The configurations that come with the project, by name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """The file of that path or, failing that, the bundled configuration of that name."""
    path, bundled = Path(name), bundled_configs()
    if path.is_file():
        return path
    if str(name) in bundled:
        return bundled[str(name)]
    raise FileNotFoundError(
        f"no configuration file '{name}', and no bundled one of that name; "
        f"bundled are {', '.join(bundled)}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys model, data and train")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one "a.b.c=value" in the tree of a checked configuration."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override '{override}' must look like key=value, such as train.lr=0.02")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not YAML: {error}") from None
    *parents, leaf = _full_key(key.strip(), tree, override).split(".")
    node, where, cls = tree, "", Config
    for name in parents:
        cls = _dataclass_of(cls, name)
        if name not in node or cls is None:
            raise ConfigError(
                f"override '{override}': unknown key '{key}'{_nearest(name, node, where)}"
            )
        if node[name] is None:
            # such as model.point_head=null earlier: start again from its defaults
            node[name] = to_dict(cls())
        node, where = node[name], f"{where}.{name}" if where else name
    if leaf not in node:
        raise ConfigError(
            f"override '{override}': unknown key '{key}'{_nearest(leaf, node, where)}"
        )
    node[leaf] = value
    try:
        # complete again, so that a later override finds what a mapping given as value left out
        tree.update(to_dict(from_dict(Config, tree)))
    except ConfigError as error:
        raise ConfigError(f"override '{override}': {error}") from None


def _full_key(key: str, tree: Mapping[str, Any], override: str) -> str:
    """Completes a last name, such as "resume", where only one section has it."""
    if "." in key or key in tree:
        return key
    paths = list(_leaves(tree))
    found = [path for path in paths if path.rpartition(".")[2] == key]
    if len(found) > 1:
        raise ConfigError(f"override '{override}': '{key}' could be {' or '.join(found)}")
    if not found:
        names = {path.rpartition(".")[2]: path for path in paths} | {name: name for name in tree}
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"did you mean '{names[close[0]]}'?" if close else f"sections are {', '.join(tree)}"
        raise ConfigError(f"override '{override}': unknown key '{key}'; {hint}")
    return found[0]


def _leaves(tree: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """The full keys below the sections, "model.depth" and so on."""
    for name, child in tree.items():
        if where:
            yield f"{where}.{name}"
        if isinstance(child, Mapping) and name != "published":  # whose keys are free
            yield from _leaves(child, f"{where}.{name}" if where else name)


def _dataclass_of(cls: Any, name: str) -> Any:
    """The dataclass that field `name` of dataclass `cls` holds, or None."""
    if not dataclasses.is_dataclass(cls):
        return None
    hint = typing.get_type_hints(cls).get(name)
    return next(
        (kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None
    )


def _nearest(name: str, valid: Iterable[str], where: str) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    if close:
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; valid are {', '.join(prefix + option for option in valid)}"


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the annotation wants it; numbers become floats, nothing else is converted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        return _coerce(value, inner[0], path)
    if origin is Literal:
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise ConfigError(f"{path} must be one of {', '.join(map(str, args))}, not {value!r}")
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ConfigError(f"{path} must be a list of {len(args)} values, not {value!r}")
        return tuple(
            _coerce(item, arg, f"{path}[{i}]")
            for i, (item, arg) in enumerate(zip(value, args, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a mapping, not {value!r}")
        return {
            _coerce(k, args[0], path): _coerce(v, args[1], f"{path}.{k}") for k, v in value.items()
        }
    if hint is float and (type(value) in (int, float) or _is_number(value)):
        number = float(value)  # of text too: YAML 1.1 reads 1e-4, without a dot, as text
        if not math.isfinite(number):
            raise ConfigError(f"{path} must be a finite number, not {value!r}")
        return number
    if type(value) is not hint:
        raise ConfigError(f"{path} must be {_TYPE_NAMES.get(hint, hint)}, not {value!r}")
    return value


def _is_number(value: Any) -> bool:
    """Whether it is text that reads as a number."""
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
