"""predict from its arguments to its files, with a tiny network."""

import re
import struct
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from pointrend_triton import (
    Predictor,
    build_model,
    from_checkpoint,
    precision,
    predict,
    segment,
    sources,
)
from pointrend_triton.data import TestTransform, ade20k, cityscapes, read_image
from pointrend_triton.data.io import read_classes
from pointrend_triton.segment import KINDS
from pointrend_triton.video import VideoWriter

HEAD = {"channels": 16}
SIZES = {"depth": 18, "base_channels": 8, "fpn_channels": 16, "head_channels": 8}
NAMES = ("sky", "road", "tree", "car, parked")


def write_checkpoint(path, num_classes=4, point_head=HEAD, **meta):
    torch.manual_seed(1)
    model = build_model({"model": {"num_classes": num_classes, "point_head": point_head, **SIZES}})
    # scores spread over the classes, which fresh weights would not give
    torch.nn.init.normal_(model.coarse_head.conv_seg.weight, std=2)
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "tiny.pth", CLASSES=NAMES)


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """Runs main in a folder of its own -> exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, file=checkpoint):
        given = ["--device", "cpu", "--checkpoint", str(file), *map(str, arguments)]
        return predict.main(given)

    return run


def picture(height=40, width=56, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture() if array is None else array)
    return path


def write_video(path, count=5, size=(48, 64), codec="mp4v", fps=12.5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size[::-1])
    for seed in range(count):
        writer.write(picture(*size, seed))
    writer.release()
    return path


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def labels_of(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def expected_labels(checkpoint, image, scale=None, **how):
    inputs = TestTransform(scale)(image)[None]
    return Predictor(from_checkpoint(checkpoint))(inputs, image.shape[:2], **how)[0].numpy()


def test_every_kind_of_result(run, checkpoint, tmp_path, capsys):
    image = save(tmp_path / "street.png")
    assert run("street.png", "--points", "64", "--write", *KINDS) == 0
    out = tmp_path / "predictions"
    assert files(out) == sorted(["classes.csv", *(f"{kind}/street.png" for kind in KINDS)])

    names, colours = read_classes(out / "classes.csv")
    assert names == NAMES
    labels = labels_of(out / "labels/street.png")
    assert labels.dtype == np.uint8 and len(np.unique(labels)) > 1
    expected = expected_labels(checkpoint, read_image(image), num_points=64)
    np.testing.assert_array_equal(labels, expected)
    color = read_image(out / "color/street.png")[..., ::-1]
    np.testing.assert_array_equal(color, colours[labels])
    overlay = read_image(out / "overlay/street.png")[..., ::-1].astype(float)
    mean = (read_image(image)[..., ::-1].astype(float) + colours[labels]) / 2
    assert abs(overlay - mean).max() <= 0.5
    yellow = (read_image(out / "points/street.png")[..., ::-1] == (255, 225, 25)).all(axis=2)
    assert yellow.sum() == 64
    assert read_image(out / "uncertainty/street.png").shape == (40, 56, 3)
    compared = read_image(out / "compare/street.png")[..., ::-1]
    np.testing.assert_array_equal(
        compared[-40:, -56:], read_image(out / "overlay/street.png")[..., ::-1]
    )
    coarse = expected_labels(checkpoint, read_image(image), refine=False)
    assert (coarse != labels).any()
    half = (read_image(image)[..., ::-1].astype(float) + colours[coarse]) / 2
    assert abs(compared[-40:, :56] - half).max() <= 0.5

    printed = capsys.readouterr().out
    assert "R-18, 4 classes, cpu, float32; scale none, pictures keep their size" in printed
    assert re.search(r"1 image in [\d.]+ s, [\d.]+ images/s: predictions/overlay, pred", printed)


def test_folders_and_patterns_keep_their_paths(run, tmp_path):
    for name in ("photos/b.jpg", "photos/deep/er/a.1.png", "more/c.webp", "more/d.bmp", "e.tiff"):
        save(tmp_path / name)
    save(tmp_path / "photos/.hidden/f.png")
    (tmp_path / "photos/notes.txt").write_text("no picture")
    assert run("photos", "more/*.webp", tmp_path / "e.tiff", "--write", "labels") == 0
    assert files(tmp_path / "predictions/labels") == ["b.png", "c.png", "deep/er/a.1.png", "e.png"]


def test_a_file_named_twice_is_predicted_once(run, tmp_path, capsys):
    save(tmp_path / "photos/b.png")
    assert run("photos", "photos/b.png", "photos/*") == 0
    assert "1 image in" in capsys.readouterr().out


def test_earlier_results_are_replaced_and_are_no_inputs(run, tmp_path, capsys):
    save(tmp_path / "b.png")
    for steps in ("1", "2"):
        assert run(".", "--write", "overlay", "labels", "--steps", steps) == 0
        assert "1 image in" in capsys.readouterr().out
    results = ["classes.csv", "labels/b.png", "overlay/b.png"]
    assert files(tmp_path / "predictions") == results


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["there.png", "missing.png"], "missing.png: no such file or folder"),
        (["there.png", "x/*.png"], r"x/\*.png: matches no file"),
        (["there.png", "x/**.png"], r"x/\*\*.png: (no such pattern can be|matches no file)"),
        (["empty"], r"empty: no picture or video in it; those end in \.avi, \.avif"),
        (["there.png", "a/there.jpg"], "there.png and a/there.jpg would both be written to pred"),
        (["v/clip.mp4", "b"], r"clip.mp4 and b/clip/000001.png would both be written into"),
    ],
)
def test_inputs_that_cannot_be_come_before_any_work(run, tmp_path, capsys, inputs, message):
    for name in ("there.png", "a/there.jpg", "b/clip/000001.png"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v/clip.mp4", 1)
    assert run(*inputs, "--write", "labels") == 1
    assert re.match(f"predict: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(
    ("inputs", "out"),
    [
        ("photos/images/a.png", "photos"),
        ("photos", "photos/../photos/images"),
        ("photos", "."),
        ("link/images", "photos"),
        ("photos", "link"),
        ("elsewhere", "."),
    ],
)
def test_no_results_where_inputs_are(run, tmp_path, capsys, inputs, out):
    """In a data set of the project's own layout, labels/ holds the truth."""
    path = save(tmp_path / "photos/images/a.png")
    (tmp_path / "link").symlink_to("photos")
    with tempfile.TemporaryDirectory() as other:
        save(Path(other) / "b.png")
        (tmp_path / "elsewhere").symlink_to(other)
        assert run(inputs, "--out", out, "--write", "labels") == 1
    assert re.search(rf"--out {out} holds the input .*\.png; choose", capsys.readouterr().err)
    assert files(tmp_path) == [str(path.relative_to(tmp_path))]


