"""visualize.py: exact colours, exact pixels, and files that are whole or absent."""

import cv2
import numpy as np
import pytest

from pointrend_triton import visualize

PALETTE = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0]], np.uint8)
LABEL = np.array([[0, 1], [2, 255]], np.uint8)


def grey(height, width, level=100):
    return np.full((height, width, 3), level, np.uint8)


def test_colorize():
    colors = visualize.colorize(LABEL, PALETTE)
    assert colors.dtype == np.uint8
    assert colors.tolist() == [[[10, 20, 30], [200, 0, 0]], [[0, 200, 0], [0, 0, 0]]]
    assert visualize.colorize(LABEL, PALETTE, (255, 255, 255))[1, 1].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="class 7; palette has 3"):
        visualize.colorize(np.array([[7]]), PALETTE)


def test_overlay_mixes_and_leaves_ignored_pixels():
    mixed = visualize.overlay(grey(2, 2), LABEL, PALETTE, alpha=0.25)
    assert mixed[0, 1].tolist() == [125, 75, 75]
    assert mixed[1, 1].tolist() == [100, 100, 100]
    with pytest.raises(ValueError, match=r"alpha .* not 2"):
        visualize.overlay(grey(2, 2), LABEL, PALETTE, alpha=2)
    with pytest.raises(ValueError, match=r"label is \(2, 2\), .* \(2, 3\)"):
        visualize.overlay(grey(2, 3), LABEL, PALETTE)


def test_error_map():
    wrong = np.array([[0, 0], [2, 1]], np.uint8)
    picture = visualize.error_map(wrong, LABEL, grey(2, 2, 90))
    assert picture[0, 0].tolist() == [30, 30, 30]
    assert picture[0, 1].tolist() == list(visualize.RED)
    assert picture[1, 1].tolist() == list(visualize.GREY)
    assert visualize.error_map(wrong, LABEL)[0, 0].tolist() == [0, 0, 0]


def test_uncertainty_heatmap_orders_its_colours():
    scores = np.array([[-3.0, -1.0, 0.0, np.nan, -np.inf]])
    colors = visualize.uncertainty_heatmap(scores)[0].astype(int)
    brightness = colors.sum(1)
    assert brightness[0] < brightness[1] < brightness[2]
    assert colors[3].tolist() == colors[2].tolist()
    assert colors[4].tolist() == colors[0].tolist()
    # dark blue to yellow, and not the other way round as BGR would be
    assert colors[0, 2] > colors[0, 0] and colors[2, 0] > colors[2, 2]


def test_uncertainty_heatmap_of_a_flat_or_undefined_map():
    for value in (0.0, np.nan):
        flat = visualize.uncertainty_heatmap(np.full((2, 3), value))
        assert flat.shape == (2, 3, 3) and (flat == flat[0, 0]).all()
    with pytest.raises(ValueError, match=r"\(3,\)"):
        visualize.uncertainty_heatmap(np.zeros(3))


def test_draw_points_paints_the_pixel_that_holds_the_point():
    image = grey(4, 8)
    # x runs along the width: cell centre (column 5, row 1), and the far corner
    picture = visualize.draw_points(image, np.array([[5.5 / 8, 1.5 / 4], [1.0, 1.0]]))
    painted = np.argwhere((picture != image).any(2)).tolist()
    assert painted == [[1, 5], [3, 7]]
    assert (image == 100).all()
    assert (visualize.draw_points(image, np.zeros((0, 2))) == image).all()


def test_draw_points_with_a_radius_stays_inside():
    picture = visualize.draw_points(grey(9, 9), np.array([[0.5, 0.5], [0.0, 0.0]]), radius=1)
    assert (picture[4, 3:6] == visualize.YELLOW).all() and (
        picture[3:6, 4] == visualize.YELLOW
    ).all()
    assert (picture[0, 0] == visualize.YELLOW).all() and (picture[8, 8] == 100).all()


@pytest.mark.parametrize(
    "coords", [np.zeros((2, 3)), np.array([[0.5, 1.1]]), np.array([[np.nan, 0]])]
)
def test_draw_points_refuses(coords):
    with pytest.raises(ValueError, match="coords must be"):
        visualize.draw_points(grey(4, 4), coords)


def test_panel_lays_tiles_side_by_side():
    tiles = [grey(20, 30, 10), grey(10, 40, 20)]
    picture = visualize.panel(tiles, ["one", "a title that is much too long for its tile"])
    top, gap = visualize.TITLE_HEIGHT, visualize.GAP
    assert picture.shape == (top + 20, 30 + gap + 40, 3)
    assert (picture[top:, :30] == 10).all()
    assert (picture[top : top + 10, 30 + gap :] == 20).all()
    assert (picture[:, 30 : 30 + gap] == 255).all() and (
        picture[top + 10 :, 30 + gap :] == 255
    ).all()
    # both titles left ink
    assert (picture[:top, :30] < 128).any() and (picture[:top, 30 + gap :] < 200).any()
    with pytest.raises(ValueError, match="not 1 for 2"):
        visualize.panel(tiles, ["one"])


