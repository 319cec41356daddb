"""Export a trained model to a file that runs without this package, and check that file.

    python -m pointrend_triton.export FILE.pth --out model.onnx                      # any size
    python -m pointrend_triton.export FILE.pth --out model.onnx --topk-limit 3840    # for TensorRT
    python -m pointrend_triton.export FILE.pth --out model.onnx --normalise --output logits
    python -m pointrend_triton.export FILE.pth --out model.pt2 --batch any           # torch.export
    python -m pointrend_triton.export FILE.pth --out model.aoti.pt2 --size 512x1024  # AOTInductor

The ending of --out chooses the format:
  .onnx      one ONNX file, opset 18; GridSample, TopK and Resize are its least common operators
  .pt2       a program for torch.export.load, on the kind of device that it was exported on
  .aoti.pt2  machine code for torch._inductor.aoti_load_package, on such a device and system

The file takes one tensor "images" [batch, 3, height, width], RGB: float32, normalised as
(value - mean) / std, or with --normalise the uint8 values themselves. It gives one tensor at the
size of the images: "labels" [batch, height, width], uint8 up to 256 classes, else int64, or
"logits" float32 [batch, classes, height, width]. Mean, std and class names are in its metadata.
Without --size, height and width may be anything from 33 to 8192, for which PyTorch 2.13 is needed.
All operations are plain ones: this project's kernels stay behind.

Before the file gets its name it is run, an ONNX file by ONNX Runtime on the CPU, and compared with
PyTorch: at --size, or else at two sizes, one of them odd.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pointrend_triton import precision, reference
from pointrend_triton.checkpoint import CheckpointError, from_checkpoint
from pointrend_triton.data.transforms import MEAN, STD
from pointrend_triton.export_formats import Run, pick_format
from pointrend_triton.exportable import OUTPUTS, Exportable, ExportError, trace
from pointrend_triton.inference import evaluation_mode, pick_device
from pointrend_triton.models.pointrend import PointRend

Size = tuple[int, int]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHECKED_SIZES = ((256, 512), (193, 331))  # where the size is open
CHECKED_BATCHES = (1, 3)  # where the number of images is open
# how far logits may be off, as a share of the largest one, and which share of them and of the
# labels must hold. Not all: by rounding, another one of two equally uncertain cells is refined
TOLERANCES = {
    torch.float32: (1e-3, 0.999),
    torch.float16: (0.03, 0.99),
    torch.bfloat16: (0.1, 0.98),
}


@dataclass(frozen=True)
class Agreement:
    """How a file's output for one batch compares with that of the model in float32.

    Attributes:
        shape: of the images.
        labels: share of equal ones, 0 to 1.
        logits: share of those within the tolerance; 1 where the output is labels.
        difference: the largest one of logits; None where the output is labels.
        largest: the largest absolute logit of the model.
    """

    shape: tuple[int, ...]
    labels: float
    logits: float
    difference: float | None
    largest: float

    def __str__(self) -> str:
        text = f"{'x'.join(map(str, self.shape))}: {100 * self.labels:.4f} % of labels equal"
        if self.difference is None:
            return text
        return f"{text}, logits differ by at most {self.difference:.2g} of {self.largest:.3g}"


def export(
    model: PointRend,
    path: str | Path,
    *,
    size: Size | None = None,
    batch: int | None = 1,
    output: str = "labels",
    steps: int | None = None,
    num_points: int | None = None,
    topk_limit: int | None = None,
    normalise: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Agreement]:
    """Writes the file that `path` names and says how it compares with the model.

    Args:
        model: in float32; a .pt2 file will be for the kind of device that it is on.
        path: its ending, .onnx, .pt2 or .aoti.pt2, is the format; its folder is made if need be.
        size: (height, width) of the images; None for any, each from 33 to 8192.
        batch: how many images; None for any number.
        output, steps, num_points, topk_limit, normalise, dtype: as `Exportable` takes them.

    Raises:
        ExportError: what was asked for cannot be, a package is missing, or the file did not do
            what the model does; then none is left.
    """
    path = Path(path)
    form = pick_format(path, dtype)
    _check(model, path, size, batch)
    exportable = Exportable(
        model,
        output=output,
        steps=steps,
        num_points=num_points,
        topk_limit=topk_limit,
        normalise=normalise,
        dtype=dtype,
    )
    # a second check where there is more than one shape
    checks = range(1 if size and batch else 2)
    shapes = [(batch or CHECKED_BATCHES[i], 3, *(size or CHECKED_SIZES[i])) for i in checks]
    with _draft(path) as draft, tqdm(total=3, unit="step", leave=False, disable=None) as bar:
        bar.set_description("tracing")
        program, dynamic_shapes = trace(exportable, size, batch)
        bar.update()
        bar.set_description("writing")
        form.write(program, dynamic_shapes, output, metadata(exportable), draft)
        bar.update()
        bar.set_description("comparing")
        run = form.open(draft)
        agreements = [compare(run, model, exportable, shape) for shape in shapes]
        share = TOLERANCES[dtype][1]
        for agreement in agreements:
            if not min(agreement.labels, agreement.logits) >= share:
                raise ExportError(f"{path} is not kept: it is not what the model is: {agreement}")
        draft.replace(path)
    return agreements


def compare(
    run: Run, model: PointRend, exportable: Exportable, shape: tuple[int, ...]
) -> Agreement:
    """An opened file against the model, on pictures of that shape [B, 3, H, W]."""
    pictures = example_pictures(shape).to(exportable.device)
    images = (pictures.float() - exportable.mean) / exportable.std
    # rounded to TF32, the two would differ by more than the tolerance
    with precision.tf32(False), evaluation_mode(model):
        expected = model(images, steps=exportable.steps, num_points=exportable.num_points)
        found = run(pictures if exportable.normalise else images).to(expected.device)
    labels, largest = found, expected.abs().max().item()
    near, difference = 1.0, None
    if exportable.output == "logits":
        labels = reference.logits_to_labels(found)
        off = (found - expected).abs()
        near = (off <= TOLERANCES[exportable.dtype][0] * largest).float().mean().item()
        difference = off.max().item()
    equal = (labels == reference.logits_to_labels(expected)).float().mean().item()
    return Agreement(shape, equal, near, difference, largest)


def example_pictures(shape: tuple[int, ...]) -> Tensor:
    """uint8 RGB of that shape [B, 3, H, W]: blobs of colour with some noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = shape
    coarse = torch.rand(batch, channels, height // 32 + 2, width // 32 + 2, generator=generator)
    blobs = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    noise = torch.rand(shape, generator=generator)
    return ((0.9 * blobs + 0.1 * noise).clamp(0, 1) * 255).to(torch.uint8)


def metadata(exportable: Exportable) -> dict[str, str]:
    """What a user of the file needs to know, each value as JSON."""
    model = exportable.model
    facts = {
        "classes": model.classes,
        "palette": model.palette,
        "input": "uint8" if exportable.normalise else "float32, (value - mean) / std",
        "channels": "RGB",
        "mean": MEAN,
        "std": STD,
        "output": exportable.output,
        "steps": exportable.steps,
        "num_points": exportable.num_points,
    }
    return {name: json.dumps(fact) for name, fact in facts.items() if fact is not None}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    # what PyTorch's exporter has to say about packages that it looks for and about its own insides
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    try:
        # an ONNX file is for no device, and is checked on the CPU
        device = _device("cpu" if args.out.suffix == ".onnx" else args.device)
        model = from_checkpoint(args.checkpoint).to(device)
        agreements = export(
            model,
            args.out,
            size=args.size,
            batch=args.batch,
            output=args.output,
            steps=args.steps,
            num_points=args.points,
            topk_limit=args.topk_limit,
            normalise=args.normalise,
            dtype=DTYPES[args.dtype],
        )
    except (ExportError, CheckpointError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    for agreement in agreements:
        print(f"  {agreement}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pointrend_triton.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", metavar="FILE", type=Path, help="a file of train.py or mmsegmentation")
    add("--out", metavar="FILE", type=Path, required=True, help="what to write: see above")
    add("--output", choices=OUTPUTS, default="labels", help="what it gives (default: labels)")
    add("--size", metavar="HxW", type=size, help="of the images; any by default")
    add("--batch", metavar="N", type=count, default=1, help="how many images, or any (default: 1)")
    add("--steps", metavar="N", type=int, help="of subdivision; by default as configured")
    add("--points", metavar="N", type=int, help="refined in each step; by default as configured")
    add("--topk-limit", metavar="K", type=int, help="the most a TopK takes: 3840 for TensorRT")
    add("--normalise", action="store_true", help="take uint8 values and normalise them")
    add("--dtype", choices=DTYPES, default="float32", help="of the network (default: float32)")
    add("--device", default="auto", help="to make a .pt2 file for: auto (default), cpu, cuda, ...")
    return parser.parse_args(argv)


def size(text: str) -> Size:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, such as 512x1024, not {text!r}")
    return int(found[1]), int(found[2])


def count(text: str) -> int | None:
    if text == "any":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be any or a whole number from 1, not {text!r}")
    return int(text)


def _device(name: str) -> torch.device:
    try:
        return pick_device(name)
    except ValueError as error:
        raise ExportError(f"--device {error}") from None


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A name for a file in a folder beside `path`, which goes away with all that is in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name


def _check(model: PointRend, path: Path, size: Size | None, batch: int | None) -> None:
    if path.is_dir():
        raise ExportError(f"{path} is a folder; it must name a file")
    if size is not None and not min(size) >= 1:
        raise ExportError(f"size must be (height, width) of at least 1, not {size}")
    if batch is not None and batch < 1:
        raise ExportError(f"batch must be at least 1, not {batch}")
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ExportError(f"model must be in float32, not {dtype}; dtype says what the file is in")


if __name__ == "__main__":
    sys.exit(main())
