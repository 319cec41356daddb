"""Reading and writing of weights: what fits is loaded exactly, what does not is refused by name."""

import copy
import hashlib
import os
import pathlib
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pointrend_triton.checkpoint import (
    BACKBONES,
    PUBLISHED,
    CheckpointError,
    from_checkpoint,
    infer_model_config,
    load_backbone,
    load_checkpoint,
    missing_backbone_message,
    read_checkpoint,
    save_checkpoint,
)
from pointrend_triton.config import ModelConfig, PointHeadConfig, to_dict
from pointrend_triton.models import PointRend
from pointrend_triton.serialization import INERT_GLOBALS, Inert

FORMATS = ["zip", "legacy"]
CLASSES = ("road", "bed ", "car", "sky", "tree")
PALETTE = [[i, 2 * i, 255] for i in range(5)]
META_0X = {
    "mmseg_version": "0.5.0",
    "config": "raise SystemExit('run')",
    "CLASSES": CLASSES,
    "PALETTE": PALETTE,
    "iter": 80000,
    "epoch": 215,
}
META_1X = {
    "mmengine_version": "0.10.7",
    "cfg": "raise SystemExit('run')",
    "dataset_meta": {"classes": CLASSES, "palette": PALETTE, "label_map": None},
    "iter": 80000,
}


def tiny(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"depth": 18, "num_classes": 5, "base_channels": 4, "fpn_channels": 8}
    point_head = PointHeadConfig(channels=6)
    return ModelConfig(**{**sizes, "head_channels": 6, "point_head": point_head, **changes})


def drawn(config: ModelConfig | None = None) -> PointRend:
    """A model with no tensor left at its usual first value."""
    model = PointRend(config or tiny())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randint(1, 99, tensor.shape))
    return model


def write(path: Path, content: Any, file_format: str = "zip") -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=file_format == "zip")
    return path


def own_file(model: PointRend, **meta: Any) -> dict[str, Any]:
    meta = {"model": to_dict(model.config), **meta}
    weights = model.state_dict()
    return {"format": "pointrend_triton", "version": 1, "state_dict": weights, "meta": meta}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    found = module.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


def refusal(action: Callable[[], Any], path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("depth", "tensors", "parameters"), [(50, 398, 28715119), (101, 704, 47707247)]
)
def test_names_and_shapes_are_those_of_the_published_files(depth, tensors, parameters):
    with torch.device("meta"):
        model = PointRend(ModelConfig(depth=depth, num_classes=19))
    weights = model.state_dict()
    assert len(weights) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = {
        "backbone.stem.6.weight": (64, 32, 3, 3),
        "backbone.stem.7.num_batches_tracked": (),
        "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        f"backbone.layer3.{22 if depth == 101 else 5}.conv3.weight": (1024, 256, 1, 1),
        "neck.lateral_convs.3.conv.weight": (256, 2048, 1, 1),
        "neck.fpn_convs.0.conv.bias": (256,),
        "decode_head.0.scale_heads.3.4.conv.weight": (128, 128, 3, 3),
        "decode_head.0.scale_heads.2.2.bn.running_var": (128,),
        "decode_head.0.conv_seg.weight": (19, 128, 1, 1),
        "decode_head.1.fcs.2.conv.weight": (256, 275, 1),
        "decode_head.1.fc_seg.weight": (19, 275, 1),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    assert infer_model_config(weights) == ModelConfig(depth=depth, num_classes=19)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("mmsegmentation 0.x", {"meta": META_0X, "optimizer": {"state": {}}}),
        ("mmsegmentation 1.x", {"meta": META_1X, "message_hub": {}}),
        ("pointrend_triton", None),
    ],
)
def test_a_checkpoint_gives_its_model_back(tmp_path, file_format, kind, extra):
    model = drawn()
    if extra is None:
        names = {"classes": list(CLASSES), "palette": PALETTE}
        content = own_file(model, iteration=80000, **names) | {"optimizer": {}}
    else:
        content = {"state_dict": model.state_dict(), **extra}
    path = write(tmp_path / "file.pth", content, file_format)

    found = from_checkpoint(path)
    assert_same(found, model.state_dict())
    assert found.config == model.config and not found.training
    assert found.classes == CLASSES and found.palette == PALETTE

    report = load_checkpoint(PointRend(tiny()), path)
    assert (report.format, report.iteration, report.missing) == (kind, 80000, ())
    assert set(report.loaded) == set(model.state_dict()) and len(report.ignored) == 1
    for part in (str(path), kind, "iteration 80000", "200 tensors", "5 class names", "not weights"):
        assert part in str(report)