def test_panel_starts_a_new_row_after_its_columns():
    top, gap = visualize.TITLE_HEIGHT, visualize.GAP
    picture = visualize.panel(
        [grey(20, 30, level) for level in (10, 20, 30)], list("abc"), columns=2
    )
    assert picture.shape == (2 * (top + 20) + gap, 2 * 30 + gap, 3)
    assert (picture[top : top + 20, 30 + gap :] == 20).all()
    assert (picture[-20:, :30] == 30).all() and (picture[-20:, 30:] == 255).all()


DOUBT = np.array([[-3.0, -1.0], [-2.0, -3.0]])


def test_example_panel_enlarges_small_images():
    truth = np.zeros((50, 128), np.uint8)
    truth[:, 64:] = 1
    coarse = np.roll(truth, 2, 1)
    coords = np.array([[0.5, 0.5]])
    picture = visualize.example_panel(grey(50, 128), truth, coarse, truth, coords, DOUBT, PALETTE)
    down, right = visualize.TITLE_HEIGHT + 150 + visualize.GAP, 128 * 3 + visualize.GAP
    assert picture.shape == (2 * down - visualize.GAP, 4 * right - visualize.GAP, 3)

    def tile(row, column):
        top, left = row * down + visualize.TITLE_HEIGHT, column * right
        return picture[top : top + 150, left : left + 384]

    assert (tile(0, 0) == 100).all()
    assert (tile(0, 1)[::3, ::3] == visualize.colorize(truth, PALETTE)).all()
    assert (tile(0, 2)[::3, ::3] == visualize.colorize(coarse, PALETTE)).all()
    assert (tile(0, 3)[::3, ::3] == visualize.colorize(truth, PALETTE)).all()
    corners = tile(1, 0)[::149, ::383]
    assert (corners == visualize.uncertainty_heatmap(DOUBT)).all()
    assert (tile(1, 1) == visualize.YELLOW).all(2).sum() == 9
    assert (tile(1, 2) == visualize.RED).all(2).sum() == 9 * 4 * 50
    assert not (tile(1, 3) == visualize.RED).all(2).any()
    with pytest.raises(ValueError, match="coarse"):
        visualize.example_panel(grey(50, 128), truth, coarse[:9], truth, coords, DOUBT, PALETTE)


def test_example_panel_shrinks_large_images():
    # stripes of 4 px: a tile of a quarter of the size keeps one pixel of each
    truth = np.tile(np.arange(2048) // 4 % 3, (1024, 1))
    coarse, refined = (truth + 1) % 3, truth.copy()
    refined[:, :4] = 255
    image = np.random.default_rng(0).integers(0, 256, (1024, 2048, 3), np.uint8)
    coords = (np.array([[0, 0], [3, 5], [511, 255]]) + 0.5) / (512, 256)
    arguments = (truth, coarse, refined, coords, DOUBT, PALETTE)
    picture = visualize.example_panel(image[..., ::-1], *arguments)
    down, right = visualize.TITLE_HEIGHT + 256 + visualize.GAP, 512 + visualize.GAP
    assert picture.shape == (2 * down - visualize.GAP, 4 * right - visualize.GAP, 3)

    def tile(row, column):
        top, left = row * down + visualize.TITLE_HEIGHT, column * right
        return picture[top : top + 256, left : left + 512]

    means = image[..., ::-1].reshape(256, 4, 512, 4, 3).mean((1, 3))
    assert np.abs(tile(0, 0) - means).max() <= 0.5
    assert (tile(0, 1) == visualize.colorize(truth[::4, ::4], PALETTE)).all()
    assert (tile(0, 2) == visualize.colorize(coarse[::4, ::4], PALETTE)).all()
    points = np.argwhere((tile(1, 1) == visualize.YELLOW).all(2)).tolist()
    assert points == [[0, 0], [5, 3], [255, 511]]
    assert (tile(1, 2) == visualize.RED).all()
    assert (tile(1, 3) == visualize.RED).all(2).sum() == 256


@pytest.mark.parametrize(("width", "shown"), [(319, 638), (320, 320), (512, 512), (513, 512)])
def test_example_panel_tile_widths(width, shown):
    label = np.zeros((1, width), np.uint8)
    arguments = (label, label, label, np.zeros((0, 2)), DOUBT, PALETTE)
    panel = visualize.example_panel(grey(1, width), *arguments)
    assert panel.shape[1] == 4 * shown + 3 * visualize.GAP


def test_save_png_round_trip(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    visualize.save_png(tmp_path / "new" / "folder" / "a.png", rgb)
    assert (cv2.imread(str(tmp_path / "new/folder/a.png"))[..., ::-1] == rgb).all()
    visualize.save_png(tmp_path / "b.png", rgb[..., 0])
    assert (cv2.imread(str(tmp_path / "b.png"), cv2.IMREAD_UNCHANGED) == rgb[..., 0]).all()
    with pytest.raises(ValueError, match=r"c\.jpg"):
        visualize.save_png(tmp_path / "c.jpg", rgb)


def test_names_as_long_as_names_may_be(tmp_path):
    for name in ("a" * 251 + ".csv", "\u20ac" * 85):
        visualize.write_atomic(tmp_path / name, b"data")
        assert (tmp_path / name).read_bytes() == b"data"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    visualize.write_atomic(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        visualize.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
