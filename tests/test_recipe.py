"""Single training steps from states of the real mmsegmentation 1.2.2, which tests/golden/recipe.py
wrote."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN_DIR = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN_DIR))

import recipe  # noqa: E402

import train  # noqa: E402
from pointrend_triton.config import load_config  # noqa: E402

STEPS = range(recipe.SMALL_STEPS)


@pytest.fixture(scope="module")
def golden():
    """What they had: states before and after the steps, the losses in them, learning rates."""
    side = recipe.Ours(load_config(recipe.SMALL))
    with np.load(recipe.GOLDEN) as file:
        states = [recipe.unpack(torch.from_numpy(state), side.state()) for state in file["states"]]
        losses = [dict(zip(recipe.LOSSES, row.tolist(), strict=True)) for row in file["losses"]]
        return [recipe.small_start(side), *states], losses, file["rates"].tolist()


def step_as_they_did(golden, step, *overrides):
    """How far our step, from their state, is from theirs: see recipe.MEASURES."""
    states, losses, _ = golden
    config = load_config(recipe.SMALL, overrides)
    ours = recipe.Ours(config)
    ours.load(states[step])
    out = ours.step(step, *recipe.small_step(config, step))
    return recipe.differences(states[step], (losses[step], states[step + 1]), (out, ours.state()))


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_theirs(golden, step):
    found = step_as_they_did(golden, step)
    assert not recipe.missed(found), found


def test_their_learning_rates_were_ours(golden):
    settings = load_config(recipe.SMALL).train
    assert golden[2] == pytest.approx([train.learning_rate(s, settings) for s in STEPS], rel=1e-12)


@pytest.mark.parametrize(
    ("override", "seen"),
    [
        ("lr=0.0501", {"weights", "all_weights"}),
        ("momentum=0.901", {"update", "weights", "all_weights"}),
        ("weight_decay=0", {"update", "weights", "all_weights"}),
        ("coarse_bn_updates=1", {"statistics", "batch_counts"}),
        ("loss_average=valid", {*recipe.LOSSES, "update", "weights", "all_weights"}),
    ],
)
def test_another_recipe_is_seen(golden, override, seen):
    assert set(recipe.missed(step_as_they_did(golden, 1, override))) == seen


def test_what_is_not_a_number_is_a_miss(golden):
    states, losses, _ = golden
    broken = {name: tensor.clone() for name, tensor in states[1].items()}
    broken["momentum/neck.fpn_convs.0.conv.weight"][0] = float("nan")
    broken["model/backbone.stem.1.running_var"][0] = float("nan")
    found = recipe.differences(states[0], (losses[0], states[1]), (losses[0], broken))
    assert recipe.missed(found) == ["update", "statistics"]


def test_outside_counts_and_measures():
    others = [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]
    figures = recipe.outside([2.0, 6.0, 1.0], others)  # on the average 2, 4, 3
    assert (figures["inside"], figures["iterations_outside"]) == ("101", 1)
    assert figures["farthest_outside"] == pytest.approx(1 / 4)
    assert figures["farthest_from_the_mean"] == pytest.approx(2 / 4)
    assert figures["largest_multiple_of_their_distance"] == pytest.approx(2, rel=1e-5)


def test_the_committed_figures():
    result = json.loads(recipe.RESULT.read_text())
    rows, free = result["steps"]["rows"], result["free"]
    assert len(rows) == 20
    assert not any(recipe.missed(row) for row in rows)
    figures = free["figures"]
    for name, row in recipe.band(free["losses"]).items():
        assert row == pytest.approx(figures[name]), name
    theirs = [row for name, row in figures.items() if name.startswith(recipe.THEIRS)]
    for key in ("iterations_outside", "farthest_outside", "largest_multiple_of_their_distance"):
        assert figures["ours"][key] <= max(row[key] for row in theirs), key
    # another recipe is told apart
    assert figures["ours, learning rate x 1.01"]["largest_multiple_of_their_distance"] > 1000