def test_a_file_that_was_read_is_not_read_again(tmp_path):
    model = drawn()
    content = read_checkpoint(write(tmp_path / "file.pth", own_file(model)))
    assert_same(from_checkpoint(tmp_path / "gone.pth", content), model.state_dict())


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def mmengine_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What mmengine's runner leaves beside the weights, without mmengine."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.__dict__.update(_log_history=np.arange(3.0), _statistics_methods={"min": self.min})

        def min(self) -> None:
            raise AssertionError("text of the file was run")

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    module = types.ModuleType(HistoryBuffer.__module__)
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hub = {"log_scalars": {"loss": HistoryBuffer()}, "runtime_info": {"eta": np.float64(1)}}
    return {"state_dict": drawn().state_dict(), "meta": META_1X, "message_hub": hub}


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("storage", ["ctorch\n", "ctorch.cuda\n"])
def test_logs_of_mmengine_are_read_as_nothing(tmp_path, monkeypatch, core, storage):
    path = write(tmp_path / "file.pth", mmengine_file(monkeypatch), "legacy")
    data = re.sub(rb"numpy\._?core\.multiarray", f"{core}.multiarray".encode(), path.read_bytes())
    path.write_bytes(data.replace(b"ctorch\nFloatStorage", storage.encode() + b"FloatStorage"))
    hub = read_checkpoint(path)["message_hub"]
    for value in (hub["log_scalars"]["loss"], hub["runtime_info"]["eta"]):
        assert type(value) is Inert
    assert from_checkpoint(path).classes == CLASSES


def test_stand_ins_are_independent_of_what_the_process_allows(tmp_path, monkeypatch):
    path = write(tmp_path / "file.pth", mmengine_file(monkeypatch))
    before = torch.serialization.get_safe_globals()
    allowed = [pathlib.PurePosixPath, *((pytest.fail, name) for name in INERT_GLOBALS)]
    with torch.serialization.safe_globals(allowed):
        assert type(read_checkpoint(path)["message_hub"]["runtime_info"]["eta"]) is Inert
        assert set(torch.serialization.get_safe_globals()) >= set(allowed)
        content = {"state_dict": {"a": torch.ones(1)}, "where": pathlib.PurePosixPath("x")}
        write(path, content)
        assert "PurePosixPath" in refusal(lambda: read_checkpoint(path), path)
    assert set(torch.serialization.get_safe_globals()) == set(before)


HOSTILE = [
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "torch.hub.load",
    "torch.storage._load_from_bytes",
    "torch._utils._rebuild_sparse_tensor",
    "numpy.fromfile",
    "pathlib.PosixPath",
    "mmengine.config.config.Config",
]


def hostile_pickle(name: str, called: bool, protocol: bytes = b"\x80\x02") -> bytes:
    module, _, function = name.rpartition(".")
    reference = f"c{module}\n{function}\n".encode()
    return protocol + b"}X\x01\x00\x00\x00a" + reference + (b")R" if called else b"") + b"s."


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("called", [True, False], ids=["called", "named"])
@pytest.mark.parametrize("container", ["zip", "zip beside", "legacy", "pickle"])
def test_any_other_global_is_refused_by_name(tmp_path, name, called, container):
    path, hostile = tmp_path / "file.pth", hostile_pickle(name, called)
    if container == "pickle":
        path.write_bytes(hostile)
    elif container == "legacy":
        write(path, {}, "legacy")
        data, empty = path.read_bytes(), pickle.dumps({}, 2)
        assert data.count(empty) == 1
        path.write_bytes(data.replace(empty, hostile))
    else:
        write(path, {"state_dict": {"a": torch.ones(1)}})
        with zipfile.ZipFile(path) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        (own,) = (member for member in members if member.endswith("data.pkl"))
        members[own if container == "zip" else own.replace("data", "other")] = hostile
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    assert name in refusal(lambda: read_checkpoint(path), path)


