"""The pipelines against scalar re-computations; draws are scripted where their order matters."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pointrend_triton.config import DataConfig
from pointrend_triton.data import (
    MEAN,
    STD,
    TestTransform,
    TrainTransform,
    denormalise,
    keep_ratio_size,
    multi_scale_sizes,
)
from pointrend_triton.data.transforms import (
    normalise,
    pad,
    photometric_distortion,
    random_crop_box,
    rescale_size,
    resize,
)

sides = st.integers(1, 3000)


class Script:
    """Stands in for a generator: hands out the given draws in order and notes what was asked."""

    def __init__(self, *draws):
        self.draws = list(draws)
        self.asked = []

    def _next(self, *question):
        self.asked.append(question)
        return self.draws.pop(0)

    def random(self):
        return self._next("random")

    def integers(self, low, high=None):
        return self._next("integers", low, high)

    def uniform(self, low, high):
        return self._next("uniform", low, high)


def random_image(shape=(37, 53), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


# sizes


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((1536, 2048), (2048, 512), (512, 683)),
        ((300, 400), (2048, 512), (512, 683)),
        ((256, 256), (512, 2048), (512, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((1000, 100), (2048, 512), (2048, 205)),
        ((512, 768), (2048, 512), (512, 768)),
        # mmsegmentation ends in an error of OpenCV here
        ((400, 2), (64, 48), (64, 1)),
        ((2, 400), (64, 48), (1, 64)),
    ],
)
def test_keep_ratio_size(size, scale, expected):
    assert keep_ratio_size(*size, scale) == expected
    assert keep_ratio_size(*size, scale[::-1]) == expected


@given(sides, sides, sides, sides)
def test_keep_ratio_size_touches_one_bound_and_passes_none(height, width, a, b):
    h, w = keep_ratio_size(height, width, (a, b))
    long, short = max(a, b), min(a, b)
    # rounding half up keeps a side on its bound, so no tolerance is needed
    assert max(h, w) <= long
    assert min(h, w) <= short
    assert max(h, w) == long or min(h, w) == short


def test_training_scale_is_cut_to_whole_pixels_before_it_is_fitted():
    # 0.8 -> ratio 1.7: (3481, 1740); cutting after the fit would give 1741 rows
    rng = Script(0.8)
    ratio = 0.8 * 1.5 + 0.5
    assert rescale_size((1024, 2048), (2048, 1024), (0.5, 2.0), rng) == (1740, 3480)
    assert (int(2048 * ratio), int(1024 * ratio)) == (3481, 1740)
    assert rng.asked == [("random",)]


def test_training_scale_covers_its_range():
    rng = np.random.default_rng(0)
    heights = [rescale_size((512, 512), (2048, 512), (0.5, 2.0), rng)[0] for _ in range(2000)]
    # uniform: a tenth of the range holds 200 +- 14 of 2000; six standard deviations are allowed
    counts, _ = np.histogram(heights, bins=10, range=(256, 1024))
    assert min(heights) >= 256
    assert max(heights) < 1024
    assert np.abs(counts - 200).max() < 6 * math.sqrt(2000 * 0.1 * 0.9)


def test_a_scale_of_the_image_itself_is_the_identity():
    image = random_image((128, 96))
    size = rescale_size(image.shape, (96, 128), (1, 1), np.random.default_rng(0))
    assert size == (128, 96)
    assert resize(image, size, cv2.INTER_LINEAR) is image


def test_multi_scale_sizes_are_ratios_of_the_scale():
    assert multi_scale_sizes((2048, 512)) == [
        (1024, 256),
        (1536, 384),
        (2048, 512),
        (2560, 640),
        (3072, 768),
        (3584, 896),
    ]


def test_label_resize_picks_the_floor_index():
    label = np.arange(7 * 9, dtype=np.uint8).reshape(7, 9)
    rows = [i * 7 // 5 for i in range(5)]
    columns = [i * 9 // 13 for i in range(13)]
    assert np.array_equal(resize(label, (5, 13), cv2.INTER_NEAREST), label[np.ix_(rows, columns)])


def test_image_resize_is_bilinear_between_pixel_centres():
    image = random_image((20, 30))
    ours = resize(image, (33, 41), cv2.INTER_LINEAR).astype(float)
    planes = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float64))
    exact = torch.nn.functional.interpolate(planes, (33, 41), mode="bilinear", align_corners=False)
    # OpenCV's 8-bit weights have 11 bits and the result is rounded: within 1 grey level of exact
    assert np.abs(ours - exact[0].permute(1, 2, 0).numpy()).max() <= 1


# crop


def shares(label, box):
    values = [v for v in label[box].ravel().tolist() if v != 255]
    counts = sorted(values.count(v) for v in set(values))
    return counts


@given(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.3, 0.6, 0.75])
)
def test_crop_is_drawn_again_until_mixed(seed, height, width, limit):
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 0, 0, 1, 2, 255], (8, 8)).astype(np.uint8)
    tops = rng.integers(0, max(8 - height, 0) + 1, 11).tolist()
    lefts = rng.integers(0, max(8 - width, 0) + 1, 11).tolist()
    script = Script(*[draw for pair in zip(tops, lefts, strict=True) for draw in pair])
    box = random_crop_box(label, (height, width), limit, script)

    expected = None
    for top, left in zip(tops, lefts, strict=True):
        expected = (slice(top, top + height), slice(left, left + width))
        counts = shares(label, expected)
        if len(counts) > 1 and counts[-1] < limit * sum(counts):
            break
    assert box == expected
    assert script.asked[0] == ("integers", 0, max(8 - height, 0) + 1)
    assert script.asked[1] == ("integers", 0, max(8 - width, 0) + 1)


def test_crop_gives_up_after_ten_checks_and_takes_an_eleventh_box():
    script = Script(*([0, 0] * 10 + [3, 4]))
    box = random_crop_box(np.zeros((8, 8), np.uint8), (2, 2), 0.75, script)
    assert box == (slice(3, 5), slice(4, 6))
    assert script.draws == []


def test_crop_rejects_exactly_the_limit():
    label = np.array([[0, 0, 0, 1, 0, 0, 1, 1]], np.uint8)
    # columns 0..3 hold 3 of 4 pixels of one class: not less than 0.75; columns 4..7 do
    assert random_crop_box(label, (1, 4), 0.75, Script(0, 0, 0, 4))[1] == slice(4, 8)


def test_crop_of_ignored_pixels_only_is_drawn_again():
    label = np.full((4, 8), 255, np.uint8)
    label[:, 6:] = [0, 1]
    assert random_crop_box(label, (4, 2), 0.75, Script(0, 0, 0, 6))[1] == slice(6, 8)


@pytest.mark.parametrize("shape", [(256, 1), (256,)])
def test_a_histogram_is_a_column_in_opencv_4_and_a_row_in_5(shape, monkeypatch):
    histogram = cv2.calcHist
    monkeypatch.setattr(cv2, "calcHist", lambda *args: histogram(*args).reshape(shape))
    label = np.array([[0, 0, 0, 1, 0, 0, 1, 1]], np.uint8)
    assert random_crop_box(label, (1, 4), 0.75, Script(0, 0, 0, 4))[1] == slice(4, 8)


def test_a_limit_of_one_draws_a_single_box():
    script = Script(1, 2)
    assert random_crop_box(np.zeros((4, 4), np.uint8), (2, 2), 1.0, script)[1] == slice(2, 4)
    assert script.draws == []


# colours


def truncated(value):
    return int(min(max(float(value), 0.0), 255.0))


def test_brightness_and_contrast_in_mode_1_truncate_each_step():
    image = random_image()
    draws = Script(1, -20.7, 1, 1, 1.3, 0, 0)
    ours = photometric_distortion(image, draws)
    assert draws.draws == []
    expected = np.empty_like(image)
    for index in np.ndindex(image.shape):
        darker = truncated(np.float32(image[index]) + np.float32(-20.7))
        expected[index] = truncated(np.float32(darker) * np.float32(1.3))
    assert np.array_equal(ours, expected)


def test_contrast_comes_last_in_mode_0():
    image = random_image()
    draws = Script(0, 0, 1, 0.5, 1, 17, 1, 1.5)
    ours = photometric_distortion(image, draws)
    assert draws.asked == [
        ("integers", 2, None),  # brightness?
        ("integers", 2, None),  # mode
        ("integers", 2, None),
        ("uniform", 0.5, 1.5),  # saturation
        ("integers", 2, None),
        ("integers", -18, 18),  # hue
        ("integers", 2, None),
        ("uniform", 0.5, 1.5),  # contrast
    ]
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    hsv[..., 1] = np.trunc(hsv[..., 1] * 0.5)
    hsv = cv2.cvtColor(cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR), cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + 17) % 180
    bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR).astype(float)
    assert np.array_equal(ours, np.trunc(np.clip(bgr * 1.5, 0, 255)))


def test_no_coin_no_change():
    image = random_image()
    assert np.array_equal(photometric_distortion(image, Script(0, 0, 0, 0, 0)), image)


def test_each_distortion_happens_half_of_the_time_and_hue_shifts_within_its_range():
    class Notes(Script):
        def __init__(self):
            super().__init__()
            self.rng = np.random.default_rng(0)

        def integers(self, low, high=None):
            value = self.rng.integers(low, high)
            self.asked.append((low, high, int(value)))
            return value

        def uniform(self, low, high):
            self.asked.append((low, high))
            return self.rng.uniform(low, high)

    image = random_image((2, 2))
    rng = Notes()
    runs = 3000
    for _ in range(runs):
        photometric_distortion(image, rng)
    # six standard deviations of a coin thrown 3000 times
    slack = 6 * math.sqrt(runs / 4)
    assert abs(rng.asked.count((-32, 32)) - runs / 2) < slack
    assert abs(rng.asked.count((0.5, 1.5)) - runs) < slack * math.sqrt(2)
    shifts = [value for low, _, *value in rng.asked if low == -18]
    assert abs(len(shifts) - runs / 2) < slack
    # each of 36 values is missed by 1400 draws with probability below 1e-17
    assert sorted({value for (value,) in shifts}) == list(range(-18, 18))


# normalise, pad


def test_normalise_is_the_float32_formula_in_rgb_order():
    image = np.arange(256, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 3), np.uint8)
    image[..., 1] = image[::-1, :, 1]
    ours = normalise(image)
    assert ours.shape == (3, 256, 2)
    assert ours.dtype == np.float32
    rgb = torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).astype(np.float32))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(torch.from_numpy(ours), (rgb - mean) / std)


def test_denormalise_gives_the_picture_back_in_rgb():
    image = random_image()
    assert np.array_equal(denormalise(torch.from_numpy(normalise(image))), image[..., ::-1])
    assert denormalise(torch.full((3, 1, 1), 99.0)).tolist() == [[[255, 255, 255]]]


def test_pad_continues_right_and_below():
    assert pad(np.ones((2, 3), np.uint8), (3, 5), 255).tolist() == [
        [1, 1, 1, 255, 255],
        [1, 1, 1, 255, 255],
        [255] * 5,
    ]
    padded = pad(np.ones((3, 2, 2), np.float32), (2, 3), 0)
    assert padded.shape == (3, 2, 3)
    assert (padded[..., 2] == 0).all()
    assert (padded[..., :2] == 1).all()


# whole pipelines


def test_training_pipeline_in_order():
    image = random_image((40, 60))
    label = np.random.default_rng(1).integers(0, 5, (40, 60), dtype=np.uint8)
    data = DataConfig(scale=(60, 40), crop_size=(50, 24), photometric=True)
    # ratio 1.0; crop at column 7; flip; brightness +10; nothing else
    draws = Script(1 / 3, 0, 7, 0.49, 1, 10.0, 0, 0, 0, 0)
    pixels, classes = TrainTransform(data)(image, label, draws)
    assert draws.draws == []
    cropped = np.minimum(image[:, 7:31][:, ::-1].astype(int) + 10, 255).astype(np.uint8)
    assert torch.equal(pixels[:, :40], torch.from_numpy(normalise(cropped)))
    assert torch.equal(classes[:40], torch.from_numpy(label[:, 7:31][:, ::-1].astype(np.int64)))
    # below the picture: the mean colour and ignore
    assert (pixels[:, 40:] == 0).all()
    assert (classes[40:] == 255).all()
    assert pixels.shape == (3, 50, 24)
    assert (pixels.dtype, classes.dtype) == (torch.float32, torch.int64)


def test_image_and_label_stay_aligned():
    label = np.kron(np.random.default_rng(0).integers(0, 9, (8, 8)), np.ones((32, 32))).astype(
        np.uint8
    )
    image = np.repeat(label[..., None] * np.uint8(20), 3, axis=2)
    data = DataConfig(scale=(256, 256), crop_size=(96, 160), photometric=False)
    transform = TrainTransform(data)
    for seed in range(20):
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        shown = denormalise(pixels)[..., 0].astype(int)
        inside = (classes != 255).numpy()
        # bilinear and nearest differ next to a block's edge only, in 2 of its 16 or more rows and
        # columns, 1 - (14 / 16)^2 = 23 % of its pixels; a shift by 3 px would leave 62 %
        agree = shown[inside] == 20 * classes.numpy()[inside]
        assert agree.mean() > 0.75


def test_training_is_decided_by_the_generator():
    image, label = (
        random_image((64, 64)),
        np.random.default_rng(1).integers(0, 3, (64, 64), np.uint8),
    )
    transform = TrainTransform(DataConfig(scale=(64, 64), crop_size=(32, 32)))
    first, second, other = (
        transform(image, label, np.random.default_rng(seed))[0] for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_inputs_are_left_alone():
    image, label = random_image((32, 32)), np.zeros((32, 32), np.uint8)
    before = image.copy()
    pixels, classes = TrainTransform(DataConfig(scale=(32, 32), crop_size=(32, 32)))(
        image, label, np.random.default_rng(3)
    )
    pixels.zero_()
    classes.fill_(7)
    assert np.array_equal(image, before)
    assert not label.any()


def test_test_pipeline():
    image = random_image((30, 40))
    assert torch.equal(TestTransform(None)(image), torch.from_numpy(normalise(image)))
    larger = TestTransform((2048, 512))(image[:, :30])
    assert larger.shape == (3, 512, 512)
    shown = cv2.resize(image, (683, 512), interpolation=cv2.INTER_LINEAR)
    assert torch.equal(TestTransform((2048, 512))(image), torch.from_numpy(normalise(shown)))
