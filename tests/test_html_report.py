"""The report of an evaluation: what is in it, and that a browser shows it."""

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch

import evaluate
from pointrend_triton import build_model, report
from pointrend_triton.config import ModelConfig
from pointrend_triton.data import build_dataset
from pointrend_triton.data.shapes import Shapes
from pointrend_triton.environment import environment
from pointrend_triton.html_report import Example, examples, page, write_report
from pointrend_triton.metrics import SegmentationMetrics

HOSTILE = "<script>alert(1)</script>"
SIZES = {"depth": 18, "base_channels": 8, "fpn_channels": 16, "head_channels": 8}
HEAD = {"channels": 16, "subdivision_num_points": 64}
DATA = ["data.shapes_size=[32,48]", "data.shapes_eval_images=5"]
# --version tells a real one from a stub that only says how to install it
BROWSERS = (
    "google-chrome",
    "chromium",
    "chromium-browser",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
# opens the page as it is, in frames as wide as a phone and a desktop, and writes what it finds
PROBE = """<!DOCTYPE html>
<iframe src="index.html" style="width:360px;height:700px"></iframe>
<iframe src="index.html" style="width:1280px;height:700px"></iframe>
<pre></pre>
<script>
function look(view) {
  const page = view.document;
  const input = page.querySelector(".slider input");
  const clips = [50, 20, 90].map((value) => {
    input.value = value;
    input.dispatchEvent(new view.Event("input"));
    return view.getComputedStyle(page.querySelector(".layer + .layer")).clipPath;
  });
  page.querySelector(".matrix g rect").dispatchEvent(new view.Event("click", {bubbles: true}));
  page.querySelector(".tiles button").click();
  return {
    innerWidth: view.innerWidth,
    scrollWidth: page.documentElement.scrollWidth,
    images: page.images.length,
    broken: [...page.images].filter((image) => !image.naturalWidth).length,
    without_text: [...page.images].filter((image) => !image.alt).length,
    clips,
    readout: page.querySelector(".readout").textContent,
    enlarged: page.querySelector("dialog[open] img").alt,
    scripts: page.scripts.length,
    loaded: view.performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 60)),
  };
}
onload = () => {
  const found = Array.from(frames, look);
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    model = build_model({"model": {"num_classes": 8, "point_head": HEAD, **SIZES}})
    torch.nn.init.normal_(model.coarse_head.conv_seg.weight, std=2)
    path = tmp_path_factory.mktemp("run") / "<b>tiny & bold.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return path


def run(checkpoint, folder, *options):
    given = ["shapes_r18", str(checkpoint), *DATA, "--device", "cpu", "--report", str(folder)]
    return evaluate.main([*given, *options])


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    """The page of both methods, with a class and file names that would be tags."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shapes, "classes", (HOSTILE, *Shapes.classes[1:]))
        patch.setattr(Shapes, "stem", lambda self, index: f"<img src=x>\udcff{index}")
        assert run(checkpoint, folder, "--both", "--json", str(folder / "scores.json")) == 0
    return folder / "index.html"


def text_of(path):
    return html.unescape(re.sub("<[^>]*>", " ", path.read_text("utf-8")))


@pytest.fixture(scope="session")
def browser():
    for name in BROWSERS:
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.skip("no Chromium or Chrome is installed here")


@pytest.mark.slow
def test_a_browser_shows_it(browser, written, tmp_path):
    shutil.copy(written, tmp_path / "index.html")
    (tmp_path / "probe.html").write_text(PROBE)
    options = [
        "--headless=new",
        "--no-sandbox",  # which root may not use
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--allow-file-access-from-files",  # so that the probe may look into the frames
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=10000",
        "--dump-dom",
    ]
    shown = subprocess.run(
        [browser, *options, (tmp_path / "probe.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        # its crash reporter writes to the home, whatever the profile
        env=os.environ | {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")},
    )
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert not said, "\n".join(said)
    (found,) = re.findall("<pre>(.*?)</pre>", shown.stdout, re.DOTALL)
    assert found, f"the probe did not finish: {shown.stderr}"
    for seen, width in zip(json.loads(html.unescape(found)), (360, 1280), strict=True):
        assert seen["innerWidth"] == width and seen["scrollWidth"] <= width
        assert seen["images"] >= 3 * 8 and seen["broken"] == seen["without_text"] == 0
        assert seen["clips"] == [f"inset(0px 0px 0px {at}%)" for at in (50, 20, 90)]
        assert seen["readout"].endswith("% of its pixels")
        assert seen["enlarged"] == "image"
        assert seen["scripts"] == 1
        assert not [name for name in seen["loaded"] if not name.startswith("data:")]


def test_the_page_needs_no_other_file(written):
    addresses = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            kinds = ("src", "href", "srcset", "action", "data", "poster")
            addresses.extend(value for name, value in attributes if name in kinds)

    text = written.read_text("utf-8")
    Reader().feed(text)
    assert len(addresses) > 20
    assert all(a.startswith(("#", "data:image/")) for a in addresses)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in text
    assert [p.name for p in written.parent.iterdir() if p.name != "scores.json"] == ["index.html"]


def test_text_from_files_stays_text(written):
    text = written.read_text("utf-8")
    assert text.count("<script") == 1 and "<img src=x" not in text and "<b>tiny" not in text
    assert html.escape(HOSTILE, quote=False) in text and "&lt;img src=x&gt;?" in text
    assert "&lt;b&gt;tiny &amp; bold.pth" in text


def test_the_figures_are_those_of_the_result_file(written):
    record = json.loads((written.parent / "scores.json").read_text())
    shown = " ".join(text_of(written).split())
    coarse, refined = (record["results"][method] for method in ("coarse", "refined"))
    for name, key in {"mIoU": "miou", "aAcc": "aacc", "Boundary IoU": "mean_boundary_iou"}.items():
        gain = f"{refined[key] - coarse[key]:+.2f}".replace("-", "−")
        assert f" {name} {coarse[key]:.2f} {refined[key]:.2f} {gain} " in shown
    for before, after in zip(coarse["classes"][1:], refined["classes"][1:], strict=True):
        if before["iou"] is not None and after["iou"] is not None:
            assert f" {before['iou']:.2f} {after['iou']:.2f} " in shown
    assert record["checkpoint"]["sha256"] in shown and record["command"] in shown
    assert "5 of 5 images" in shown and "single scale" in shown


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([{4: 10.0, 5: 30.0, 6: 20.0}], {5: "Best", 6: "Median", 4: "Worst"}),
        ([{4: 10.0, 5: 20.0}], {5: "Best and median", 4: "Worst"}),
        ([{4: 10.0, 5: math.nan}], {4: "The only image"}),
        ([{4: math.nan}], {}),
        (
            [{1: 9.0, 2: 10.0, 3: 30.0, 4: 39.0}, {1: 10.0, 2: 20.0, 3: 30.0, 4: 40.0}],
            {4: "Best", 3: "Median", 1: "Worst", 2: "Largest gain"},
        ),
    ],
)
def test_which_images_are_shown(scores, expected):
    methods = ("coarse", "refined")[-len(scores) :]
    assert examples.choose(dict(zip(methods, scores, strict=True))) == expected


@pytest.mark.parametrize("options", [["--coarse"], [], ["--ms-flip", "--limit", "1"]])
def test_one_method_alone_has_no_comparison(checkpoint, tmp_path, options):
    assert run(checkpoint, tmp_path / "new" / "folder", *options) == 0
    root = tmp_path / "new" / "folder" / "index.html"
    shown, text = " ".join(text_of(root).split()), root.read_text("utf-8")
    assert " gain " not in shown and "corrected and spoiled" not in shown
    assert 'type="range"' not in text and 'class="single"' in text
    assert ("refined points" in shown) is ("--coarse" not in options)
    assert ("six scales and flip" in shown) is ("--ms-flip" in options)


def record_of(metrics, classes):
    return {
        **environment(torch.device("cpu")),
        "command": "python evaluate.py",
        "config": "made_up",
        "checkpoint": {"file": "x.pth", "sha256": "0", "iteration": None},
        "data": {"dataset": "made up", "split": "val", "images": 1},
        "protocol": {
            "scale": None,
            "multi_scale_flip": False,
            "amp": True,
            "limit": None,
            "only": None,
        },
        "model": ModelConfig(num_classes=len(classes)),
        "results": {method: report.result(classes, m) for method, m in metrics.items()},
    }


def many_classes(count):
    rng = np.random.default_rng(0)
    metrics = {method: SegmentationMetrics(count) for method in ("coarse", "refined")}
    truth = rng.integers(0, count - 1, (40, 60))
    for counted, share in zip(metrics.values(), (0.5, 0.3), strict=True):
        wrong = rng.random(truth.shape) < share
        counted.update(np.where(wrong, (truth + 1) % (count - 1), truth), truth)
    return metrics, [f"class {c}" for c in range(count)]


@pytest.mark.parametrize("count", [2, 30, 255])
def test_any_number_of_classes(tmp_path, count):
    metrics, classes = many_classes(count)
    confusions = {method: counted.confusion for method, counted in metrics.items()}
    palette = np.zeros((count, 3), np.uint8)
    path = write_report(tmp_path, record_of(metrics, classes), confusions, [], palette)
    text, shown = path.read_text("utf-8"), text_of(path)
    assert path.stat().st_size < 2_000_000
    # the last class is in neither map
    assert text.count("<small>absent</small>") == 2 and "–" in shown
    assert "No image has a pixel" in shown and "bfloat16 autocast" in shown
    if count > 2:
        assert "class 3 taken for class 4: " in shown


def test_the_matrix_has_shares_of_the_true_classes():
    drawing = page.matrix(["a", "b"], np.array([[3, 1], [0, 10]]))
    titles = [cell.text for cell in drawing.iter("title")]
    assert titles == [
        "a: 75.0 % of its pixels",
        "a taken for b: 25.0 % of its pixels",
        "b: 100.0 % of its pixels",
    ]
    across, down = ([float(r.get(k)) for r in drawing.iter("rect")] for k in ("x", "y"))
    # the first is the ground
    assert across[1:] == [across[0], across[0] + 34, across[0] + 34]
    assert down[1:] == [down[0], down[0], down[0] + 34]


def test_the_largest_confusions_come_first():
    confusion = np.array([[50, 30, 20], [0, 90, 10], [5, 0, 5]])
    found = page.largest_confusions(["a", "b", "c"], {"refined": confusion})
    rows = [[cell.text for cell in row] for row in found.iter("tr")][1:]
    assert rows == [
        ["a", "b", "30.00", "46.15"],
        ["a", "c", "20.00", "30.77"],
        ["b", "c", "10.00", "15.38"],
        ["c", "a", "50.00", "7.69"],
    ]
    right = page.largest_confusions(["a"], {"refined": np.array([[1]])})
    assert right.text == "No pixel is wrong."


def test_large_pictures_are_shrunk():
    image = np.zeros((300, 2000, 3), np.uint8)
    labels = np.zeros((300, 2000), np.uint8)
    example = Example("Best", "wide", {"refined": 50.0}, image, labels, {"refined": labels}, [])
    drawn = examples.figure(example, ["a"], np.zeros((1, 3), np.uint8))
    sizes = {(int(i.get("width")), int(i.get("height"))) for i in drawn.iter("img")}
    assert sizes == {(1000, 150)}


def test_a_large_picture_has_a_detail_where_most_changes():
    image = np.zeros((400, 600, 3), np.uint8)
    image[250:325, 400:500] = 200
    before, after = np.zeros((2, 400, 600), np.uint8)
    # in the bright window; the ignored change elsewhere is larger
    after[260:320, 410:495] = after[:200, :200] = 1
    truth = np.where(np.arange(400)[:, None] < 200, 255, np.zeros((400, 600))).astype(np.uint8)
    predictions = {"coarse": before, "refined": after}
    example = Example("Best", "big", dict.fromkeys(predictions, 5.0), image, truth, predictions, [])
    (detail,) = examples._detail(example, np.uint8([[0] * 3, [90] * 3]))
    first, second = detail.iter("img")
    assert (int(first.get("width")), int(first.get("height"))) == (133, 99)
    assert first.get("src") != second.get("src")
    data = base64.b64decode(second.get("src").partition(",")[2])
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    # all of the changed area is within: 60 x 85 pixels of 0.4 * 200 + 0.6 * 90
    assert (picture == 134).sum() >= 60 * 85


def test_what_the_refinement_changes():
    truth = np.array([[0, 0, 0, 0, 255]])
    before, after = np.array([[0, 1, 0, 1, 1]]), np.array([[0, 0, 1, 1, 0]])
    picture = examples.changes(np.full((1, 5, 3), 30, np.uint8), truth, before, after)
    dark = (10, 10, 10)
    expected = [dark, examples.BLUE, examples.ORANGE, dark, dark]
    assert [tuple(pixel) for pixel in picture[0].tolist()] == expected


def test_text_and_elements_mix():
    made = page.element(
        "p", "a<", page.element("b", "c"), "d", "e", class_="x", hidden=True, id=None
    )
    assert ElementTree.tostring(made) == b'<p class="x" hidden="">a&lt;<b>c</b>de</p>'


def test_reports_that_cannot_be(checkpoint, tmp_path, monkeypatch, capsys):
    def no_work(*args, **options):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(evaluate, "evaluate_dataset", no_work)
    (tmp_path / "file").write_text("")
    assert run(checkpoint, tmp_path / "file" / "below") == 1
    assert "Not a directory" in capsys.readouterr().err
    assert run(checkpoint, tmp_path / "file") == 1
    assert "--report" in (said := capsys.readouterr().err) and "must name a folder" in said

    def without_labels(*args, **options):
        dataset = build_dataset(*args, **options)
        dataset.has_labels = False
        return dataset

    monkeypatch.setattr(evaluate, "build_dataset", without_labels)
    assert run(checkpoint, tmp_path / "folder") == 1
    assert "--report needs labels; shapes val has none" in capsys.readouterr().err
    assert not Path(tmp_path / "folder").exists()


def test_scores_are_kept_if_the_page_fails(checkpoint, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("the page failed")

    monkeypatch.setattr(evaluate, "write_report", fail)
    assert run(checkpoint, tmp_path, "--limit", "1", "--json", str(tmp_path / "scores.json")) == 1
    assert json.loads((tmp_path / "scores.json").read_text())["results"]["refined"]["images"] == 1