@pytest.mark.parametrize(
    ("file_format", "protocol"), [("zip", 2), ("legacy", 2), ("zip", 4)], ids=str
)
def test_a_hostile_object_deep_inside_is_never_run(tmp_path, file_format, protocol):
    marker = tmp_path / "marker"
    evil = Call(os.mkdir, str(marker))
    arrays = np.array([evil], dtype=object)
    content = {"state_dict": drawn().state_dict(), "meta": {"PALETTE": [(evil, arrays)]}}
    path = tmp_path / "file.pth"
    zipped = file_format == "zip"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert "mkdir" in refusal(lambda: read_checkpoint(path), path)
    assert not marker.exists()
    assert "mkdir" in refusal(lambda: from_checkpoint(path), path)
    assert not marker.exists()


def test_what_is_not_needed_is_dropped_unseen(tmp_path):
    # real ones would fail at the missing attribute and keep the list
    content = {"a": Call(getattr, Call(np.dtype, "O"), "none"), "b": np.array([[1]], dtype=object)}
    found = read_checkpoint(write(tmp_path / "file.pth", content))
    assert [type(value) for value in found.values()] == [Inert, Inert]
    assert not hasattr(found["b"], "__dict__")


NO_CHECKPOINTS = {
    "empty": (b"", "is empty"),
    "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(99), "not a checkpoint"),
    "text": (b"classes: 19\nfoo\n.", "not a checkpoint"),
    "web page": (b"<!DOCTYPE html><title>404 Not Found</title>", "<!DOCTYPE html"),
    "pickle": (pickle.dumps(3, 2), "not a checkpoint"),
    "pickle 5": (pickle.dumps({"a": 3}, 5), "not a checkpoint"),
    "half a pickle": (pickle.dumps({"a": "text"}, 2)[:-4], "truncated or damaged"),
    "half a zip": (b"PK\x03\x04" + bytes(50), "truncated or damaged"),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_told(tmp_path, kind):
    path = tmp_path / "file.pth"
    data, part = NO_CHECKPOINTS[kind]
    path.write_bytes(data)
    assert part in refusal(lambda: read_checkpoint(path), path)


def test_files_that_cannot_be_opened(tmp_path):
    missing = tmp_path / "none.pth"
    assert "No such file" in refusal(lambda: read_checkpoint(missing), missing)
    assert "directory" in refusal(lambda: read_checkpoint(tmp_path), tmp_path)


def test_a_zip_of_something_else(tmp_path):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one that torch.save wrote" in refusal(lambda: read_checkpoint(path), path)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (3, "holds int"),
        ([torch.ones(1)], "holds list"),
        ({"epoch": 3, "model": {}}, "no tensors, its entries are epoch, model"),
        ({"state_dict": {}, "meta": {}}, "no tensors"),
        ({"state_dict": {"a": torch.ones(1), "b": 3}}, "none: b"),
    ],
)
def test_contents_without_weights(tmp_path, file_format, content, part):
    path = write(tmp_path / "file.pth", content, file_format)
    assert part in refusal(lambda: from_checkpoint(path), path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path, file_format):
    path = write(tmp_path / "whole.pth", own_file(drawn()), file_format)
    data, cut = path.read_bytes(), tmp_path / "cut.pth"
    ends = {*range(0, 40), *range(40, len(data), len(data) // 60), len(data) - 9, len(data) - 1}
    for end in sorted(ends):
        cut.write_bytes(data[:end])
        refusal(lambda: read_checkpoint(cut), cut)
    cut.write_bytes(data)
    read_checkpoint(cut)


def test_a_hash_in_the_name_is_checked(tmp_path):
    path = write(tmp_path / "file.pth", own_file(drawn()))
    prefix = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    other = f"{int(prefix, 16) ^ 1:08x}"
    good = path.rename(tmp_path / f"r50-{prefix}.pth")
    read_checkpoint(good)
    bad = good.rename(tmp_path / f"r50-{other}.pth")
    message = refusal(lambda: read_checkpoint(bad), bad)
    assert f"begins with {other}, but that is {prefix}" in message
    # seven digits, or digits elsewhere, are no promise
    read_checkpoint(bad.rename(tmp_path / f"r50-{other}-iter-0000800.pth"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 7}, "the file is R-18 with 5 classes, the model is R-18 with 7 classes"),
        ({"depth": 34}, "the file is R-18 with 5 classes, the model is R-34 with 5 classes"),
        ({"depth": 50}, "the model is R-50 with 5 classes"),
        ({"point_head": None}, "the model is R-18 with 5 classes and no point head"),
        ({"head_channels": 7}, "conv.weight is (6, 8, 3, 3) in the file, (7, 8, 3, 3) in the"),
        ({"point_head": PointHeadConfig(channels=6, coarse_each_layer=False)}, "(6, 6, 1) in the"),
    ],
)
def test_another_model_is_refused_and_left_alone(tmp_path, changes, words):
    content = {"state_dict": drawn().state_dict(), "meta": META_0X}
    path = write(tmp_path / "file.pth", content)
    model = PointRend(tiny(**changes))
    before = snapshot(model)
    assert words in refusal(lambda: load_checkpoint(model, path), path)
    assert_same(model, before)
    assert model.classes is None and model.palette is None


