"""Configurations: what can be written in them, and what is said about what cannot."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pointrend_triton import config as configuration
from pointrend_triton.config import (
    Config,
    ConfigError,
    ModelConfig,
    PointHeadConfig,
    TrainConfig,
    bundled_configs,
    find_config,
    from_dict,
    load_config,
    save_config,
    to_dict,
)


def refused(message, source=None, overrides=()):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(source or {}, overrides)


def test_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {depth: 18, point_head: {channels: 64}}\ndata: {crop_size: [96, 64]}\n")
    for source in (path, str(path)):
        config = load_config(source)
        assert config.model.depth == 18
        assert config.model.point_head == PointHeadConfig(channels=64)
        assert config.data.crop_size == (96, 64)
        assert config.train == TrainConfig()


def test_sources_are_copied():
    config = Config(published={"source": "a"})
    copy = load_config(config, ["depth=18"])
    copy.published["source"] = "b"
    assert config == Config(published={"source": "a"})
    mapping = {"model": {"point_head": {"channels": 64}}}
    load_config(mapping, ["num_layers=2"])
    assert mapping == {"model": {"point_head": {"channels": 64}}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=0.02", 0.02),
        ("train.lr=1e-3", 0.001),  # YAML 1.1 takes it for text
        ("train.lr=1", 1.0),
        ("model.depth=101", 101),
        ("data.crop_size=[256, 512]", (256, 512)),
        ("data.scale_range=[1, 1.5]", (1.0, 1.5)),
        ("data.test_scale=null", None),
        ("data.test_scale=[64,32]", (64, 32)),
        ("model.point_head=null", None),
        ("model.point_head={channels: 64}", PointHeadConfig(channels=64)),
        ("model.point_head.num_points=7", 7),
        ("train.amp=true", True),
        ("train.resume=runs/a=b.pth", "runs/a=b.pth"),
        ("train.resume=", None),
        ("data.root=a path", "a path"),
        (" train.seed =3", 3),
    ],
)
def test_override(override, expected):
    value = load_config({}, [override])
    for name in override.partition("=")[0].strip().split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_short_names():
    config = load_config("cityscapes_r50", ["lr=0.02", "num_points=9", "point_head.channels=8"][:2])
    assert config.train.lr == 0.02
    assert config.model.point_head.num_points == 9
    refused("unknown key 'point_head.channels'", overrides=["point_head.channels=8"])
    # free text has no names of fields
    refused("unknown key 'checkpoint'", "cityscapes_r50", ["checkpoint=a.pth"])
    refused("unknown key 'num_points'", overrides=["point_head=null", "num_points=9"])


def test_ambiguous_short_name():
    tree = {"train": {"size": 1}, "data": {"size": 2, "inner": {"size": 3}}, "seed": 4}
    with pytest.raises(ConfigError, match="'size' could be train.size or data.size or data.inner"):
        configuration._full_key("size", tree, "size=5")
    assert configuration._full_key("inner", tree, "") == "data.inner"
    assert configuration._full_key("seed", tree, "") == "seed"


def test_overrides_build_on_each_other():
    config = load_config(
        {},
        ["model.point_head=null", "model.point_head.channels=8", "model.point_head.num_layers=2"],
    )
    assert config.model.point_head == PointHeadConfig(channels=8, num_layers=2)
    config = load_config({}, ["model.point_head={channels: 8}", "num_layers=2", "num_layers=1"])
    assert config.model.point_head == PointHeadConfig(channels=8, num_layers=1)
    config = load_config({}, ["train={lr: 0.5}", "seed=3"])
    assert config.train == TrainConfig(lr=0.5, seed=3)


def test_unknown_keys_name_the_nearest():
    refused("unknown key 'modle'; did you mean 'model'?", {"modle": {}})
    refused("unknown key 'train.lrr'; did you mean 'train.lr'?", {"train": {"lrr": 1}})
    refused(
        "unknown key 'model.point_head.chanels'; did you mean 'model.point_head.channels'?",
        {"model": {"point_head": {"chanels": 1}}},
    )
    refused("unknown key 'qqq'; valid are model, data, train, published", {"qqq": 1})
    refused("unknown key '1'", {1: 2})
    refused(
        "override 'train.lrr=1': unknown key 'train.lrr'; did you mean 'train.lr'?",
        None,
        ["train.lrr=1"],
    )
    refused("did you mean 'model.point_head'?", None, ["model.pointhead.channels=3"])
    refused("unknown key 'model.depth.x'", None, ["model.depth.x=1"])
    refused("override 'lr' must look like key=value", None, ["lr"])
    refused("override 'lr=[1': the value is not YAML", None, ["lr=[1"])
    refused("unknown key ''", None, ["=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.iterations=1.5", "train.iterations must be a whole number, not 1.5"),
        ("train.iterations=true", "train.iterations must be a whole number, not True"),
        ("train.lr=fast", "train.lr must be a number, not 'fast'"),
        ("train.lr=true", "train.lr must be a number, not True"),
        ("train.lr=null", "train.lr must be a number, not None"),
        ("train.amp=1", "train.amp must be true or false, not 1"),
        ("data.root=5", "data.root must be text, not 5"),
        ("data.train_split=null", "data.train_split must be text, not None"),
        ("data.crop_size=512", "data.crop_size must be a list of 2 values, not 512"),
        ("data.crop_size=[1, 2, 3]", "data.crop_size must be a list of 2 values, not [1, 2, 3]"),
        ("data.crop_size=[1, x]", "data.crop_size[1] must be a whole number, not 'x'"),
        ("model.depth=52", "model.depth must be one of 18, 34, 50, 101, not 52"),
        ("model.depth=50.0", "model.depth must be one of 18, 34, 50, 101, not 50.0"),
        ("data.dataset=voc", "data.dataset must be one of cityscapes, ade20k, folder, shapes"),
        ("model=null", "model must be a mapping, not None"),
        ("model.point_head=3", "model.point_head must be a mapping, not 3"),
        ("published={a: 76.5}", "published.a must be text, not 76.5"),
    ],
)
def test_wrong_types(override, message):
    refused(f"override '{override}': {message}", None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_classes=0", "model.num_classes must be at least 1"),
        ("model.loss_average=some", "model.loss_average must be one of all, valid"),
        ("model.coarse_bn_updates=3", "model.coarse_bn_updates must be one of 1, 2"),
        ("model.point_head.num_points=0", "model.point_head.num_points must be at least 1"),
        ("model.point_head.subdivision_steps=-1", "subdivision_steps must be at least 0"),
        ("model.point_head.oversample_ratio=0.9", "oversample_ratio must be at least 1"),
        ("model.point_head.importance_sample_ratio=2", "must be within 0 and 1"),
        ("data.crop_size=[0, 4]", "data.crop_size must be two positive numbers, not [0, 4]"),
        ("data.test_scale=[4, -1]", "data.test_scale must be two positive numbers, not [4, -1]"),
        ("data.scale_range=[2, 1]", "data.scale_range must be 0 < low <= high, not [2.0, 1.0]"),
        ("data.crop_max_share=0", "data.crop_max_share must be within 0 and 1"),
        ("data.flip_probability=1.1", "data.flip_probability must be within 0 and 1"),
        ("data.holdout_every=1", "data.holdout_every must be 0 or at least 2"),
        ("data.workers=-1", "data.workers must be at least 0"),
        ("train.batch_size=0", "train.batch_size must be at least 1"),
        ("train.lr=0", "train.lr must be positive"),
        ("train.lr=nan", "train.lr must be a finite number"),
        ("train.min_lr=0.5", "train.min_lr must be within 0 and train.lr"),
    ],
)
def test_out_of_range(override, message):
    refused(message, None, [override])


def test_files_that_are_none(tmp_path):
    path = tmp_path / "bad.yaml"
    for text in (b"model: [", b"\xff\xfe\x00", b"a: !!python/object:os.system {}"):
        path.write_bytes(text)
        refused(f"{path} is not readable as YAML", path)
    for text in ("", "- 1", "just text"):
        path.write_text(text)
        refused(f"{path} must hold a mapping with the keys model, data and train", path)
    path.write_text("model: {dept: 50}")
    refused(f"{path}: unknown key 'model.dept'; did you mean 'model.depth'?", path)
    with pytest.raises(
        FileNotFoundError, match=r"no configuration file 'nowhere.yaml'.*bundled are "
    ):
        load_config("nowhere.yaml")


def test_file_goes_before_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("cityscapes_r50") == bundled_configs()["cityscapes_r50"]
    (tmp_path / "cityscapes_r50").write_text("model: {depth: 18}")
    assert load_config("cityscapes_r50").model.depth == 18


@pytest.mark.parametrize("name", bundled_configs())
def test_bundled(name, tmp_path):
    config = load_config(name)
    assert config == load_config(bundled_configs()[name])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    written = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert written == to_dict(config)
    assert set(written["train"]) == set(vars(TrainConfig())), "defaults are written, too"


CITYSCAPES = {
    "data.dataset": "cityscapes",
    "data.scale": (2048, 1024),
    "data.test_scale": (2048, 1024),
    "data.crop_size": (512, 1024),
    "model.num_classes": 19,
    "train.iterations": 80000,
    "train.batch_size": 8,
    "train.eval_every": 8000,
}
ADE20K = {
    "data.dataset": "ade20k",
    "data.scale": (2048, 512),
    "data.test_scale": (2048, 512),
    "data.crop_size": (512, 512),
    "model.num_classes": 150,
    "train.iterations": 160000,
    "train.batch_size": 16,
    "train.eval_every": 16000,
}
COMMON = {
    "model.base_channels": 64,
    "model.fpn_channels": 256,
    "model.head_channels": 128,
    "model.loss_average": "all",
    "model.coarse_bn_updates": 2,
    "model.point_head": PointHeadConfig(
        channels=256,
        num_layers=3,
        coarse_each_layer=True,
        num_points=2048,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        subdivision_steps=2,
        subdivision_num_points=8196,
    ),
    "data.scale_range": (0.5, 2.0),
    "data.crop_max_share": 0.75,
    "data.flip_probability": 0.5,
    "data.photometric": True,
    "train.lr": 0.01,
    "train.momentum": 0.9,
    "train.weight_decay": 5e-4,
    "train.power": 0.9,
    "train.min_lr": 1e-4,
    "train.warmup_iterations": 200,
    "train.warmup_ratio": 0.1,
    "train.log_every": 50,
}


@pytest.mark.parametrize(
    ("name", "values", "depth", "single", "multi"),
    [
        ("cityscapes_r50", CITYSCAPES, 50, "76.47", "78.13"),
        ("cityscapes_r101", CITYSCAPES, 101, "78.30", "79.97"),
        ("ade20k_r50", ADE20K, 50, "37.64", "39.17"),
        ("ade20k_r101", ADE20K, 101, "40.02", "41.60"),
    ],
)
def test_published_recipes(name, values, depth, single, multi):
    config = load_config(name)
    for key, expected in {**COMMON, **values, "model.depth": depth}.items():
        section, field = key.split(".")
        assert getattr(getattr(config, section), field) == expected, key
    assert f"resnet{depth}_v1c" in config.model.pretrained
    assert config.published["single_scale_miou"] == single
    assert config.published["multi_scale_flip_miou"] == multi
    assert f"r{depth}" in config.published["checkpoint"]


def test_from_dict_of_a_part():
    assert from_dict(ModelConfig, {"depth": 18}) == ModelConfig(depth=18)
    with pytest.raises(ConfigError, match="the configuration must be a mapping, not 5"):
        from_dict(ModelConfig, 5)


CONFIGS = st.builds(
    Config,
    model=st.builds(
        ModelConfig,
        depth=st.sampled_from([18, 34, 50, 101]),
        num_classes=st.integers(1, 999),
        pretrained=st.none() | st.text(),
        point_head=st.none() | st.builds(PointHeadConfig, oversample_ratio=st.floats(1, 9)),
    ),
    train=st.builds(
        TrainConfig,
        lr=st.floats(1e-3, 1e9),
        min_lr=st.floats(0, 1e-3),
        weight_decay=st.floats(0, 1),
        amp=st.booleans(),
        run_dir=st.none() | st.text(),
        device=st.text(),
    ),
    published=st.dictionaries(st.text(), st.text(), max_size=3),
)


@given(config=CONFIGS)
@settings(max_examples=25)
def test_round_trip(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert load_config(to_dict(config)) == config
    assert load_config(config) == config
