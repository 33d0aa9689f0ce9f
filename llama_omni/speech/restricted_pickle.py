"""Reads foreign pickles as data: no code that a file names is imported or called.

`hubert.py` reads fairseq checkpoints and `kmeans.py` joblib files with it. A pickle is a program
that may call anything it can name. Here a name gives one of a few constructors of plain data, or,
for classes of packages that such files do mention (fairseq, sklearn, ...), an inert stand-in that
keeps what it is handed. Any other name ends the reading.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor, _rebuild_tensor_v2

if TYPE_CHECKING:
    from pathlib import Path


class Inert:
    """Stands in for an object whose class is not loaded; does nothing with what it keeps."""

    source = ""  # "module.name" that the file asked for
    args: tuple[Any, ...]  # constructor arguments, or the arguments of the function it replaces
    state: Any  # what the object's attributes were to be set from
    items: list[Any]  # elements of a list, (key, value) pairs of a dict

    def __new__(cls, *args: Any, **_kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)


def to_plain(value: Any) -> Any:
    """Turns namespaces, omegaconf nodes and containers into dicts, lists and values."""
    if isinstance(value, Inert) and isinstance(value.state, dict):
        state = value.state
        if "_content" in state:  # omegaconf's DictConfig and ListConfig
            return to_plain(state["_content"])
        return to_plain(state.get("_val", state))  # its values, and namespaces
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """Does what old pickles use `_codecs.encode` for: bytes written as text."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


PLAIN_DATA: dict[str, Any] = {
    "_codecs.encode": _encode_latin1,
    "collections.OrderedDict": OrderedDict,
    **{
        f"{module}.{kind.__name__}": kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, list, dict, tuple, str, bytes, int, float, bool, complex)
    },
}
TENSORS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
}


class RestrictedUnpickler(pickle._Unpickler):
    """Reads with the interpreter's own reader (the one in Python) and a closed list of names.

    Subclasses set `allowed` ("module.name" -> what it gives) and `inert_packages` (top packages
    whose every name gives an `Inert`).
    """

    allowed: dict[str, Any] = PLAIN_DATA
    inert_packages: frozenset[str] = frozenset()

    def find_class(self, module: str, name: str) -> Any:
        source = f"{module}.{name}"
        if source in self.allowed:
            return self.allowed[source]
        if module.partition(".")[0] in self.inert_packages:
            return type("Inert", (Inert,), {"source": source})
        raise pickle.UnpicklingError(
            f"it names {source}, which is not on the list of harmless ones"
        )


class _CheckpointUnpickler(RestrictedUnpickler):
    allowed = PLAIN_DATA | TENSORS
    inert_packages = frozenset(
        (
            *("argparse", "collections", "enum", "numpy", "pathlib", "typing"),
            *("antlr4", "examples", "fairseq", "hydra", "omegaconf"),
        )
    )


class _CheckpointPickle:
    """Has what `torch.load` wants of a pickle module. torch reads storages itself, from the zip
    file or, before torch 1.6, from behind the pickle."""

    Unpickler = _CheckpointUnpickler

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _CheckpointUnpickler(file, **kwargs).load()


def load_foreign_checkpoint(path: Path) -> dict[str, Any]:
    """Reads the dict in a file of `torch.save`, tensors real (on the CPU), other objects inert.

    It serves checkpoints that `weights_only=True` does not read, since they hold more than
    weights, in either of torch's formats.

    Raises:
        ValueError: not such a file, or it names something outside the closed list.
    """
    try:
        if _is_torchscript(path):
            raise pickle.UnpicklingError("it is a TorchScript archive")
        # weights_only has no meaning here: every name goes through _CheckpointUnpickler.
        loaded = torch.load(
            path, map_location="cpu", pickle_module=_CheckpointPickle, weights_only=False
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged or hostile file may fail in any way
        raise ValueError(
            f"{path}: not readable as a checkpoint: {error}. Nothing of it was run; get the file "
            "again from where it was published."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, expected a checkpoint's dict")
    return loaded


def _is_torchscript(path: Path) -> bool:
    """Returns whether torch would hand the file to `torch.jit.load`, which has its own rules."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())