@pytest.mark.parametrize("fault", ["lacks", "has", "integer", "twice"])
def test_every_tensor_is_accounted_for(tmp_path, fault):
    weights = dict(drawn().state_dict())
    # the last one in the file: all others would fit
    name = "decode_head.1.fc_seg.bias"
    if fault == "lacks":
        del weights[name]
    elif fault == "has":
        name = "auxiliary_head.conv_seg.weight"
        weights[name] = torch.ones(1)
    elif fault == "integer":
        weights[name] = weights[name].long()
    else:
        weights[f"module.{name}"] = weights[name]
    path = write(tmp_path / "file.pth", {"state_dict": weights})
    model = PointRend(tiny())
    before = snapshot(model)
    assert name in refusal(lambda: load_checkpoint(model, path), path)
    assert_same(model, before)


def test_only_batch_counters_may_be_missing(tmp_path):
    weights = drawn().state_dict()
    counters = {name for name in weights if name.endswith("num_batches_tracked")}
    kept = {f"module.{name}": weights[name] for name in weights if name not in counters}
    model = PointRend(tiny())
    report = load_checkpoint(model, write(tmp_path / "file.pth", kept))
    assert set(report.missing) == counters and report.format == "state dict"
    assert f"and {len(counters) - 4} more" in str(report)
    for name, tensor in model.state_dict().items():
        expected = torch.zeros_like(tensor) if name in counters else weights[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)


def test_semantic_fpn(tmp_path):
    model = drawn(tiny(point_head=None))
    weights = {
        n.replace("decode_head.0.", "decode_head."): t for n, t in model.state_dict().items()
    }
    assert "decode_head.conv_seg.weight" in weights
    found = from_checkpoint(write(tmp_path / "file.pth", {"state_dict": weights, "meta": META_0X}))
    assert found.config.point_head is None
    assert_same(found, model.state_dict())


@pytest.mark.parametrize(
    ("meta", "classes", "palette"),
    [
        ({"CLASSES": CLASSES[:4], "PALETTE": PALETTE}, None, PALETTE),
        ({"CLASSES": [*CLASSES[:4], 5], "PALETTE": PALETTE[:4]}, None, None),
        ({"CLASSES": [*CLASSES[:4], "\x1b[2J"]}, None, None),
        ({"CLASSES": "abcde", "PALETTE": [*PALETTE[:4], [0, 0, 256]]}, None, None),
        ({"classes": list(CLASSES), "palette": [*PALETTE[:4], [0, 0]]}, CLASSES, None),
        ({"classes": CLASSES, "palette": [*PALETTE[:4], (0, 0, True)]}, CLASSES, None),
        ({"dataset_meta": {"CLASSES": CLASSES, "PALETTE": 3}}, CLASSES, None),
        ({"dataset_meta": [CLASSES], "iter": "3"}, None, None),
        (None, None, None),
    ],
)
def test_names_and_colours_that_do_not_fit_are_left_out(tmp_path, meta, classes, palette):
    path = write(tmp_path / "file.pth", {"state_dict": drawn().state_dict(), "meta": meta})
    model = from_checkpoint(path)
    assert (model.classes, model.palette) == (classes, palette)
    model.classes, model.palette = ("kept",) * 5, [[0, 0, 0]] * 5
    report = load_checkpoint(model, path)
    assert (report.classes, report.palette, report.iteration) == (classes, palette, None)
    assert model.classes == (classes or ("kept",) * 5)


