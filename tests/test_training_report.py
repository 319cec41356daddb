"""The report that a run leaves behind: figures of metrics.csv, and curves."""

import csv

import cv2
import pytest

from pointrend_triton.config import load_config, save_config
from pointrend_triton.run import COLUMNS, Record
from pointrend_triton.training_report import draw, main, read, smooth


@pytest.fixture
def run_dir(tmp_path):
    run_dir = tmp_path / "short"
    run_dir.mkdir()
    record = Record(run_dir, start=0)
    for iteration in (1, 2, 3):
        values = {
            "loss_coarse": 1 / iteration,
            "loss_point": 2.0,
            "images_per_second": 10.0 * iteration,
        }
        record.write(
            iteration, {**values, "data_wait": 0.25, "peak_memory_gb": iteration, "skipped": 1}
        )
    for iteration, miou in ((1, 40.0), (2, 70.123), (3, 60.5)):
        record.write(iteration, {"miou": miou, "boundary_iou": miou / 2})
    record.board.close()
    save_config(load_config("shapes_r18"), run_dir / "config.yaml")
    (run_dir / "environment.json").write_text('{"device": "a CPU", "versions": {"torch": "2.13"}}')
    return run_dir


def test_the_report_has_the_figures_of_the_run(run_dir, capsys):
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.md")
    report = (run_dir / "report.md").read_text()
    for line in (
        "| best | 2 | 70.12 | 35.06 |",
        "| last | 3 | 60.50 | 30.25 |",
        "| images per second, median | 20 |",
        "| waiting for data, % of the time, median | 25 |",
        "| peak memory, GB | 3 |",
        "| steps skipped, gradients not finite | 1 |",
        "| device | a CPU |",
    ):
        assert line in report
    assert cv2.imread(str(run_dir / "curves.png")).shape == (360, 1500, 3)


def test_curves_of_several_runs(run_dir, tmp_path):
    assert main([str(run_dir), str(run_dir), "--out", str(tmp_path / "both.png")]) == 0
    assert cv2.imread(str(tmp_path / "both.png")) is not None
    assert not (run_dir / "report.md").exists()


def test_a_run_that_has_only_begun(run_dir):
    with (run_dir / "metrics.csv").open("w", newline="") as file:
        csv.DictWriter(file, COLUMNS).writeheader()
    main([str(run_dir)])
    assert "| iterations | 0 of" in (run_dir / "report.md").read_text()


def test_values_that_are_not_finite_are_left_out(run_dir):
    rows = [{"iteration": "1", "loss_coarse": "nan"}, {"iteration": "2", "loss_coarse": "inf"}]
    assert draw({"x": rows}) == draw({"x": []})
    assert len(read(run_dir / "metrics.csv")) == 6


def test_smooth():
    assert smooth([1.0, 3.0, 5.0, 7.0], 2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_what_is_no_run_folder_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{tmp_path} is no run folder" in capsys.readouterr().err
