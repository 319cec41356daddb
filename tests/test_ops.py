"""Arguments that cannot be right are refused in words; who computes can be chosen."""

import re

import pytest
import torch

from pointrend_triton import ops

MAP = torch.zeros(2, 3, 4, 5)
ONE = torch.zeros(2, 1, 4, 5)
COORDS = torch.zeros(2, 6, 2)
WEIGHTS = [torch.zeros(7, 6), torch.zeros(3, 10, 1)]  # fine 3 + coarse 3, hidden 7 + coarse 3
BIASES = [torch.zeros(7), torch.zeros(3)]
DRAWS = (torch.zeros(2, 30, 2), torch.zeros(2, 3, 2))


def sample(input=MAP, coords=COORDS, **options):
    return ops.point_sample(input, coords, **options)


def select(logits=MAP, num_points=10, **options):
    return ops.select_uncertain_points(logits, num_points, **options)


def topk(uncertainty=ONE, k=3):
    return ops.topk_on_grid(uncertainty, k)


def upsample(logits=MAP, scale=2, **options):
    return ops.upsample_uncertainty(logits, scale, **options)


def head(fine_map=MAP, coarse_map=MAP, coords=COORDS, weights=WEIGHTS, biases=BIASES, **options):
    return ops.point_head(fine_map, coarse_map, coords, weights, biases, **options)


def decode(logits=MAP, **options):
    return ops.decode(logits, **options)


def refine(coarse=MAP, fine_map=MAP, weights=WEIGHTS, biases=BIASES, **options):
    return ops.refine(coarse, fine_map, weights, biases, **options)


def test_these_arguments_are_right():
    assert sample().shape == (2, 3, 6)
    assert select(draws=DRAWS).shape == (2, 10, 2)
    assert topk()[0].shape == (2, 3)
    assert upsample()[0].shape == (2, 1, 8, 10)
    assert head().shape == (2, 3, 6)
    assert decode(size=torch.Size([3, 3])).shape == (2, 3, 3)
    assert refine().shape == (2, 3, 16, 20)


MAP_ARGUMENTS = [
    (sample, "input"),
    (select, "logits"),
    (topk, "uncertainty"),
    (upsample, "logits"),
    (head, "fine_map"),
    (head, "coarse_map"),
    (decode, "logits"),
    (refine, "coarse"),
    (refine, "fine_map"),
]


@pytest.mark.parametrize(("call", "name"), MAP_ARGUMENTS)
def test_maps(call, name):
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, not list$"):
        call(**{name: [1.0]})
    with pytest.raises(ValueError, match=rf"^{name} must be \[N, C, H, W\], not \(2, 3, 4\)$"):
        call(**{name: torch.zeros(2, 3, 4)})
    with pytest.raises(ValueError, match=rf"^{name} must have at least one cell, not \(2, 1, 0, 3"):
        call(**{name: torch.zeros(2, 1, 0, 3)})
    wrong = torch.complex64 if name == "input" else torch.int64
    with pytest.raises(TypeError, match=rf"^{name} must be floating point.*, not {wrong}$"):
        call(**{name: torch.zeros(2, 1, 4, 5, dtype=wrong)})


@pytest.mark.parametrize(
    ("call", "name"),
    [(select, "logits"), (upsample, "logits"), (decode, "logits"), (refine, "coarse")],
)
def test_logits_have_a_class(call, name):
    with pytest.raises(ValueError, match=rf"^{name} must have at least one class, not \(2, 0, 4"):
        call(**{name: torch.zeros(2, 0, 4, 5)})


