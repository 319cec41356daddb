"""The kernel that makes training crops computes what its twin computes, to the last bit.

That the twin computes what OpenCV does is in tests/data/test_resident.py.
"""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointrend_triton import ops
from pointrend_triton.kernels import augment, launch

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PLAIN = (0.0, 1.0, 0.0, -1.0, 1.0)
# a first row of padding pixels, so that no picture starts at 0
START = 5


def batch(crops, device):
    """Pictures of noise and the places and colours of crops.

    Each crop is (height, width, resized height, resized width, top, left, flipped), and its
    colours.
    """
    places, colours, start = [], [], START
    for (height, width, *place), colour in crops:
        places.append([start, height, width, *place])
        colours.append(colour)
        start += height * width
    generator = torch.Generator().manual_seed(start)
    pictures = torch.randint(256, (start, 4), dtype=torch.uint8, generator=generator)
    tensors = pictures, torch.tensor(places), torch.tensor(colours, dtype=torch.float32)
    return [tensor.to(device) for tensor in tensors]


def check(crops, size, device):
    tensors = batch(crops, device)
    images, labels = augment.augment(*tensors, size, MEAN, STD)
    with ops.backend("reference"):
        wanted, truth = ops.augment(*tensors, size, mean=MEAN, std=STD)
    assert images.is_contiguous() and images.dtype == torch.float32
    assert labels.is_contiguous() and labels.dtype == torch.int64
    assert torch.equal(images, wanted)
    assert torch.equal(labels, truth)
    return images, labels


def place(size, whole, top=0, left=0, flipped=0):
    return (*size, *whole, top, left, flipped)


@pytest.mark.parametrize(
    "colours",
    [
        PLAIN,
        (-31.4, 1.3, 0.0, -1.0, 1.0),
        (20.5, 1.0, 0.7, -1.0, 1.4),
        (0.0, 1.0, 1.5, -1.0, 0.5),
        (0.0, 1.0, 1.0, -1.0, 1.0),
        (0.0, 1.0, 0.0, 0.0, 1.0),
        (0.0, 1.0, 0.0, 179.0, 1.0),
        (12.3, 0.6, 1.2, 17.0, 0.9),
    ],
)
def test_colours(colours, device):
    crop = (place((9, 70), (9, 70)), colours)
    images, labels = check([crop], (9, 70), device)
    assert images.std() > 0.1 and labels.max() <= 255


@pytest.mark.parametrize("flipped", [0, 1])
@pytest.mark.parametrize(
    "crop",
    [
        place((20, 30), (20, 30)),
        place((20, 30), (10, 15), 2, 3),
        place((20, 30), (41, 61), 9, 40),
        place((20, 30), (17, 90), 0, 81),
        place((1, 1), (1, 1)),
        place((1, 1), (50, 60), 7, 8),
        place((50, 60), (1, 1)),
        place((3, 1), (9, 200), 1, 150),
        place((20, 6), (20, 4096), 5, 1000),  # weights that lie halfway between two of 2^-11
    ],
)
def test_places(crop, flipped, device):
    colours = (12.3, 0.6, 1.2, 17.0, 0.9)
    images, labels = check([((*crop[:-1], flipped), colours)], (7, 40), device)
    height, width = min(7, crop[2] - crop[4]), min(40, crop[3] - crop[5])
    assert (images[0, :, height:] == 0).all() and (images[0, :, :, width:] == 0).all()
    assert (labels[0, height:] == 255).all() and (labels[0, :, width:] == 255).all()


@pytest.mark.parametrize("number", range(len(augment.AUGMENT.configs({}))))
def test_every_configuration_gives_the_same(number, device):
    crops = [
        (place((30, 40), (37, 600), 5, 90, 1), (12.3, 0.6, 1.2, 17.0, 0.9)),
        (place((9, 11), (8, 10)), PLAIN),
    ]
    with launch.pinned(augment.AUGMENT, number):
        check(crops, (3, 530), device)


sides = st.integers(1, 40)


