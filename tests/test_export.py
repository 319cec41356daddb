"""Exported files, run outside of the package at several sizes, do what the model does."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import UserErrorType
from torch.export import Dim
from torch.torch_version import TorchVersion

from pointrend_triton import export as exporting
from pointrend_triton import export_formats, reference
from pointrend_triton.checkpoint import save_checkpoint
from pointrend_triton.config import ModelConfig, PointHeadConfig
from pointrend_triton.export import ExportError, export, main
from pointrend_triton.exportable import Exportable, topk_on_grid, trace
from pointrend_triton.models import PointRend

POINTS = 600
HEAD = PointHeadConfig(channels=8, subdivision_num_points=POINTS)
# the grids of the first step have 34 to 2 x 1024 cells: fewer than POINTS, and more
SIZES = ((1, 33, 65), (2, 96, 128), (3, 97, 40))

open_sizes = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13", reason="an older PyTorch exports fixed sizes only"
)


def make(classes: int = 5, point_head: PointHeadConfig | None = HEAD) -> PointRend:
    """As after training: blocks that are not the identity, logits that are not all but zero."""
    torch.manual_seed(0)
    widths = {"depth": 18, "base_channels": 8, "fpn_channels": 8, "head_channels": 8}
    model = PointRend(ModelConfig(num_classes=classes, point_head=point_head, **widths))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    for name, parameter in model.named_parameters():
        if "seg.weight" in name:
            nn.init.normal_(parameter)
    model.classes = tuple(f"class {i}" for i in range(classes))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> PointRend:
    return make()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def onnx_packages() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)


@pytest.fixture(scope="module")
def plain_onnx(onnx_packages: None, model: PointRend, folder: Path) -> Path:
    path = folder / "plain.onnx"
    export(model, path, batch=None)
    return path


@pytest.fixture(scope="module")
def limited_onnx(onnx_packages: None, model: PointRend, folder: Path) -> Path:
    path = folder / "limited.onnx"
    export(model, path, batch=None, output="logits", topk_limit=250)
    return path


def run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def topk_counts(path: Path) -> list[int]:
    """K of every TopK, all of which must be constants."""
    import onnx

    graph = onnx.load(path).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return [constants[node.input[1]].item() for node in graph.node if node.op_type == "TopK"]


@open_sizes
@pytest.mark.slow
@pytest.mark.parametrize("shape", SIZES)
def test_onnx_does_what_the_model_does_at_every_size(
    model: PointRend, plain_onnx: Path, limited_onnx: Path, shape: tuple[int, int, int]
) -> None:
    images = torch.randn(shape[0], 3, *shape[1:])
    expected = model(images)
    logits = run_onnx(limited_onnx, images)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    labels = run_onnx(plain_onnx, images)
    assert labels.dtype == torch.uint8
    # the limit changes no choice, so not a bit of the labels
    assert torch.equal(labels, logits.argmax(1).to(torch.uint8))
    assert torch.equal(labels, model.predict(images))


@pytest.mark.slow
def test_onnx_of_a_fixed_size(onnx_packages: None, model: PointRend, tmp_path: Path) -> None:
    export(model, tmp_path / "fixed.onnx", size=(40, 56), normalise=True, topk_limit=250)
    pictures = exporting.example_pictures((1, 3, 40, 56))
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (exporting.MEAN, exporting.STD))
    expected = model.predict((pictures.float() - mean) / std)
    assert torch.equal(run_onnx(tmp_path / "fixed.onnx", pictures), expected)


@open_sizes
@pytest.mark.slow
def test_topk_of_onnx_is_constant_and_limited(plain_onnx: Path, limited_onnx: Path) -> None:
    # 2 of them for the margins; 600 = 250 + 250 + 100, for each of two steps
    assert sorted(topk_counts(plain_onnx)) == [2, 2, POINTS, POINTS]
    assert sorted(topk_counts(limited_onnx)) == [2, 2, 100, 100, 250, 250, 250, 250]


@open_sizes
@pytest.mark.slow
def test_onnx_says_what_it_is(model: PointRend, plain_onnx: Path) -> None:
    import onnx

    written = onnx.load(plain_onnx)
    onnx.checker.check_model(written, full_check=True)
    (opset,) = written.opset_import  # one: nothing but ONNX's own operators
    assert opset.domain == "" and opset.version >= 16
    (images,), (labels,) = written.graph.input, written.graph.output
    assert images.name == "images" and labels.name == "labels"
    sizes = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]
    sizes = [d.dim_param or d.dim_value for d in labels.type.tensor_type.shape.dim]
    assert sizes == ["batch", "height", "width"]
    facts = {entry.key: json.loads(entry.value) for entry in written.metadata_props}
    assert facts["classes"] == list(model.classes or ())
    assert facts["mean"] == list(exporting.MEAN) and facts["std"] == list(exporting.STD)
    assert facts["channels"] == "RGB" and facts["num_points"] == POINTS
    # one file; no paths of this machine in it
    assert {path.suffix for path in plain_onnx.parent.iterdir()} == {".onnx"}
    assert str(Path(exporting.__file__).parent).encode() not in plain_onnx.read_bytes()


@open_sizes
@pytest.mark.slow
def test_program_takes_pictures_of_any_size(model: PointRend, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    export(model, path, normalise=True, num_points=100, steps=1)
    facts = {"metadata.json": ""}
    run = torch.export.load(path, extra_files=facts).module()
    assert json.loads(facts["metadata.json"])["num_points"] == "100"
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (exporting.MEAN, exporting.STD))
    for size in ((33, 65), (96, 128)):
        pictures = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        expected = model.predict((pictures.float() - mean) / std, num_points=100, steps=1)
        assert torch.equal(run(pictures), expected)
    with pytest.raises(AssertionError, match="33"):
        run(torch.zeros(1, 3, 32, 64, dtype=torch.uint8))


@pytest.mark.slow
def test_compiled_package(model: PointRend, tmp_path: Path) -> None:
    path = tmp_path / "model.aoti.pt2"
    export(model, path, size=(40, 56), output="logits", steps=1)
    run = torch._inductor.aoti_load_package(str(path))
    images = torch.randn(1, 3, 40, 56)
    expected = model(images, steps=1)
    assert (run(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert json.loads(run.get_metadata()["output"]) == "logits"


@pytest.mark.parametrize(
    "classes, head", [(1, HEAD), (5, None), (300, HEAD)], ids=["one logit", "no head", "int64"]
)
def test_kinds_of_models(classes: int, head: PointHeadConfig | None) -> None:
    model = make(classes, head)
    images = torch.randn(1, 3, 40, 56)
    program, _ = trace(Exportable(model), (40, 56), 1)
    assert torch.equal(program.module()(images), model.predict(images))


def test_reduced_precision_gives_labels_of_the_model(model: PointRend) -> None:
    exportable = Exportable(model, dtype=torch.float16, output="logits")
    images = torch.randn(1, 3, 40, 56)
    logits = exportable(images)
    assert logits.dtype == torch.float32
    assert (logits.argmax(1) == model.predict(images)).float().mean() > 0.98


@pytest.mark.parametrize("k, limit", [(1, 2), (10, None), (10, 3), (10, 5), (12, 100), (50, 7)])
def test_topk_in_takes_is_topk(k: int, limit: int | None) -> None:
    scores = torch.randn(2, 1, 6, 7)
    indices, coords = topk_on_grid(scores, k, limit=limit)
    expected, centres = reference.topk_on_grid(scores, k)
    assert torch.equal(indices, expected) and torch.equal(coords, centres)


def test_topk_in_takes_chooses_among_equals() -> None:
    scores = torch.randint(-3, 0, (1, 1, 9, 9)).float()
    for k in (5, 40, 81):
        indices = topk_on_grid(scores, k, limit=4)[0][0]
        assert len(set(indices.tolist())) == k
        chosen, best = scores.flatten()[indices], scores.flatten().topk(k).values
        assert torch.equal(chosen, best)


class Chooser(nn.Module):
    def forward(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return topk_on_grid(scores, 50, limit=20)


def test_topk_of_open_size_repeats_the_first_cell_on_small_grids() -> None:
    sides = {2: Dim("height", min=2, max=100), 3: Dim("width", min=2, max=100)}
    example = torch.zeros(1, 1, 20, 30)
    run = torch.export.export(Chooser(), (example,), dynamic_shapes=(sides,)).module()
    for height, width in ((2, 3), (5, 5), (7, 7), (9, 11)):
        scores = torch.randn(1, 1, height, width)
        indices, coords = run(scores)
        expected = reference.topk_on_grid(scores, 50)[0][0].tolist()
        assert indices[0, : len(expected)].tolist() == expected
        # what follows was chosen before
        assert indices.shape == (1, 50) and set(indices[0].tolist()) == set(expected)
        assert torch.equal(coords, reference.grid_coords(indices, height, width))


def test_files_are_compared_without_tf32(model: PointRend) -> None:
    seen = []
    convolution, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul

    def run(images: torch.Tensor) -> torch.Tensor:
        seen.append((convolution.fp32_precision, matmul.fp32_precision))
        return model.predict(images)

    convolution.fp32_precision = "tf32"  # and not recurrent layers: the older names cannot be read
    matmul.fp32_precision = "tf32"
    compared = exporting.compare(run, model, Exportable(model), (1, 3, 40, 56))
    assert convolution.fp32_precision == matmul.fp32_precision == "tf32"
    assert compared.labels == 1 and seen == [("ieee", "ieee")]


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_file_that_differs_is_not_kept(
    model: PointRend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("the old one")

    def open_wrong(path: Path) -> export_formats.Run:
        run = export_formats.open_program(path)
        # the logits' labels stay as they are
        return lambda images: run(images) + (1 if output == "labels" else 1000)

    form = export_formats.Format(".pt2", export_formats.write_program, open_wrong)
    monkeypatch.setattr(export_formats, "FORMATS", (form,))
    with pytest.raises(ExportError, match=r"model.pt2 is not kept.*% of labels equal"):
        export(model, path, size=(40, 56), output=output)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "the old one"


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("model.trt", {}, "must end in one of .onnx, .aoti.pt2, .pt2"),
        ("model.onnx", {"dtype": torch.bfloat16}, "one of float32, float16, not bfloat16"),
        ("folder.pt2", {}, "is a folder"),
        ("model.pt2", {"output": "colours"}, "output must be one of labels, logits"),
        ("model.pt2", {"steps": -1}, "steps must be at least 0, not -1"),
        ("model.pt2", {"num_points": 0}, "num_points must be at least 1, not 0"),
        ("model.pt2", {"topk_limit": 1}, "topk_limit must be at least 2, not 1"),
        ("model.pt2", {"size": (0, 8)}, "size must be"),
        ("model.pt2", {"batch": 0}, "batch must be at least 1, not 0"),
    ],
)
def test_errors(
    model: PointRend, tmp_path: Path, name: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / name, **options)
    assert len(list(tmp_path.iterdir())) == 1


def test_open_sizes_that_pytorch_cannot_export(
    model: PointRend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.UserError(UserErrorType.CONSTRAINT_VIOLATION, "parity")

    monkeypatch.setattr(torch.export, "export", refuses)
    with pytest.raises(ExportError, match="open sizes.*give size and batch"):
        trace(Exportable(model), None, 1)


def test_options_of_a_point_head_need_one() -> None:
    with pytest.raises(ExportError, match="topk_limit is for a point head"):
        Exportable(make(point_head=None), topk_limit=100)


def test_missing_package_names_the_extra(
    model: PointRend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"onnx, onnxruntime, onnxscript: pip install 'pointrend_triton\[export\]'"
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "model.onnx")


@pytest.fixture
def checkpoint(model: PointRend, tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "model.pth"
    save_checkpoint(path, {"state_dict": model.state_dict()})
    return path


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "model.pt2"
    arguments = [str(checkpoint), "--out", str(out), "--size", "40x56", "--points", "600"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "1x3x40x56: 100.0000 % of labels equal" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model.pt2"]


def test_command_says_what_is_wrong(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main([str(tmp_path / "no.pth"), "--out", str(tmp_path / "model.pt2")]) == 1
    assert capsys.readouterr().err.startswith("export: ")
    arguments = [str(checkpoint), "--out", str(tmp_path / "model.pt2")]
    assert main([*arguments, "--device", "abacus"]) == 1
    assert "--device 'abacus'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--size", "512"])
    assert "must be HEIGHTxWIDTH, such as 512x1024, not '512'" in capsys.readouterr().err

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "trace", interrupted)
    assert main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--out model.onnx --topk-limit 3840" in capsys.readouterr().out