@pytest.mark.parametrize("call", [sample, head])
@pytest.mark.parametrize(
    ("coords", "error", "message"),
    [
        ([[0.5, 0.5]], TypeError, "coords must be a tensor, not list"),
        (torch.zeros(6, 2), ValueError, "coords must be [N, P, 2] or [N, Hg, Wg, 2], not (6, 2)"),
        (torch.zeros(2, 6, 3), ValueError, "[N, P, 2] or [N, Hg, Wg, 2], not (2, 6, 3)"),
        (torch.zeros(3, 6, 2), ValueError, "coords must be for 2 maps or shared (1), not for 3"),
        (COORDS.long(), TypeError, "coords must be floating point in [0, 1], not torch.int64"),
    ],
)
def test_coords(call, coords, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(coords=coords)


REFUSED = [
    (sample, {"mode": "bicubic"}, "mode must be one of bilinear, nearest, not 'bicubic'"),
    (sample, {"padding_mode": "reflection"}, "padding_mode must be one of zeros, border, not 'ref"),
    (select, {"num_points": 0}, "num_points must be at least 1, not 0"),
    (select, {"oversample_ratio": 0.5}, "oversample_ratio must be at least 1, not 0.5"),
    (select, {"oversample_ratio": float("nan")}, "oversample_ratio must be at least 1, not nan"),
    (select, {"importance_sample_ratio": 1.5}, "importance_sample_ratio must be within 0 and 1"),
    (select, {"importance_sample_ratio": -0.1}, "within 0 and 1, not -0.1"),
    (select, {"uncertainty": "entropy"}, "uncertainty must be one of top2_margin, neg_abs, not"),
    (select, {"draws": DRAWS[:1]}, "draws must be (candidates, random), not 1 tensors"),
    (select, {"draws": DRAWS[::-1]}, "the candidates must be (2, 30, 2), not (2, 3, 2)"),
    (select, {"draws": DRAWS[:1] * 2}, "the random must be (2, 3, 2), not (2, 30, 2)"),
    (topk, {"uncertainty": MAP}, "uncertainty must be [N, 1, H, W], not (2, 3, 4, 5)"),
    (topk, {"k": -1}, "k must be at least 0, not -1"),
    (upsample, {"scale": 0}, "scale must be at least 1, not 0"),
    (upsample, {"uncertainty": None}, "uncertainty must be one of top2_margin, neg_abs, not None"),
    (head, {"coords": torch.zeros(2, 3, 3, 2)}, "coords must be [N, P, 2], not (2, 3, 3, 2)"),
    (
        decode,
        {"image_size": (0, 5)},
        "image_size must be (height, width) of at least 1, not (0, 5)",
    ),
    (decode, {"size": (4, 5, 6)}, "size must be (height, width) of at least 1, not (4, 5, 6)"),
    (refine, {"size": (4, -5)}, "size must be (height, width) of at least 1, not (4, -5)"),
    (refine, {"uncertainty": torch.sum}, "uncertainty must be one of top2_margin, neg_abs, not"),
    (refine, {"output": "probabilities"}, "output must be one of logits, labels, not 'prob"),
    (refine, {"steps": -1}, "steps must be at least 0, not -1"),
    (refine, {"num_points": -1}, "num_points must be at least 0, not -1"),
]


@pytest.mark.parametrize(("call", "arguments", "message"), REFUSED)
def test_values(call, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**arguments)


@pytest.mark.parametrize(
    ("call", "name"),
    [(select, "num_points"), (topk, "k"), (upsample, "scale"), (refine, "steps")],
)
def test_counts_are_whole(call, name):
    with pytest.raises(TypeError, match=f"^{name} must be a whole number, not 1.5$"):
        call(**{name: 1.5})


@pytest.mark.parametrize("call", [head, refine])
@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({"weights": []}, ValueError, "as many, and at least one, not 0 and 2"),
        ({"weights": [], "biases": []}, ValueError, "as many, and at least one, not 0 and 0"),
        ({"biases": BIASES[:1]}, ValueError, "as many, and at least one, not 2 and 1"),
        ({"biases": [None, None]}, TypeError, "biases[0] must be a tensor, not NoneType"),
        ({"weights": [WEIGHTS[0], 3]}, TypeError, "weights[1] must be a tensor, not int"),
        (
            {"weights": [torch.zeros(7, 5), WEIGHTS[1]]},
            ValueError,
            "weights[0] must be [out, 6] or [out, 6, 1] for these maps, not (7, 5)",
        ),
        (
            {"weights": [WEIGHTS[0], torch.zeros(3, 7)]},
            ValueError,
            "weights[1] must be [out, 10] or [out, 10, 1] for these maps, not (3, 7)",
        ),
        ({"coarse_each_layer": False}, ValueError, "weights[1] must be [out, 7] or [out, 7, 1]"),
        ({"weights": [WEIGHTS[0], torch.zeros(3, 10, 3)]}, ValueError, "not (3, 10, 3)"),
        ({"biases": [BIASES[0], torch.zeros(1)]}, ValueError, "biases[1] must be (3,), not (1,)"),
        ({"fine_map": MAP[:1], "coords": COORDS[:1]}, ValueError, "as many images, not 1 and 2"),
    ],
)
def test_layers(call, layers, error, message):
    if call is refine:
        layers = {name: value for name, value in layers.items() if name != "coords"}
    with pytest.raises(error, match=re.escape(message)):
        call(**layers)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.setattr(ops.backend, "_chosen", None)
    monkeypatch.delenv("POINTREND_BACKEND", raising=False)