@st.composite
def any_crop(draw):
    size, whole = (draw(st.tuples(sides, sides)) for _ in range(2))
    corner = [draw(st.integers(0, side - 1)) for side in whole]
    colours = (
        draw(st.floats(-32, 32, width=32)),
        draw(st.floats(0.5, 1.5, width=32)),
        draw(st.just(0.0) | st.floats(0.5, 1.5, width=32)),
        draw(st.integers(-1, 179)),
        draw(st.floats(0.5, 1.5, width=32)),
    )
    return place(size, whole, *corner, draw(st.integers(0, 1))), colours


@settings(max_examples=20)
@given(crops=st.lists(any_crop(), min_size=1, max_size=2), size=st.tuples(st.integers(1, 5), sides))
def test_any_crops(crops, size):
    check(crops, size, "cuda" if torch.cuda.is_available() else "cpu")


def test_no_crops(device):
    pictures, places, colours = batch([(place((2, 2), (2, 2)), PLAIN)], device)
    images, labels = augment.augment(pictures, places[:0], colours[:0], (4, 6), MEAN, STD)
    assert (images.shape, labels.shape) == ((0, 3, 4, 6), (0, 4, 6))


@pytest.mark.gpu
def test_pictures_beyond_31_bits(device):
    height, width = 8, 1 << 16
    start = (1 << 29) + 4096  # 2^31 bytes and more
    pictures = torch.zeros(start + height * width, 4, dtype=torch.uint8, device=device)
    pictures[start:] = torch.randint(256, (height * width, 4), dtype=torch.uint8, device=device)
    places = torch.tensor([[start, height, width, height, width, 0, 512, 0]], device=device)
    colours = torch.tensor([PLAIN], device=device)
    images, labels = augment.augment(pictures, places, colours, (8, 64), (0, 0, 0), (1, 1, 1))
    expected = pictures[start:].view(height, width, 4)[:, 512:576]
    assert torch.equal(images[0], expected[..., :3].flip(2).permute(2, 0, 1).float())
    assert torch.equal(labels[0], expected[..., 3].long())


def call(**change):
    tensors = batch([(place((2, 2), (2, 2)), PLAIN)], "cpu")
    right = dict(zip(("pictures", "places", "colours"), tensors, strict=True))
    return ops.augment(**(right | {"size": (4, 6), "mean": MEAN, "std": STD} | change))


def test_arguments_that_are_right():
    assert call()[0].shape == (1, 3, 4, 6)
    assert call(pictures=torch.zeros(44, dtype=torch.uint8)[4:].view(10, 4))[1].max() == 255


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pictures": [1]}, TypeError, "pictures must be a tensor, not list"),
        ({"pictures": torch.zeros(9, 4)}, TypeError, "pictures must be torch.uint8, not torch.flo"),
        (
            {"pictures": torch.zeros(9, 3, dtype=torch.uint8)},
            ValueError,
            "pictures must be [n, 4], not (9, 3)",
        ),
        (
            {"pictures": torch.zeros(4, 9, dtype=torch.uint8).T},
            ValueError,
            "pictures must be contiguous, not of strides (1, 9)",
        ),
        (
            {"pictures": torch.zeros(41, dtype=torch.uint8)[1:].view(10, 4)},
            ValueError,
            "pictures must begin at a multiple of 4 bytes of its memory, not at byte 1",
        ),
        ({"places": torch.zeros(1, 8)}, TypeError, "places must be torch.int64"),
        ({"colours": torch.zeros(1, 6)}, ValueError, "colours must be [n, 5], not (1, 6)"),
        (
            {"colours": torch.zeros(3, 5)},
            ValueError,
            "places and colours must be for as many crops, not 1 and 3",
        ),
        (
            {"colours": torch.zeros(1, 5, device="meta")},
            ValueError,
            "colours must be on cpu as pictures is, not on meta",
        ),
        ({"size": (0, 3)}, ValueError, "size must be (height, width) of at least 1, not (0, 3)"),
        ({"mean": (1.0,)}, ValueError, "mean must be three numbers, not 1"),
        ({"std": [1.0] * 4}, ValueError, "std must be three numbers, not 4"),
    ],
)
def test_arguments_that_cannot_be_right(change, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call(**change)