def test_an_input_that_a_link_leads_to_is_never_replaced(run, tmp_path, capsys):
    path = save(tmp_path / "photos/a.png")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/overlay").symlink_to("../photos")
    before = path.read_bytes()
    assert run("photos/a.png") == 1
    assert "overlay/a.png is an input and would be replaced" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_other_classes_are_not_replaced(run, tmp_path, capsys):
    save(tmp_path / "a.png")
    path = tmp_path / "predictions/classes.csv"
    assert run("a.png") == 0 and run("a.png") == 0
    theirs = path.read_text().replace("sky", "clouds")
    path.write_text(theirs)
    assert run("a.png", "--write", "labels") == 1
    assert "classes.csv lists other classes than this network's" in capsys.readouterr().err
    assert path.read_text() == theirs
    assert files(path.parent) == ["classes.csv", "overlay/a.png"]


def test_a_damaged_file_is_named_at_the_end(run, tmp_path, capsys):
    for name in "acd":
        save(tmp_path / f"photos/{name}.png")
    (tmp_path / "photos/b.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (tmp_path / "photos/e.mp4").write_bytes(b"no video")
    assert run("photos", "--write", "labels") == 1
    printed = capsys.readouterr()
    assert "3 images" in printed.out
    first, *rest = printed.err.splitlines()
    assert first == "predict: 2 could not be predicted:"
    assert rest[0].startswith("  photos/b.jpg: no picture, damaged or cut short")
    assert rest[1].startswith("  photos/e.mp4: OpenCV cannot open this video")
    assert files(tmp_path / "predictions/labels") == ["a.png", "c.png", "d.png"]


def test_ctrl_c_leaves_only_whole_files(run, tmp_path, capsys, monkeypatch):
    for name in "abcdefgh":
        save(tmp_path / f"photos/{name}.png")
    call, calls = segment.Segmenter.__call__, []

    def interrupted(self, prepared):
        calls.append(prepared)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return call(self, prepared)

    monkeypatch.setattr(segment.Segmenter, "__call__", interrupted)
    assert run("photos", "--write", "labels") == 130
    assert "predict: interrupted" in capsys.readouterr().err
    written = files(tmp_path / "predictions/labels")
    assert set(written) <= {"a.png", "b.png", "c.png"}
    assert all(labels_of(tmp_path / "predictions/labels" / name) is not None for name in written)


def test_a_full_disk_stops_the_run(run, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for name in "bcdefghijkl":
        save(tmp_path / f"photos/{name}.png")
    (tmp_path / "photos/a.png").write_bytes(b"no picture")
    monkeypatch.setattr(predict, "save_png", full)
    assert run("photos") == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.err and " images in " not in printed.out
    assert "photos/a.png: no picture" in printed.err  # what failed before is said too


def test_a_result_that_cannot_be_written_is_named_at_the_end(run, tmp_path, capsys):
    for name in ("a", "b" * 240, "c" * 253, "d"):  # ".png" is too much for one of them
        image = save(tmp_path / f"photos/{name[:9]}.png")
        image.rename(image.with_name(name))
    write_video(tmp_path / "photos" / ("v" * 250 + ".mp4"), 2)
    assert run(*(tmp_path / "photos").iterdir(), "--write", "labels", "overlay") == 1
    printed = capsys.readouterr()
    assert "5 images in" in printed.out
    (failure,) = printed.err.splitlines()[1:]
    assert "ccc" in failure and "File name too long" in failure
    labels = files(tmp_path / "predictions/labels")
    assert [name[0] for name in labels] == ["a", "b", "d", "v", "v"]
    assert all(not path.name.startswith(".") for path in (tmp_path / "predictions").rglob("*"))


@pytest.mark.parametrize(
    "error", [OSError("width over 8191"), cv2.error("bad"), UnicodeError("name"), MemoryError()]
)
def test_a_bad_video_stops_no_other(run, tmp_path, capsys, monkeypatch, error):
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", 2)
    write, calls = VideoWriter.write, []

    def failing(self, frame):
        calls.append(frame)
        if len(calls) == 1:
            raise error
        write(self, frame)

    monkeypatch.setattr(VideoWriter, "write", failing)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert run("broken.png", "a.mp4", "b.mp4") == 1
    printed = capsys.readouterr()
    assert "2 images in" in printed.out
    _, picture, video = printed.err.splitlines()
    assert picture.startswith("  broken.png: ")
    assert video == f"  a.mp4: {str(error) or 'MemoryError'}"
    assert files(tmp_path / "predictions/overlay") == ["b.mp4"]


def one_bit_png(path, height, width, rows):
    """A PNG of black and white, which says that it has this size."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))


def test_a_file_that_claims_to_be_immense(run, tmp_path, capsys):
    one_bit_png(tmp_path / "bomb.png", 70_000, 70_000, [[0]])
    one_bit_png(tmp_path / "tiny.png", 2, 8, [[0b11110000], [0]])
    assert run("bomb.png", "tiny.png", "--write", "labels") == 1
    assert "bomb.png: " in capsys.readouterr().err
    assert labels_of(tmp_path / "predictions/labels/tiny.png").shape == (2, 8)


def test_pictures_of_any_kind(run, checkpoint, tmp_path):
    image = picture()
    rgb = Image.fromarray(image[..., ::-1])
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("P").save(tmp_path / "palette.gif")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    cv2.imwrite(str(tmp_path / "deep.png"), image.astype(np.uint16) * 256 + 255)
    cv2.imwrite(str(tmp_path / "deep.tiff"), image.astype(np.uint16) * 256)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "turned.webp", lossless=True, exif=exif)
    save(tmp_path / "dot.png", picture(1, 1))
    save(tmp_path / "wide.png", picture(1, 700))
    save(tmp_path / "odd.jpg", picture(33, 71))
    (tmp_path / "deep.tiff").rename(tmp_path / "no_suffix")
    inputs = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(inputs) == 9
    for options in ((), ("--scale", "64x48")):
        assert run(*inputs, "--write", *KINDS, *options) == 0
        shapes = {p.stem: labels_of(p).shape for p in (tmp_path / "predictions/labels").iterdir()}
        assert shapes.pop("turned") == (56, 40)
        assert shapes.pop("dot") == (1, 1)
        assert shapes.pop("wide") == (1, 700)
        assert shapes.pop("odd") == (33, 71)
        assert set(shapes.values()) == {(40, 56)} and len(shapes) == 5
    for name in ("deep", "no_suffix", "alpha"):
        np.testing.assert_array_equal(
            labels_of(tmp_path / "predictions/labels" / f"{name}.png"),
            expected_labels(checkpoint, image, (64, 48)),
        )


def test_only_the_upper_bits_of_deep_pictures_count(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.uint16([[[0, 255, 256], [0x1234, 0xFFFF, 511]]]))
    np.testing.assert_array_equal(
        sources.read_picture(tmp_path / "deep.png"), [[[0, 0, 1], [0x12, 0xFF, 1]]]
    )


def test_video(run, checkpoint, tmp_path, capsys):
    write_video(tmp_path / "drive.mp4", 5)
    write_video(tmp_path / "clip.avi", 3, (33, 47), "MJPG")
    assert run("drive.mp4", "clip.avi", "--write", *KINDS) == 0
    assert "8 images" in capsys.readouterr().out
    out = tmp_path / "predictions"
    assert files(out / "overlay") == ["clip.mp4", "drive.mp4"]
    assert files(out / "labels") == [
        *(f"clip/{number:06}.png" for number in (1, 2, 3)),
        *(f"drive/{number:06}.png" for number in (1, 2, 3, 4, 5)),
    ]
    video, source = (cv2.VideoCapture(str(p)) for p in (out / "overlay/drive.mp4", "drive.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 12.5
    _, colours = read_classes(out / "classes.csv")
    for number in range(1, 6):
        (_, overlay), (_, frame) = video.read(), source.read()
        labels = labels_of(out / f"labels/drive/{number:06}.png")
        np.testing.assert_array_equal(labels, expected_labels(checkpoint, frame))
        expected = (frame[..., ::-1].astype(float) + colours[labels]) / 2
        # the video is compressed
        assert abs(overlay[..., ::-1] - expected).mean() < 12
    assert not video.read()[0]


def test_no_half_video(run, tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "drive.mp4", 20)
    write, written = VideoWriter.write, []

    def failing(self, frame):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(frame)
        write(self, frame)

    monkeypatch.setattr(VideoWriter, "write", failing)
    assert run("drive.mp4") == 130
    assert files(tmp_path / "predictions") == ["classes.csv"]


def test_frames_of_a_longer_run_before_are_removed(run, tmp_path):
    for count in (5, 3):
        write_video(tmp_path / "drive.mp4", count)
        assert run("drive.mp4", "--write", "labels", "color", "overlay") == 0
    for kind in ("labels", "color"):
        frames = [f"{number:06}.png" for number in (1, 2, 3)]
        assert files(tmp_path / "predictions" / kind / "drive") == frames


def test_a_name_with_a_colon_is_no_protocol(run, tmp_path):
    write_video(tmp_path / "a.mp4", 2).rename(tmp_path / "12:30.mp4")
    assert run("12:30.mp4", "--out", "1:2") == 0
    assert files(tmp_path / "1:2/overlay") == ["12:30.mp4"]


def test_frames_that_were_not_written_are_noticed(tmp_path):
    message = r"v\.mp4: only 1 of 2 frames could be written"
    with pytest.raises(OSError, match=message), VideoWriter(tmp_path / "v.mp4", 25) as video:
        video.write(picture(48, 64))
        video.write(picture(64, 48))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("classes", "names", "scale", "name"),
    [
        (19, None, (2048, 1024), "road"),
        (19, cityscapes.CLASSES, (2048, 1024), "road"),
        (19, [f"kind {i}" for i in range(19)], None, "kind 0"),
        (150, None, (2048, 512), "wall"),
        (150, ["wall ", *ade20k.CLASSES[1:-1], "another"], (2048, 512), "wall"),
        (5, None, None, "class 0"),
        (1, None, None, "class 0"),
    ],
)
def test_scale_and_names_where_the_file_has_none(tmp_path, classes, names, scale, name):
    meta = {"CLASSES": names} if names else {}
    model = from_checkpoint(write_checkpoint(tmp_path / "c.pth", classes, **meta))
    found = predict.describe(model)
    assert predict.published_scale(found.published) == scale
    assert found.names[0] == name and len(found.names) == len(found.colours) == max(2, classes)


@pytest.mark.slow
def test_a_published_network_is_run_at_its_scale(run, tmp_path, capsys):
    file = write_checkpoint(tmp_path / "c.pth", 150)
    image = read_image(save(tmp_path / "a.png", picture(60, 90)))
    assert run("a.png", "--write", "labels", file=file) == 0
    assert "150 classes (ade20k), cpu, float32; scale 2048x512" in capsys.readouterr().out
    np.testing.assert_array_equal(
        labels_of(tmp_path / "predictions/labels/a.png"), expected_labels(file, image, (2048, 512))
    )


@pytest.mark.parametrize(("classes", "dtype"), [(1, np.uint8), (256, np.uint8), (300, np.uint16)])
def test_any_number_of_classes(run, tmp_path, classes, dtype):
    file = write_checkpoint(tmp_path / "c.pth", classes)
    image = read_image(save(tmp_path / "a.png"))
    for tile in ("none", "64"):
        assert run("a.png", "--write", *KINDS, "--tile", tile, file=file) == 0
        labels = labels_of(tmp_path / "predictions/labels/a.png")
        assert labels.dtype == dtype
        np.testing.assert_array_equal(labels, expected_labels(file, image))


def test_options_reach_the_network(run, checkpoint, tmp_path):
    image = read_image(save(tmp_path / "a.png"))
    for options, how in {
        ("--coarse",): {"refine": False},
        ("--steps", "1"): {"steps": 1},
        ("--points", "9"): {"num_points": 9},
    }.items():
        assert run("a.png", "--write", "labels", "uncertainty", *options) == 0
        labels = labels_of(tmp_path / "predictions/labels/a.png")
        np.testing.assert_array_equal(labels, expected_labels(checkpoint, image, **how))
        assert (labels != expected_labels(checkpoint, image)).any()


def test_reduced_precision(run, tmp_path, checkpoint):
    image = read_image(save(tmp_path / "a.png"))
    assert run("a.png", "--write", *KINDS, "--dtype", "bfloat16") == 0
    labels = labels_of(tmp_path / "predictions/labels/a.png")
    assert (labels == expected_labels(checkpoint, image)).mean() > 0.9


def test_tiles_give_every_kind_too(run, tmp_path):
    save(tmp_path / "a.png", picture(100, 150))
    found = {}
    for tile in ("64", "none"):
        assert run("a.png", "--write", *KINDS, "--tile", tile, "--out", tile) == 0
        found[tile] = {kind: read_image(tmp_path / tile / kind / "a.png") for kind in KINDS}
    for kind in KINDS:
        assert found["64"][kind].shape == found["none"][kind].shape
        assert (found["64"][kind] != found["none"][kind]).any()
    assert (found["64"]["labels"] == found["none"]["labels"]).mean() > 0.7


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("Unable to allocate 9 TiB for an array"),
    ],
)
def test_out_of_memory_goes_on_in_tiles(run, tmp_path, monkeypatch, capsys, error):
    save(tmp_path / "large.png", picture(300, 400))
    save(tmp_path / "small.png", picture(200, 100))
    maps, seen = Predictor.__call__, []

    def call(self, images, *args, **kwargs):
        seen.append(tuple(images.shape[2:]))
        if images.shape[3] > 256:
            raise error
        return maps(self, images, *args, **kwargs)

    monkeypatch.setattr(Predictor, "__call__", call)
    assert run("large.png", "small.png", "--write", "labels") == 0
    assert seen == [(300, 400), (200, 100)]
    assert labels_of(tmp_path / "predictions/labels/large.png").shape == (300, 400)
    capsys.readouterr()
    assert run("large.png", "small.png", "--tile", "none") == 1
    printed = capsys.readouterr()
    assert "1 image in" in printed.out
    assert "large.png: 400x300 pixels do not fit into the memory of cpu" in printed.err


def test_other_errors_are_not_taken_for_want_of_memory(run, tmp_path, monkeypatch):
    def call(*_, **__):
        raise RuntimeError("a fault")

    save(tmp_path / "a.png")
    monkeypatch.setattr(Predictor, "__call__", call)
    with pytest.raises(RuntimeError, match="a fault"):
        run("a.png", "--compile")


def test_a_device_that_is_full(run, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    save(tmp_path / "a.png")
    monkeypatch.setattr(predict, "Predictor", full)
    assert run("a.png") == 1
    assert capsys.readouterr().err.startswith("predict: --device cpu: too little of its memory")


def test_a_system_without_compiler(run, tmp_path, monkeypatch, capsys):
    def call(*_, **__):
        raise InductorError(InvalidCxxCompiler(), None)

    save(tmp_path / "a.png")
    monkeypatch.setattr(Predictor, "__call__", call)
    assert run("a.png", "--compile") == 1
    message = "predict: --compile is not possible here: .*No working C.. compiler found"
    assert re.match(message, capsys.readouterr().err)


def test_float32_is_without_tf32(run, tmp_path, monkeypatch):
    call, seen = Predictor.__call__, []

    def look(*args, **options):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return call(*args, **options)

    save(tmp_path / "a.png")
    monkeypatch.setattr(Predictor, "__call__", look)
    precision.set_tf32(True)
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # by a name that disagrees with the older
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert run("a.png") == 0
    assert seen == ["ieee"] and torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coarse", "--steps", "1"], "--steps needs the refinement; --coarse does without"),
        (["--coarse", "--write", "compare"], "--write compare needs the refinement"),
        (["--out", "a.png"], "--out a.png is a file; it must name a folder"),
        (["--device", "cuda:99"], "--device 'cuda:99' is no device here"),
    ],
)
def test_arguments_that_do_not_fit_each_other(run, tmp_path, capsys, options, message):
    save(tmp_path / "a.png")
    assert run("a.png", *options) == 1
    assert capsys.readouterr().err.startswith(f"predict: {message}")
    assert files(tmp_path) == ["a.png"]


def test_a_network_without_point_head(run, tmp_path, capsys):
    file = write_checkpoint(tmp_path / "fpn.pth", point_head=None)
    save(tmp_path / "a.png")
    assert run("a.png", "--write", "overlay", "uncertainty", file=file) == 0
    assert run("a.png", "--write", "points", file=file) == 1
    assert "which has no point head, does without" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--scale", "2048"],
        ["--scale", "0x5"],
        ["--tile", "100"],
        ["--tile", "32"],
        ["--steps", "0"],
        ["--points", "-3"],
        ["--write", "video"],
    ],
)
def test_bad_options_are_refused_by_the_parser(run, options, capsys):
    with pytest.raises(SystemExit) as stop:
        run("a.png", *options)
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_checkpoint_that_is_none(run, tmp_path, capsys):
    save(tmp_path / "a.png")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    assert run("a.png", file=tmp_path / "bad.pth") == 1
    assert run("a.png", file=tmp_path / "missing.pth") == 1
    assert capsys.readouterr().err.count("predict: ") == 2


def test_help_shows_examples_that_parse(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    text = capsys.readouterr().out
    examples = re.findall(r"python -m pointrend_triton\.predict ((?!\[).*)", text)
    assert len(examples) >= 3
    for example in examples:
        predict.parse_arguments(example.replace("'", "").split())
