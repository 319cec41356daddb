"""Reading files: what is decoded how; damage and lossy conversions are named, not hidden."""

import io
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pointrend_triton.data import DataError, MissingDataError, read_image, read_label
from pointrend_triton.data.io import read_classes


def picture(height=24, width=40, seed=0):
    """Smooth enough to survive JPEG, different in every quadrant."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)


def saved(array, path, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options)
    return path


def encoded(array, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def test_image_is_bgr_and_lossless_from_png(tmp_path):
    rgb = picture()
    assert np.array_equal(read_image(saved(rgb, tmp_path / "a.png")), rgb[..., ::-1])


def test_grey_palette_and_alpha_become_three_channels(tmp_path):
    rgb = picture()
    grey = rgb[..., 0]
    read = read_image(saved(grey, tmp_path / "grey.png"))
    assert np.array_equal(read, np.repeat(grey[..., None], 3, axis=2))

    indexed = Image.fromarray(rgb).quantize(16)
    indexed.save(tmp_path / "palette.png")
    expected = np.array(indexed.convert("RGB"))[..., ::-1]
    assert np.array_equal(read_image(tmp_path / "palette.png"), expected)

    alpha = np.dstack([rgb, np.full(grey.shape, 100, np.uint8)])
    assert np.array_equal(read_image(saved(alpha, tmp_path / "rgba.png")), rgb[..., ::-1])


def test_exif_orientation_turns_the_image(tmp_path):
    rgb = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    upright = read_image(saved(rgb, tmp_path / "plain.jpg", quality=95))
    turned = read_image(saved(rgb, tmp_path / "turned.jpg", quality=95, exif=exif))
    assert np.array_equal(turned, np.rot90(upright, -1))


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3)], ids=["grey", "colour"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_images_are_refused(tmp_path, shape, suffix):
    path = tmp_path / f"deep.{suffix}"
    cv2.imwrite(str(path), np.full(shape, 300, np.uint16))
    with pytest.raises(DataError, match=r"deep\.\w+: uint16 channels.*8 bits"):
        read_image(path)


@pytest.mark.parametrize("reader", [read_image, read_label])
def test_unreadable_files_are_named(tmp_path, reader):
    with pytest.raises(MissingDataError, match="absent.png: no such file"):
        reader(tmp_path / "absent.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="empty.png: the file is empty"):
        reader(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("this is no picture")
    with pytest.raises(DataError, match="text.png"):
        reader(tmp_path / "text.png")
    with pytest.raises(DataError, match=tmp_path.name):
        reader(tmp_path)


def test_a_missing_file_is_also_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


KINDS = {
    "baseline": encoded(picture(), "JPEG", quality=90),
    "progressive": encoded(picture(), "JPEG", progressive=True),
    "restarts": encoded(picture(64, 64), "JPEG", restart_marker_rows=1),
    "thumbnail": encoded(picture(), "JPEG", comment=encoded(picture(8, 8), "JPEG")),
    "png": encoded(picture(), "PNG"),
    "webp": encoded(picture(), "WEBP", lossless=True),
    "tiff": encoded(picture(), "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read_also_with_bytes_behind_them(tmp_path, kind):
    path = tmp_path / kind
    path.write_bytes(KINDS[kind])
    plain = read_image(path)
    path.write_bytes(KINDS[kind] + b"\xff\xda trailing bytes, as cameras write")
    assert np.array_equal(read_image(path), plain)


@given(
    kind=st.sampled_from(["baseline", "progressive", "restarts", "thumbnail", "png"]),
    data=st.data(),
)
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, kind, data):
    whole = KINDS[kind]
    length = data.draw(st.integers(1, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / "cut.img"
    path.write_bytes(whole[:length])
    with pytest.raises(DataError, match="cut.img"):
        read_image(path)


@pytest.mark.parametrize("kind", ["webp", "tiff"])
def test_other_formats_cut_short_are_refused(tmp_path, kind):
    path = tmp_path / "cut.img"
    path.write_bytes(KINDS[kind][: len(KINDS[kind]) * 2 // 3])
    with pytest.raises(DataError, match="cut.img"):
        read_image(path)


def test_a_png_with_a_changed_byte_is_refused(tmp_path):
    data = bytearray(KINDS["png"])
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(data)
    with pytest.raises(DataError, match="flipped.png: .*damaged"):
        read_image(tmp_path / "flipped.png")


@pytest.mark.slow
def test_a_damaged_png_is_reported_by_our_sentence_alone(tmp_path):
    whole = KINDS["png"]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.png").write_bytes(flipped)
    script = "import sys; from pointrend_triton.data import read_image; read_image(sys.argv[1])"
    guarded = f"try:\n    {script}\nexcept ValueError as error:\n    sys.exit(error)"
    unset = {name: value for name, value in os.environ.items() if name != "OPENCV_LOG_LEVEL"}

    def complaint(name, env):
        command = [sys.executable, "-c", guarded, name]
        return subprocess.run(command, capture_output=True, text=True, env=env).stderr.splitlines()

    cut, flipped = str(tmp_path / "cut.png"), str(tmp_path / "flipped.png")
    ours = f"{cut}: no picture, damaged or cut short ({len(whole) // 2} bytes)"
    assert complaint(cut, unset) == [ours]
    # who asks OpenCV to speak is not overruled
    assert any("WARN" in line for line in complaint(cut, unset | {"OPENCV_LOG_LEVEL": "WARNING"}))
    # libpng writes to stderr by itself
    lines = [line for line in complaint(flipped, unset) if not line.startswith("libpng ")]
    assert lines == [f"{flipped}: no picture, damaged or cut short ({len(whole)} bytes)"]


def test_labels_keep_all_256_values_grey_or_palette(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(8, 32)
    assert np.array_equal(read_label(saved(values, tmp_path / "grey.png")), values)
    indexed = Image.fromarray(values, "P")
    indexed.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    indexed.save(tmp_path / "palette.png")
    assert np.array_equal(read_label(tmp_path / "palette.png"), values)


def test_a_small_palette_label_is_read_by_index(tmp_path):
    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    indexed = Image.fromarray(values, "P")
    indexed.putpalette([9] * 48)
    indexed.save(tmp_path / "p.png", bits=4)
    assert (tmp_path / "p.png").read_bytes()[24] == 4
    assert np.array_equal(read_label(tmp_path / "p.png"), values)


def test_labels_that_would_change_are_refused(tmp_path):
    rgb = picture()
    cases = {
        "rgb.png": Image.fromarray(rgb),
        "rgba.png": Image.fromarray(rgb).convert("RGBA"),
        "la.png": Image.fromarray(rgb).convert("LA"),
        "one.png": Image.fromarray(rgb).convert("1"),
        "deep.png": Image.fromarray(np.full((4, 4), 3, np.uint16)),
    }
    for name, image in cases.items():
        image.save(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: Pillow mode .*mode L or P"):
            read_label(tmp_path / name)
    saved(rgb[..., 0], tmp_path / "lossy.jpg")
    with pytest.raises(DataError, match="lossy.jpg: a JPEG"):
        read_label(tmp_path / "lossy.jpg")


def test_a_4_bit_grey_label_is_refused_because_pillow_stretches_it(tmp_path):
    import struct
    import zlib

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(b"\x00\x12")) + chunk(b"IEND", b"")
    (tmp_path / "four.png").write_bytes(data)
    assert np.array(Image.open(tmp_path / "four.png")).tolist() == [[17, 34]]  # stored: 1, 2
    with pytest.raises(DataError, match="four.png: 4 bits per pixel"):
        read_label(tmp_path / "four.png")


def test_a_label_cut_short_is_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 9, (64, 64), dtype=np.uint8)
    whole = encoded(values, "PNG")
    for length in (10, 40, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut.png"):
            read_label(tmp_path / "cut.png")


def test_class_table(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("index,name,r,g,b,note\n1,car,0,0,142,x\n0,road,128,64,128,\n255,void,0,0,0,\n")
    classes, palette = read_classes(path)
    assert classes == ("road", "car")
    assert palette.tolist() == [[128, 64, 128], [0, 0, 142]]


def test_class_table_without_colours_gets_distinct_ones(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("index,name\n" + "".join(f"{i},class {i}\n" for i in range(255)))
    classes, palette = read_classes(path)
    assert len(classes) == 255
    assert len({tuple(colour) for colour in palette.tolist()}) == 255
    # 43 = 0b101011; its bits, lowest first, go to r, g, b in turn: r 1 1, g 1 0, b 0 1
    assert palette[43].tolist() == [0b11000000, 0b10000000, 0b01000000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number,name\n0,a\n", r"no column \['index'\]"),
        ("index,name\n0,a\n2,b\n", r"without gaps, not \[0, 2\]"),
        ("index,name\n0,a\n0,b\n", "line 3: index 0 appears twice"),
        ("index,name\nzero,a\n", "line 2: not a whole number"),
        ("index,name,r,g,b\n0,a,1,2,256\n", r"line 2: colour \[1, 2, 256\]"),
        ("index,name,r,g,b\n0,a,1,2\n", "line 2: not a whole number"),
        ("", "no column"),
        ("index,name\n", r"without gaps, not \[\]"),
    ],
)
def test_class_table_errors(tmp_path, text, message):
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=f"classes.csv.*{message}"):
        read_classes(path)


def test_class_table_in_another_encoding(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_bytes("index,name\n0,Straße\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.csv: byte 0xdf is not UTF-8"):
        read_classes(path)
    path.write_text("index,name\n0,a\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"classes\.csv: byte 0xf[ef] is not UTF-8"):
        read_classes(path)


def test_class_table_that_is_no_csv(tmp_path):
    path = tmp_path / "classes.csv"
    # a quote that is never closed takes in the rest of the file
    path.write_text('index,name\n0,"a\n' + "b" * 200_000)
    with pytest.raises(DataError, match=r"classes\.csv: field larger .* in CSV"):
        read_classes(path)