def test_one_logit_names_two_classes(tmp_path):
    content = {
        "state_dict": drawn(tiny(num_classes=1)).state_dict(),
        "meta": {"CLASSES": ("no", "yes")},
    }
    assert from_checkpoint(write(tmp_path / "file.pth", content)).classes == ("no", "yes")


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("each", [True, False])
def test_the_configuration_is_read_off_the_tensors(depth, layers, each):
    point_head = PointHeadConfig(channels=10, num_layers=layers, coarse_each_layer=each)
    config = tiny(depth=depth, num_classes=layers, point_head=point_head)
    with torch.device("meta"):
        weights = PointRend(config).state_dict()
    assert infer_model_config(weights) == config


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda w: w.pop("backbone.layer3.1.conv1.weight"), r"\(2, 2, 1, 2\) basic blocks"),
        (lambda w: w.pop("decode_head.0.conv_seg.weight"), "no tensor decode_head.0.conv_seg"),
        (lambda w: w.update({"decode_head.1.fc_seg.weight": torch.ones(5, 9, 1)}), "6 or 11"),
        (lambda w: w.update({"decode_head.1.fc_seg.weight": torch.ones(5, 9)}), "3 dimensions"),
        (lambda w: w.update({"backbone.conv1.weight": torch.ones(8, 3, 7, 7)}), "7x7 convolution"),
    ],
)
def test_tensors_of_no_known_model(tmp_path, change, part):
    weights = dict(drawn().state_dict())
    change(weights)
    path = write(tmp_path / "file.pth", {"state_dict": weights})
    assert re.search(part, refusal(lambda: from_checkpoint(path), path))


def test_an_own_file_brings_its_settings(tmp_path):
    point_head = PointHeadConfig(channels=6, subdivision_num_points=99, subdivision_steps=3)
    model = drawn(tiny(point_head=point_head, pretrained="gone.pth", loss_average="valid"))
    save_checkpoint(tmp_path / "file.pth", own_file(model))
    config = from_checkpoint(tmp_path / "file.pth").config
    assert config.point_head == point_head and config.loss_average == "valid"
    assert config.pretrained is None


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_classes": 6}, "meta says num_classes 6, its tensors say 5"),
        ({"point_head": None}, "meta says point_head.channels None, its tensors say 6"),
        ({"dept": 18}, "model.dept"),
        ({"depth": "18"}, "model.depth"),
        ({"point_head": {"channels": torch.ones(2)}}, "model.point_head.channels"),
    ],
)
def test_an_own_file_that_contradicts_itself(tmp_path, change, part):
    content = own_file(drawn())
    content["meta"]["model"].update(change)
    path = write(tmp_path / "file.pth", content)
    assert part in refusal(lambda: from_checkpoint(path), path)


def test_an_own_file_of_another_version(tmp_path):
    path = write(tmp_path / "file.pth", own_file(drawn()) | {"version": 2})
    assert "version 2" in refusal(lambda: from_checkpoint(path), path)
    assert "version 2" in refusal(lambda: load_checkpoint(PointRend(tiny()), path), path)


def mmcv_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"fc.weight": torch.ones(10, 32), "fc.bias": torch.ones(10)}


def timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in mmcv_names(weights).items():
        module, _, leaf = name.rpartition(".")
        if module == "stem.7":
            module = "bn1"
        renamed[f"{module.replace('stem', 'conv1')}.{leaf}"] = tensor
    return renamed


@pytest.mark.parametrize(
    "wrap",
    [
        mmcv_names,
        timm_names,
        lambda weights: {"state_dict": mmcv_names(weights), "meta": {}},
        lambda weights: {"state_dict": {f"module.backbone.{n}": t for n, t in weights.items()}},
        lambda weights: (
            own_file(drawn())
            | {
                "state_dict": drawn().state_dict()
                | {f"backbone.{n}": t for n, t in weights.items()}
            }
        ),
    ],
    ids=["mmcv", "timm", "wrapped", "prefixed", "segmenter"],
)
@pytest.mark.parametrize("file_format", FORMATS)
def test_backbone_files(tmp_path, wrap, file_format):
    weights = dict(drawn().backbone.state_dict())
    path = write(tmp_path / "file.pth", wrap(weights), file_format)
    model = PointRend(tiny())
    head = snapshot(model.decode_head)
    report = load_backbone(model.backbone, path)
    assert_same(model.backbone, weights)
    assert_same(model.decode_head, head)
    assert set(report.loaded) == set(weights) and report.format == "backbone"
    content = torch.load(path)
    total = content.get("state_dict", content)
    assert len(report.loaded) + len(report.ignored) == len(total)
    if wrap in (mmcv_names, timm_names):
        assert "ignored (ImageNet classifier): fc.weight, fc.bias" in str(report)


