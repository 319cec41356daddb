"""The files that a traced model is written to: how each is written, described and run again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pointrend_triton.exportable import ExportError

Run = Callable[[Tensor], Tensor]
Metadata = dict[str, str]

OPSET = 18


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        suffix: how its name ends.
        write: a traced model, its `dynamic_shapes`, the output's name and the metadata -> a file.
        open: a file -> a function of a batch of images.
        packages: what it needs besides PyTorch.
        dtypes: those that it can be run in.
    """

    suffix: str
    write: Callable[[ExportedProgram, Any, str, Metadata, Path], None]
    open: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


def pick_format(path: Path, dtype: torch.dtype) -> Format:
    """The format that the name stands for.

    Raises:
        ExportError: there is none, it lacks a package, or cannot be run in this type.
    """
    form = next((form for form in FORMATS if path.name.endswith(form.suffix)), None)
    if form is None:
        endings = ", ".join(form.suffix for form in FORMATS)
        raise ExportError(f"{path} must end in one of {endings}")
    missing = [name for name in form.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{form.suffix} needs {', '.join(missing)}: pip install 'pointrend_triton[export]'"
        )
    if dtype not in form.dtypes:
        names = ", ".join(map(_name, form.dtypes))
        raise ExportError(f"dtype of {form.suffix} must be one of {names}, not {_name(dtype)}")
    return form


def write_onnx(
    program: ExportedProgram, shapes: Any, output: str, metadata: Metadata, path: Path
) -> None:
    import onnx

    exported = torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=shapes,  # for the names of the open dimensions
        input_names=["images"],
        output_names=[output],
        opset_version=OPSET,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    graph = model.graph
    # where in whose source files a node came from
    for described in (*graph.node, *graph.input, *graph.output, *graph.value_info, graph, model):
        del described.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])


def write_program(
    program: ExportedProgram, shapes: Any, output: str, metadata: Metadata, path: Path
) -> None:
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})


def open_program(path: Path) -> Run:
    return torch.export.load(path).module()


def write_package(
    program: ExportedProgram, shapes: Any, output: str, metadata: Metadata, path: Path
) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    try:
        aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": metadata},
        )
    except InductorError as error:  # as where there is no C++ compiler
        reason = str(error).partition("\n")[0]
        raise ExportError(f"{path.name} could not be compiled: {reason}") from error


def open_package(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FORMATS = (
    Format(
        ".onnx",
        write_onnx,
        open_onnx,
        packages=("onnx", "onnxruntime", "onnxscript"),
        dtypes=(torch.float32, torch.float16),  # the runtime has no bfloat16 on a CPU
    ),
    Format(".aoti.pt2", write_package, open_package),
    Format(".pt2", write_program, open_program),
)
