"""The benchmark of a training step times what train.py does; and no iteration waits for the GPU."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

import train
from benchmarks import train_step
from benchmarks.survival import TINY
from pointrend_triton.config import load_config
from pointrend_triton.data import build_dataset, train_loader
from pointrend_triton.run import whole_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings_end_with_the_test():
    yield
    torch.use_deterministic_algorithms(False)


def test_quick(tmp_path, capsys):
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert train_step.main(options) == 0
    result = json.loads((tmp_path / "train_step_cpu.json").read_text())
    assert {"device", "commit", "date", "versions", "rates", "command"} <= result.keys()
    rows = result["rows"]
    assert [row["variant"] for row in rows] == [*("fp32", "bf16", "channels-last", "deterministic")]
    assert [reason.split(":")[0] for reason in result["left_out"]] == ["compiled", "kernels"]
    assert [row["settings"]["amp"] for row in rows] == [False, True, False, False]
    assert [row["settings"]["channels_last"] for row in rows] == [False, False, True, False]
    assert [row["settings"]["deterministic"] for row in rows] == [False, False, False, True]
    for row in rows:
        assert row["error"] is None and row["peak_memory_gb"] is None
        assert 0 < row["ms_p10"] <= row["ms_median"] <= row["ms_p90"]
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms_median"])
        rate = result["rates"]["matmul_tflop_per_s"]["bf16" if row["settings"]["amp"] else "fp32"]
        reached = result["tflop_per_iteration"] / row["ms_median"] * 1e3
        assert row["mfu_percent"] == pytest.approx(100 * reached / rate)
        assert len(row["losses"]) == 4
    assert rows[0]["loss_difference"] == 0 < rows[1]["loss_difference"] < 0.1
    assert (tmp_path / "train_step_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "channels-last" in capsys.readouterr().out


def test_the_losses_are_those_of_a_training(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    train.main([str(tmp_path / "tiny.yaml"), f"run_dir={tmp_path / 'run'}", "eval_every=100"])
    rows = [row for row in whole_rows(tmp_path / "run" / "metrics.csv") if row["loss"]]
    config = load_config(TINY)
    batches = train_step.drawn_batches(config, CPU, 8)
    iteration = train_step.make_iteration(config, batches, CPU)
    losses = [iteration(number).item() for number in range(8)]
    assert losses == [float(row["loss"]) for row in rows[:8]]


def test_flops_are_counted_for_the_whole_batch():
    config = load_config(TINY)
    batches = train_step.drawn_batches(config, CPU, 1)
    flops = train_step.count_flops(config, batches, CPU)
    wider = load_config(TINY, ["batch_size=4"])
    assert train_step.count_flops(wider, batches, CPU) == pytest.approx(2 * flops)
    # the first convolution: 32x32 positions, 3x3x3 inputs, 4 outputs; it needs no input gradient
    assert flops > 2 * 2 * 2 * 32 * 32 * 27 * 4


def test_a_variant_that_fails_is_reported(tmp_path, monkeypatch, capsys):
    original = train.backward

    def fails(loss_of, images, labels, settings):
        if settings.amp:
            raise ArithmeticError("no such type")
        return original(loss_of, images, labels, settings)

    monkeypatch.setattr(train, "backward", fails)
    assert train_step.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "train_step_cpu.json").read_text())["rows"]
    assert [row["error"] is None for row in rows] == [True, False, True, True]
    assert "failed: ArithmeticError: no such type" in capsys.readouterr().out


def test_a_gpu_runs_all_variants():
    rows, left_out = train_step.waterfall(torch.device("cuda"), quick=False)
    assert [row.variant for row in rows] == list(train_step.WATERFALL) and not left_out
    assert [row.settings["backend"] for row in rows] == ["reference"] * 4 + ["auto"] * 2
    for row, added in zip(rows[1:], list(train_step.WATERFALL.values())[1:], strict=True):
        before = rows[rows.index(row) - 1].settings
        assert row.settings == before | added != before


def test_a_cpu_never_compiles_in_bf16():
    rows, left_out = train_step.waterfall(CPU, quick=False)
    assert [row.variant for row in rows] == [v for v in train_step.WATERFALL if v != "kernels"]
    for row in rows[1:]:
        assert row.settings == rows[0].settings | train_step.WATERFALL[row.variant]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [[], ["amp=true", "channels_last=true"], ["amp=true", "compile=true"]]
)
def test_no_iteration_waits_for_the_gpu(overrides):
    """From the loader's batch to the step; only what is logged may wait."""
    device = torch.device("cuda")
    config = load_config(TINY, overrides)
    data = replace(config.data, workers=0)
    dataset = build_dataset(data, "train")
    loader = train_loader(dataset, data, config.train.batch_size, 0, 0, 12, device)
    batches = []
    iteration = train_step.make_iteration(config, batches, device)
    feed = iter(loader)
    try:
        for number in range(10):
            if number == 4:  # kernels have been compiled and tuned
                torch.cuda.set_sync_debug_mode("error")
            batches[:] = [next(feed)[:2]]
            iteration(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
