"""Reads k-means centroids from a joblib file of scikit-learn, without running what is in it.

`kmeans.py` uses it for the released `.bin`. joblib writes a pickle in which each array is a note
(class, shape, order, type) followed by the array's bytes, all of it perhaps compressed; older or
plain pickles hold the bytes inside. Layout: joblib/numpy_pickle.py, joblib 0.10 to 1.6.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import pickle
import re
import zlib
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llama_omni.speech.restricted_pickle import PLAIN_DATA, Inert, RestrictedUnpickler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What the compressed kinds begin with (joblib's names: zlib, gzip, bz2, lzma or xz).
DECOMPRESS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", gzip.decompress),
    (b"BZ", bz2.decompress),
    (b"\xfd7zXZ", lzma.decompress),
    (b"\x5d\x00", lzma.decompress),
    (b"\x78", zlib.decompress),
)


class _JoblibUnpickler(RestrictedUnpickler):
    """Replaces each array's note by the array that follows it in the file."""

    allowed = PLAIN_DATA
    inert_packages = frozenset(("joblib", "numpy", "scipy", "sklearn"))
    dispatch: ClassVar[Any] = dict(RestrictedUnpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.file = file

    def load_build(self) -> None:
        reader: Any = super()
        reader.load_build()
        stack: list[Any] = self.stack  # pyright: ignore[reportAttributeAccessIssue]
        note = stack[-1]
        if isinstance(note, Inert) and note.source.endswith(".NumpyArrayWrapper"):
            stack[-1] = self._read_array(note.state)

    dispatch[pickle.BUILD[0]] = load_build

    def _read_array(self, note: dict[str, Any]) -> Any:
        dtype = _read_dtype(note["dtype"])
        if dtype is None:  # Python objects: a pickle of its own follows
            return type(self)(self.file).load()
        if note.get("numpy_array_alignment_bytes") is not None:  # joblib 1.2 and later pad
            self.file.read(self.file.read(1)[0])
        shape = [int(size) for size in note["shape"]]
        num_bytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or len(data := self.file.read(num_bytes)) < num_bytes:
            raise pickle.UnpicklingError("an array is cut short")
        return np.frombuffer(data, dtype).reshape(shape, order=note["order"])


def read_cluster_centers(path: Path) -> np.ndarray:
    """Returns (K, D) float32 `cluster_centers_` of the KMeans or MiniBatchKMeans in `path`.

    Raises:
        ValueError: not such a file, or it names something outside the closed list.
    """
    data = path.read_bytes()
    try:
        for prefix, decompress in DECOMPRESS:
            if data.startswith(prefix):
                data = decompress(data)
                break
        if data.startswith(b"ZF"):
            raise pickle.UnpicklingError("written by a joblib before 0.10")
        model = _JoblibUnpickler(io.BytesIO(data)).load()
        centers = _find_centers(model)
    except Exception as error:  # a damaged or hostile file may fail in any way
        raise ValueError(
            f"{path}: not readable as k-means centroids: {error}. Nothing of it was run. Give "
            "scikit-learn's k-means as joblib writes it, or our .safetensors."
        ) from error
    return np.array(centers, dtype=np.float32, order="C")


def _find_centers(model: Any) -> np.ndarray:
    state = model.state if isinstance(model, Inert) else None
    centers = state.get("cluster_centers_") if isinstance(state, dict) else None
    if centers is None:
        kind = getattr(model, "source", type(model).__name__)
        raise ValueError(f"it holds a {kind} without cluster_centers_")
    array = _plain_array(centers)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"cluster_centers_ is {array.dtype} of shape {array.shape}")
    return array


def _plain_array(value: Any) -> np.ndarray:
    """Returns an array that joblib stored (already read), or that pickle did, from its parts."""
    if isinstance(value, Inert) and value.source.endswith("._frombuffer"):
        data, dtype, shape, order = value.args
        return np.frombuffer(data, _read_dtype(dtype)).reshape(shape, order=order)
    if isinstance(value, Inert) and value.source.endswith("._reconstruct"):
        _version, shape, dtype, is_fortran, data = value.state
        order = "F" if is_fortran else "C"
        return np.frombuffer(data, _read_dtype(dtype)).reshape(shape, order=order)
    if isinstance(value, np.ndarray):
        return value
    raise ValueError(f"cluster_centers_ is a {type(value).__name__}")


def _read_dtype(value: Any) -> np.dtype | None:
    """Returns the type of numpy's note (its name, and the byte order in its state)."""
    name = str(value.args[0])
    if name.startswith("O"):
        return None
    if not re.fullmatch(r"[fiub][1248]", name):
        raise pickle.UnpicklingError(f"arrays of type {name!r}")
    order = value.state[1] if value.state is not None else "|"
    return np.dtype((order if order in ("<", ">") else "=") + name)
