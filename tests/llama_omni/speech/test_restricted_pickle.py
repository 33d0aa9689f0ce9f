"""Foreign pickles are read as data: what would run code is named, and nothing runs."""

from __future__ import annotations

import builtins
import io
import os
import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pytest
import torch

from llama_omni.speech.fairseq_checkpoint import parse_conv_layers
from llama_omni.speech.joblib_file import read_cluster_centers
from llama_omni.speech.restricted_pickle import Inert, load_foreign_checkpoint, to_plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class _Call:
    """Unpickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


# Function -> a call of it, given a file whose existence betrays it. The file names it by a module
# that depends on the pickle's protocol.
HOSTILE: dict[str, Callable[[Path], _Call]] = {
    "system": lambda marker: _Call(os.system, f"touch '{marker}'"),
    "eval": lambda marker: _Call(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: _Call(exec, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: _Call(open, str(marker), "w"),
    "getattr": lambda marker: _Call(getattr, str(marker), "upper"),
    "__import__": lambda marker: _Call(builtins.__import__, "os"),
    "load": lambda marker: _Call(torch.load, str(marker)),
    "_load_from_bytes": lambda marker: _Call(torch.storage._load_from_bytes, b""),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("is_zip", [True, False])
def test_hostile_checkpoint_is_refused(tmp_path: Path, name: str, is_zip: bool) -> None:
    path, marker = tmp_path / "hostile.pt", tmp_path / "was_run"
    content = {"model": {"a": torch.ones(2)}, "cfg": HOSTILE[name](marker)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        ValueError, match=rf"hostile.pt: .*names \S+[.]{name}, which is not on the list"
    ):
        load_foreign_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("compress", [0, 3])
def test_hostile_kmeans_is_refused(tmp_path: Path, name: str, compress: int) -> None:
    path, marker = tmp_path / "hostile.bin", tmp_path / "was_run"
    joblib.dump({"cluster_centers_": HOSTILE[name](marker)}, path, compress=compress)
    with pytest.raises(
        ValueError, match=rf"hostile.bin: .*names \S+[.]{name}, which is not on the list"
    ):
        read_cluster_centers(path)
    assert not marker.exists()


def test_hostile_files_do_run_where_let(tmp_path: Path) -> None:
    """The files above are not harmless by mistake."""
    marker = tmp_path / "was_run"
    pickle.loads(pickle.dumps(HOSTILE["system"](marker)))
    assert marker.exists()


def test_hostile_object_array_is_refused(tmp_path: Path) -> None:
    """joblib puts arrays of objects into a pickle inside the pickle."""
    path, marker = tmp_path / "hostile.bin", tmp_path / "was_run"
    array = np.array([HOSTILE["system"](marker)], dtype=object)
    joblib.dump({"cluster_centers_": array}, path)
    with pytest.raises(ValueError, match=r"names posix.system"):
        read_cluster_centers(path)
    assert not marker.exists()


def test_name_with_dots_reaches_nothing(tmp_path: Path) -> None:
    """Protocol 4 lets a name continue into attributes: collections.OrderedDict.__init__..."""
    stream = io.BytesIO()
    stream.write(b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93)R.")
    path = tmp_path / "dots.bin"
    path.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=r"names collections.OrderedDict.fromkeys"):
        read_cluster_centers(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    script: Any = torch.jit.script(torch.nn.Linear(2, 2))
    script.save(str(path))
    with pytest.raises(ValueError, match="TorchScript"):
        load_foreign_checkpoint(path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_come_through(tmp_path: Path, is_zip: bool) -> None:
    weight = torch.randn(4, 6)
    content = {
        "model": OrderedDict(
            a=weight, transposed=weight.T, half=weight.half(), ids=torch.arange(3)
        ),
        "parameter": torch.nn.Parameter(weight),
        "shape": weight.shape,
        "number": np.float64(1.5),
        "seen": {1, 2},
        "bytes": b"\xff\x00",
    }
    path = tmp_path / "c.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    loaded = load_foreign_checkpoint(path)
    for key, tensor in content["model"].items():
        assert loaded["model"][key].dtype == tensor.dtype
        assert torch.equal(loaded["model"][key], tensor)
    assert torch.equal(loaded["parameter"], weight)
    assert loaded["shape"] == weight.shape
    assert (loaded["seen"], loaded["bytes"]) == ({1, 2}, b"\xff\x00")
    assert isinstance(loaded["number"], Inert)


def test_to_plain_of_namespaces() -> None:
    outer, inner = Inert(), Inert()
    inner.state = {"_val": 3}
    outer.state = {"_parent": outer, "_content": {"a": inner, "b": [inner]}}
    assert to_plain(outer) == {"a": 3, "b": [3]}


@pytest.mark.parametrize(
    "text", ["__import__('os').system('true')", "[(1, 2, 3)] * 2 ** 99", "[(1, 2)]", "[", "7"]
)
def test_conv_layers_are_not_evaluated(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        parse_conv_layers(text)


def test_conv_layers_of_the_release() -> None:
    assert parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2") == [
        (512, 10, 5),
        *[(512, 3, 2)] * 4,
        *[(512, 2, 2)] * 2,
    ]