def test_backend_blocks_nest_and_restore():
    assert ops.backend.current() == "auto"
    with ops.backend("reference"):
        assert ops.backend.current() == "reference"
        with ops.backend("auto"):
            assert ops.backend.current() == "auto"
        assert ops.backend.current() == "reference"
        with pytest.raises(ZeroDivisionError), ops.backend("auto"):
            raise ZeroDivisionError
        assert ops.backend.current() == "reference"
    assert ops.backend.current() == "auto"


def test_backend_stays_set_outside_a_block(monkeypatch):
    ops.backend("reference")
    assert ops.backend.current() == "reference"
    monkeypatch.setenv("POINTREND_BACKEND", "auto")
    assert ops.backend.current() == "reference", "a choice in code goes before the environment"


def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("POINTREND_BACKEND", "reference")
    assert ops.backend.current() == "reference"
    with ops.backend("auto"):
        assert ops.backend.current() == "auto"
    monkeypatch.setenv("POINTREND_BACKEND", "")
    assert ops.backend.current() == "auto"
    monkeypatch.setenv("POINTREND_BACKEND", "cuda")
    with pytest.raises(ValueError, match="^POINTREND_BACKEND must be one of auto, .*, not 'cuda'$"):
        sample()


def test_unknown_backend_changes_nothing():
    ops.backend("reference")
    with pytest.raises(ValueError, match="^backend must be one of auto, triton, reference, not 'g"):
        ops.backend("gpu")
    assert ops.backend.current() == "reference"


@pytest.mark.parametrize("call", [sample, select, topk, upsample, head, decode, refine])
def test_triton_is_refused_in_words(call, monkeypatch):
    monkeypatch.setattr(ops.library, "INTERPRETED", False)  # as without TRITON_INTERPRET
    with ops.backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for .* cpu"):
        call()
    for name in ("auto", "reference"):
        with ops.backend(name):
            call()


ELSEWHERE = [
    (sample, {"coords": COORDS.to("meta")}, "coords must be on cpu as input is, not on meta"),
    (head, {"coords": COORDS.to("meta")}, "coords must be on cpu as fine_map is, not on meta"),
    (head, {"coarse_map": MAP.to("meta")}, "the coarse map must be on cpu as fine_map is"),
    (refine, {"fine_map": MAP.to("meta")}, "the coarse map must be on meta as fine_map is"),
    (refine, {"weights": [WEIGHTS[0], WEIGHTS[1].to("meta")]}, "weights[1] must be on cpu as fine"),
    (head, {"biases": [b.to("meta") for b in BIASES]}, "biases[0] must be on cpu as fine_map is"),
    (select, {"draws": (DRAWS[0], DRAWS[1].to("meta"))}, "random must be on cpu as logits is"),
]


@pytest.mark.parametrize(("call", "arguments", "message"), ELSEWHERE)
def test_devices_are_not_mixed(call, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**arguments)
