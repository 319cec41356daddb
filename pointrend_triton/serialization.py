"""Checkpoint files as plain containers of tensors: nothing that a file names is ever run."""

from __future__ import annotations

import hashlib
import os
import pickle
import pickletools
import re
import threading
import zipfile
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import torch
from torch import serialization

_KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
# all that a pickle of tensors and plain containers refers to
TENSOR_GLOBALS = frozenset(
    [
        "collections.OrderedDict",
        "collections.Counter",
        "_codecs.encode",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{kind}Storage" for kind in _KINDS),
        # files of PyTorch before 1.11, saved from a GPU
        *(f"torch.cuda.{kind}Storage" for kind in _KINDS),
    ]
)
# what mmengine's runner saves besides: the logged scalars, as NumPy values; read as Inert
INERT_GLOBALS = frozenset(
    [
        "mmengine.logging.history_buffer.HistoryBuffer",
        "mmengine.logging.message_hub.MessageHub",
        # how pickle writes the methods that a HistoryBuffer holds
        "builtins.getattr",
        "numpy.ndarray",
        "numpy.dtype",
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")  # before NumPy 2, and since
            for name in ("_reconstruct", "scalar")
        ),
    ]
)
_ZIP = b"PK\x03\x04"
# torch.save's older format begins with five pickles: this number, a version, facts of the system,
# the object, the keys of its storages
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_LEGACY_PICKLES = 5
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth$")
_lock = threading.Lock()


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the value and the rule."""


class Inert:
    """Stands for an object that is not needed; whatever the file says about it is dropped."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a file of torch.save, of either format, onto the CPU.

    Beyond tensors and plain containers a file may refer to INERT_GLOBALS, whose values are dropped.
    Where its name ends in "-xxxxxxxx.pth", as published files' do, its sha256 must begin with that.

    Raises:
        CheckpointError: the file cannot be opened, is no checkpoint, is damaged, is not what its
            name promises, or refers to any other global, called or not.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None
    with file:
        _check_hash(file, path)
        names = _check_globals(file, path, TENSOR_GLOBALS | INERT_GLOBALS)
        content = _load(file, path, names & INERT_GLOBALS)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, a checkpoint holds a dict")
    return content


def save_checkpoint(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Writes `payload` so that, whatever happens, `path` is the old file or the whole new one.

    Args:
        path: its folder is made if need be.
        payload: str, numbers, None, list, tuple and dict, nested, and dense tensors.

    Raises:
        CheckpointError: the file cannot be written, or `read_checkpoint` would refuse it for its
            content or its name.
    """
    path = Path(path)
    if _HASH_IN_NAME.search(path.name):
        raise CheckpointError(
            f"{path} cannot be written: a name that ends in - and 8 hexadecimal digits says "
            "how the sha256 of the file begins; choose another one"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            torch.save(dict(payload), file)
            file.flush()
            _check_globals(file, path, TENSOR_GLOBALS)
            os.fsync(file.fileno())
        temporary.replace(path)
    except CheckpointError:
        raise
    except Exception as error:
        # on a full disk, PyTorch's own error hides the system's
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"{path} cannot be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_hash(file: BufferedReader, path: Path) -> None:
    promised = _HASH_IN_NAME.search(path.name)
    if promised:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        if found != promised[1]:
            raise CheckpointError(
                f"{path}: by its name its sha256 begins with {promised[1]}, but that is {found}; "
                "download it again, or rename it if the name means something else"
            )


def _check_globals(file: IO[bytes], path: Path, allowed: Collection[str]) -> set[str]:
    """The globals that the file refers to, all of them among `allowed`."""
    found: set[str] = set()
    fault: Exception | None = None
    try:
        for stream in _pickles(file, path):
            found.update(_globals(stream))
    except Exception as error:  # of a damaged file, a parser may raise anything
        fault = error
    if refused := found.difference(allowed):
        raise CheckpointError(
            f"{path} is refused: it refers to {', '.join(sorted(refused)[:8])}; "
            "a checkpoint may hold nothing but tensors and plain containers"
        )
    if isinstance(fault, CheckpointError):
        raise fault
    if fault:
        raise CheckpointError(f"{path} is truncated or damaged: {fault}") from fault
    return found


def _pickles(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """The pickles in the file; the caller reads each to its end before asking for the next."""
    file.seek(0)
    head = file.read(len(_LEGACY))
    file.seek(0)
    if not head:
        raise CheckpointError(f"{path} is empty")
    if head.startswith(_ZIP):
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".pkl")]
            if not members:
                raise CheckpointError(f"{path} is a zip file, but not one that torch.save wrote")
            for member in members:
                with archive.open(member) as stream:
                    yield stream
    elif head == _LEGACY:
        for _ in range(_LEGACY_PICKLES):
            yield file
    else:
        # one that begins as a pickle does is searched, so that what it refers to can be named
        if head.startswith(pickle.PROTO):
            yield file
        raise CheckpointError(
            f"{path} is not a checkpoint as torch.save writes one: it begins with {head!r}"
        )


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """The globals that the next pickle of the stream refers to, as "module.name"."""
    strings: deque[str] = deque(maxlen=2)
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1).replace("__builtin__.", "builtins.")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings)
        elif isinstance(argument, str):
            strings.append(argument)


def _load(file: IO[bytes], path: Path, inert: Collection[str]) -> Any:
    file.seek(0)
    try:
        with _stand_ins(inert):
            # mmap is for paths; said here because a process may have made it the default
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError:
        # PyTorch's own message goes on to advise an unsafe load
        raise CheckpointError(f"{path} holds more than tensors and plain containers") from None
    except Exception as error:  # of a damaged file, torch.load may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or damaged: {reason}") from error


@contextmanager
def _stand_ins(names: Collection[str]) -> Iterator[None]:
    """Has torch.load take `names` for Inert."""
    if not names:
        yield
        return
    with _lock:  # PyTorch keeps one list for the whole process
        # real classes that were allowed under these names would not fit together with Inert
        others = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        try:
            with serialization.safe_globals([(Inert, name) for name in names]):
                yield
        finally:
            serialization.add_safe_globals(others)