def test_backbones_that_do_not_fit(tmp_path):
    weights = dict(drawn().backbone.state_dict())
    path = write(tmp_path / "file.pth", mmcv_names(weights))
    backbone = PointRend(tiny(depth=34)).backbone
    before = snapshot(backbone)
    message = refusal(lambda: load_backbone(backbone, path), path)
    assert "the file is R-18, the model is R-34" in message and "layer1.2.conv1.weight" in message
    assert_same(backbone, before)

    # torchvision's names and stem
    write(path, {"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.weight": torch.ones(64)})
    message = refusal(lambda: load_backbone(backbone, path), path)
    assert "one 7x7 convolution" in message and BACKBONES[50].name in message


def test_save_and_read_back(tmp_path):
    path = tmp_path / "new" / "file.pth"
    rng = torch.random.get_rng_state()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9).state_dict()
    training = {"rng": rng, "optimizer": optimizer, "best": (1.5, None, True, b"x", -(2**70))}
    save_checkpoint(path, own_file(drawn()) | training)
    found = read_checkpoint(path)
    torch.testing.assert_close(found["rng"], rng)
    assert found["optimizer"] == optimizer and found["best"] == training["best"]
    assert listing(path.parent) == ["file.pth"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def listing(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file.pth"
    save_checkpoint(path, {"state_dict": {"a": torch.ones(3)}})
    old = path.read_bytes()
    monkeypatch.setattr(step, full_disk)
    new = {"state_dict": {"a": torch.zeros(3)}}
    assert "No space left" in refusal(lambda: save_checkpoint(path, new), path)
    assert path.read_bytes() == old
    assert listing(tmp_path) == ["file.pth"]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (np.float64(1), "numpy"),
        (np.ones(3), "numpy"),
        (Path("x"), "Path"),
        (lambda: 0, "lambda"),
        (os.system, "posix.system"),
        (tiny(), "ModelConfig"),
        (torch.ones(2).to_sparse(), "sparse"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, value, part):
    path = tmp_path / "file.pth"
    save_checkpoint(path, {"state_dict": {"a": torch.ones(3)}})
    old = path.read_bytes()
    assert part in refusal(lambda: save_checkpoint(path, {"meta": {"x": value}}), path)
    assert path.read_bytes() == old
    assert listing(tmp_path) == ["file.pth"]


def test_a_name_that_promises_a_hash_is_not_written(tmp_path):
    path = tmp_path / "iter-00008000.pth"
    assert "choose another" in refusal(lambda: save_checkpoint(path, own_file(drawn())), path)
    assert not path.exists()


def test_published_files():
    prefixes = {name: file.sha256_prefix for name, file in PUBLISHED.items()}
    assert prefixes == {
        "cityscapes_r50": "bb1ff523",
        "cityscapes_r101": "d0ca84be",
        "ade20k_r50": "ac3febf2",
        "ade20k_r101": "8834902a",
    }
    assert PUBLISHED["ade20k_r101"].url == (
        "https://download.openmmlab.com/mmsegmentation/v0.5/point_rend/pointrend_r101_512x512_160k_ade20k/"
        "pointrend_r101_512x512_160k_ade20k_20200808_030852-8834902a.pth"
    )
    assert {depth: file.sha256_prefix for depth, file in BACKBONES.items()} == {
        18: "b5776b93",
        50: "2cccc1ad",
        101: "e67eebb6",
    }


def test_what_to_do_about_a_missing_backbone(tmp_path):
    path = tmp_path / "weights" / "r101.pth"
    message = missing_backbone_message(path, 101)
    for part in (str(path), BACKBONES[101].url, "e67eebb6", f"into {path.parent}"):
        assert part in message
    assert "no ImageNet weights of ResNetV1c-34" in missing_backbone_message(path, 34)
