"""Tiles against the whole picture: exact where the network looks at single pixels, else nearly."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pointrend_triton import Predictor, build_model, tiles
from pointrend_triton.config import load_config
from pointrend_triton.data.shapes import Shapes
from pointrend_triton.segment import Segmenter

LENGTHS = (1, 63, 64, 65, 100, 127, 128, 129, 300, 1000)
CONFIG = load_config("cityscapes_r50").model


def whole_map(height, width, channels=3):
    return torch.randn(channels, height, width)


def blended(maps, tile):
    """What `blend` makes of a network that looks at single pixels."""
    height, width = maps.shape[1:]
    result = torch.full_like(maps, torch.nan)
    for first, band in tiles.blend(lambda box: maps[:, *box], height, width, tile):
        result[:, first : first + band.shape[1]] = band
    return result


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tile", [64, 96, 256])
def test_tiles_cover_a_side_and_overlap(length, tile):
    starts = tiles.starts(length, tile)
    size = min(tile, length)
    assert (starts[0], starts[-1]) == (0, length - size)
    least = min(max(tile // 4, tiles.MIN_OVERLAP), tile // 2)
    for one, other in itertools.pairwise(starts):
        assert one < other <= one + tile - least


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("tile", [64, 96, 256])
def test_shares_add_up_to_one_and_fall_off_inside_the_picture_only(length, tile):
    starts, shares = tiles.starts(length, tile), tiles.shares(length, tile)
    total = torch.zeros(length)
    for start, share in zip(starts, shares, strict=True):
        assert (share > 0).all()
        total[start : start + len(share)] += share
    torch.testing.assert_close(total, torch.ones(length))
    if len(starts) > 1:
        assert shares[0][0] == 1 and shares[-1][-1] == 1
        assert shares[0][-1] < 0.1 and shares[-1][0] < 0.1


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (100, 300), (300, 65), (257, 129)])
def test_what_all_tiles_agree_on_is_kept(size):
    maps = whole_map(*size)
    torch.testing.assert_close(blended(maps, 64), maps, rtol=1e-5, atol=1e-6)


def test_disagreeing_tiles_fade_into_each_other():
    """No step at any tile's edge: the network answers with the tile's number."""
    number = itertools.count()
    bands = tiles.blend(lambda box: torch.full((1, 64, 64), float(next(number))), 64, 300, 64)
    first, band = next(bands)
    (row,) = {tuple(row.tolist()) for row in band[0]}
    steps = np.diff(row)
    assert (first, row[0], row[-1]) == (0, 0, len(tiles.starts(300, 64)) - 1)
    assert (steps >= 0).all() and steps.max() < 0.1


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("size", [(150, 200), (300, 401), (70, 31), (1, 1)])
def test_labels_are_those_of_the_resampled_probabilities(classes, size):
    maps = 4 * whole_map(150, 200, classes)
    labels = tiles.labels(lambda box: maps[:, *box], 150, 200, 64, size)
    probabilities = maps.sigmoid() if classes == 1 else maps.softmax(0)
    expected = F.interpolate(probabilities[None], size=size, mode="bilinear")[0]
    top = expected.topk(min(2, classes), dim=0).values
    margin = (expected[0] - 0.5).abs() if classes == 1 else top[0] - top[1]
    wanted = expected[0] > 0.5 if classes == 1 else expected.argmax(0)
    assert labels.shape == size and labels.dtype == torch.uint8
    assert torch.equal(labels[margin > 1e-5], wanted.byte()[margin > 1e-5])


def test_more_than_256_classes():
    maps = whole_map(64, 100, 300)
    labels = tiles.labels(lambda box: maps[:, *box], 64, 100, 64, (64, 100))
    assert labels.dtype == torch.int64 and torch.equal(labels, maps.argmax(0))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_tensor_grows_with_the_height():
    classes, width, tile = 32, 150, 64
    for height in (500, 1000):
        with Largest() as largest:
            tiles.labels(
                lambda box: torch.randn(classes, *(part.stop - part.start for part in box)),
                *(height, width, tile, (height, width)),
            )
        assert largest.elements == classes * (tile + 1) * width


@pytest.fixture(scope="module")
def predictor():
    """A small network whose labels follow colours and borders, without training."""
    torch.manual_seed(3)
    sizes = {"depth": 18, "base_channels": 8, "fpn_channels": 16, "head_channels": 8}
    head = {"channels": 16, "subdivision_num_points": 512}
    model = build_model({"model": {"num_classes": 5, "point_head": head, **sizes}})
    torch.nn.init.normal_(model.coarse_head.conv_seg.weight, std=2)
    return Predictor(model)


def changes(labels, columns):
    """Share of pixels whose right neighbour has another label, in these columns."""
    return (labels[:, 1:] != labels[:, :-1])[:, columns].mean()


@pytest.mark.slow
def test_a_network_in_tiles_answers_as_in_one_pass_without_seams(predictor):
    """Seams: changes of label where a tile begins or ends, against the same columns in one pass."""
    whole, cut = Segmenter(predictor, tile="none"), Segmenter(predictor, tile=256)
    edges = sorted({x for s in tiles.starts(512, 256) for x in (s - 1, s + 255) if 0 <= x < 511})
    pictures = Shapes("val", 4, (384, 512))
    agreement, blended, single, abutting = [], [], [], []
    for index in range(len(pictures)):
        image, _ = pictures.load(index)
        expected, labels = (s(s.prepare(image)).labels for s in (whole, cut))
        agreement.append((labels == expected).mean())
        blended.append(changes(labels, edges))
        single.append(changes(expected, edges))
        halves = [whole(whole.prepare(image[:, s : s + 256])).labels for s in (0, 256)]
        abutting.append(changes(np.concatenate(halves, axis=1), [255]))
    assert np.mean(agreement) > 0.96
    assert np.mean(blended) < 1.2 * np.mean(single)
    # tiles that only lie side by side would show
    assert np.mean(abutting) > 5 * np.mean(single)


def test_points_and_uncertainty_lie_where_they_do_in_one_pass(predictor, monkeypatch):
    """The network's stand-in marks each tile's centre and is as uncertain as a pixel is red."""

    def trace(inputs, **_):
        return {"coarse": inputs[:, :1], "points": [torch.tensor([[[0.5, 0.5]]])]}

    monkeypatch.setattr(predictor.model, "refine_trace", trace)
    image = np.random.default_rng(0).integers(0, 256, (150, 300, 3), dtype=np.uint8)
    found = {}
    for tile in ("none", 128):
        segmenter = Segmenter(predictor, ("points", "uncertainty"), tile=tile)
        found[tile] = segmenter(segmenter.prepare(image))
    np.testing.assert_allclose(found[128].uncertainty, found["none"].uncertainty, rtol=1e-5)
    centres = [(x + 64, y + 64) for y in tiles.starts(150, 128) for x in tiles.starts(300, 128)]
    np.testing.assert_allclose(found[128].points * (300, 150), centres)
    np.testing.assert_allclose(found["none"].points, [[0.5, 0.5]])


def test_a_single_pass_where_it_fits_else_the_largest_tiles_that_do():
    for memory, expected in {
        2**40: (4000, 2048, 1024, 512, 256),
        5 * 2**30: (2048, 1024, 512, 256),
        2**30: (1024, 512, 256),
        0: (256,),
    }.items():
        assert tiles.choices(CONFIG, 3000, 4000, memory, torch.float32) == expected
    assert tiles.choices(CONFIG, 30, 40, 0, torch.float32) == (40,)
    half = tiles.bytes_needed(CONFIG, 512, 512, 512, torch.bfloat16)
    assert half < tiles.bytes_needed(CONFIG, 512, 512, 512, torch.float32)
