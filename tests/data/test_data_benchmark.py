"""The benchmark of the loader: it runs, and what it measures on is what it says."""

import json

import numpy as np
import pytest

from benchmarks import data as bench
from pointrend_triton.config import DataConfig
from pointrend_triton.data import build_dataset


def test_pictures_of_the_size_of_cityscapes_are_a_data_set(tmp_path):
    bench.write_pictures(tmp_path, 2, (256, 512))
    dataset = build_dataset(DataConfig(dataset="folder", root=str(tmp_path)), "train")
    assert (len(dataset), len(dataset.classes)) == (2, 19)
    image, label = dataset.load(1)
    assert image.shape == (256, 512, 3)
    assert image.std() > 10
    assert len(np.unique(label)) > 3


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = tmp_path / "data.json"
    options = ["--workers", "0", "--seconds", "0.2", "--step-ms", "80", "--json", str(out)]
    assert bench.main(["--dataset", "shapes", *options]) == 0
    result = json.loads(out.read_text())
    assert result["needed"]["pictures_per_second"] == 100
    assert result["needed"]["source"] == "an estimate"
    assert [(row["path"], row["workers"]) for row in result["rows"]] == [
        ("published", 0),
        ("files", 0),
    ]
    for row in result["rows"]:
        assert row["pictures_per_second"] > 0
        assert row["cpu_ms"] == pytest.approx(row["cpu_ms_load"] + row["cpu_ms_transform"])
    assert len(result["loadavg_before"]) == 3
    assert "a training step needs 100 pictures/s" in capsys.readouterr().out


@pytest.mark.slow
def test_every_path_to_the_pictures_of_files(tmp_path):
    bench.write_pictures(tmp_path / "mine", 2, (256, 512))
    data = DataConfig(dataset="folder", root=str(tmp_path / "mine"), crop_size=(128, 192))
    data.scale = (512, 256)
    rows = list(bench.measure("mine", data, tmp_path / "cache", [0], 0.1))
    assert [row.path for row in rows] == ["published", "files", "cache", "resident"]
    assert all(row.pictures_per_second > 0 and row.cpu_ms_transform > 0 for row in rows)
    assert len(list((tmp_path / "cache").iterdir())) == 1
