"""Loads weights: the released folder's shards and part files into (divided) parameters.

A parameter is, in memory, a sequence of stored tensors: one tensor for most, 1,024
for the gate and up weights of a layer's 512 experts. So each process of a ZeRO-3 run reads the
stretch that it keeps and nothing else; no rank reads 1.1 TB for the others.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from vss_longcat_omni.model.config import LongcatOmniConfig
from vss_longcat_omni.model.experts import LongcatFlashRouter
from vss_longcat_omni.options.run_arguments import RunArguments, read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

# Part file -> what stands before its keys in the model. A .safetensors file may take its place.
PART_FILES = {
    "language_model_embedding.pt": "",
    "vision/vision_model.pt": "vision_encoder.",
    "vision/vision_projector.pt": "vision_projector.",
    "audio/audio_encoder.pt": "audio_encoder.",
    "audio/audio_projector.pt": "audio_projector.",
    "audio/audio_embeddings.pt": "audio_embedding.",
    "audio/audio_output_layers.pt": "speech_heads.",
}
RELEASED = RunArguments.model_name_or_path
FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
MAX_NUMBERS = 2**26  # read at a time
UNUSED_KEYS = re.compile(r"model\.mtp\.")  # heads that predict two tokens ahead, for serving


class Piece(NamedTuple):
    """One stored tensor: a slice of a safetensors file, or a tensor mapped from a part file."""

    source: Any
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Tensor:
        """Read numbers [start, stop) of the flattened tensor, by whole rows."""
        if not self.shape:
            return self.source[...].flatten()
        row = math.prod(self.shape[1:])
        first, last = start // row, -(-stop // row)
        return self.source[first:last].flatten()[start - first * row : stop - first * row]


class CheckpointReader:
    """Finds the stored tensors of a released folder by the model's names.

    Raises:
        ValueError: the folder holds no *.safetensors file, or a part file is no plain state dict.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[str, Piece] = {}
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise ValueError(f"{folder}: no *.safetensors file: not a LongCat-Flash-Omni folder.")
        for path in shards:
            self._add_safetensors(path, "")
        for name, prefix in PART_FILES.items():
            path = folder / name
            if path.with_suffix(".safetensors").is_file():
                self._add_safetensors(path.with_suffix(".safetensors"), prefix)
            elif path.is_file():
                self._add_pickle(path, prefix)

    def _add_safetensors(self, path: Path, prefix: str) -> None:
        file = safe_open(path, "pt")
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            if not UNUSED_KEYS.match(key):
                piece = file.get_slice(key)
                self.pieces[prefix + key] = Piece(piece, tuple(piece.get_shape()))

    def _add_pickle(self, path: Path, prefix: str) -> None:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path}: not readable as a state dict of tensors alone ({error}). Download it "
                "again, or convert it to safetensors where you trust it."
            ) from error
        for key, value in state.items():
            # The embedding's own file repeats what a shard holds: the shard's counts.
            name = prefix + key.replace("word_embeddings.", "model.embed_tokens.")
            self.pieces.setdefault(name, Piece(value, tuple(value.shape)))

    def find(self, name: str, shape: tuple[int, ...]) -> list[Piece] | None:
        """Return the pieces that make up a parameter, in order; None where they are not there."""
        if name in self.pieces:
            return [self.pieces[name]]
        fused = FUSED_EXPERTS.fullmatch(name)
        if fused is None:
            return None
        experts, projection = fused.groups()
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        keys = [f"{experts}.{e}.{part}.weight" for e in range(shape[0]) for part in parts]
        return [self.pieces[key] for key in keys] if all(k in self.pieces for k in keys) else None


def load_config(folder: Path) -> LongcatOmniConfig:
    """Read config.json, vision/config.json and audio/config.json of a released folder as one.

    Raises:
        ValueError: there is no config.json, or one of them is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json: not a LongCat-Flash-Omni folder.")
    values = read_json(path, name=str(path))
    values.pop("model_type", None)
    for part in ("vision", "audio"):
        path = folder / part / "config.json"
        if path.is_file():
            values[f"{part}_config"] = read_json(path, name=str(path))
    return LongcatOmniConfig(**values)


def find_config(name: str) -> LongcatOmniConfig | None:
    """Return the config of a folder or of RELEASED, without the hub; None for another hub id."""
    if Path(name).expanduser().is_dir():
        return load_config(Path(name).expanduser())
    is_released = name.partition("@")[0] == RELEASED  # which has the defaults of the classes
    return LongcatOmniConfig(vision_config={}, audio_config={}) if is_released else None


@torch.no_grad()
def load_weights(model: nn.Module, reader: CheckpointReader, *, show_progress: bool) -> None:
    """Load every parameter and stored buffer, or this process's part of it, but no adapter.

    Raises:
        ValueError: a tensor is missing, has another shape, or holds NaN or infinity.
    """
    for module in model.modules():
        if isinstance(module, LongcatFlashRouter):  # ZeRO makes every new tensor bfloat16
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    tensors = list(_stored_tensors(model))
    found = {name: reader.find(name, shape) for name, shape, _ in tensors}
    missing = [name for name, pieces in found.items() if pieces is None]
    if missing:
        raise ValueError(
            f"{reader.folder}: {len(missing)} tensors are missing, first {missing[0]}. The folder "
            "is incomplete or of another architecture: compare its config.json."
        )
    for name, shape, tensor in tqdm(tensors, desc="weights", disable=not show_progress):
        pieces = found[name]
        assert pieces is not None
        _check_shape(reader.folder, name, shape, pieces)
        try:
            with _kept_part(tensor) as (start, kept):
                _copy_pieces(kept, pieces, start, math.prod(shape))
        except FloatingPointError as error:
            raise ValueError(f"{reader.folder}: {name} holds NaN or infinite values.") from error


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yield (name in the checkpoint, whole shape, tensor) of all but adapters."""
    persistent = model.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if ".lora_" not in name:
            stored = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            yield stored, tuple(getattr(tensor, "ds_shape", tensor.shape)), tensor


def _check_shape(folder: Path, name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
    is_fused = len(pieces) > 1
    stored = math.prod(shape) if not is_fused else sum(math.prod(p.shape) for p in pieces)
    first = pieces[0].shape
    fits = stored == math.prod(shape) and first[-1:] == shape[-1:] if is_fused else first == shape
    if not fits:
        raise ValueError(
            f"{folder}: {name} has shape {first}{' and more' if is_fused else ''}, but config.json "
            f"makes it {shape}. The two are not of one model."
        )


@contextmanager
def _kept_part(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Give where this process's part begins in the flattened tensor, and its flat memory."""
    part = getattr(tensor, "ds_tensor", None)
    if part is None or tensor.ds_status.name == "AVAILABLE":  # pyright: ignore
        yield 0, tensor.data.view(-1)
        return
    rank = torch.distributed.get_rank(tensor.ds_process_group)  # pyright: ignore
    start = rank * part.ds_numel
    if part.final_location is None:
        yield start, part.data.view(-1)
        return
    # On NVMe: read into a buffer, loaded, written back, and read once more to check that it is.
    swapper: Any = tensor.nvme_swapper  # pyright: ignore[reportAttributeAccessIssue]
    swapper.swap_in([tensor], async_op=False)
    yield start, part.data.view(-1)[: part.ds_numel]
    written = part.data.view(-1)[: part.ds_numel].clone()
    swapper.swap_out_and_release([tensor])
    swapper.swap_in([tensor], async_op=False)
    is_there = torch.equal(part.data.view(-1)[: part.ds_numel], written)
    swapper.remove_partition_and_release_buffers([tensor])
    if not is_there:
        raise RuntimeError("a weight written to NVMe is not what is read from there: file a bug")


def _copy_pieces(kept: Tensor, pieces: list[Piece], start: int, num_all: int) -> None:
    """Copy numbers [start, start + len(kept)) of the joined pieces; ZeRO's padding becomes 0.

    Raises FloatingPointError for NaN or infinity.
    """
    stop = min(start + len(kept), num_all)
    kept[max(stop - start, 0) :].zero_()
    offset = 0
    for piece in pieces:
        size = math.prod(piece.shape)
        for first in range(max(start, offset), min(stop, offset + size), MAX_NUMBERS):
            last = min(first + MAX_NUMBERS, stop, offset + size)
            values = piece.read(first - offset, last - offset)
            if not torch.isfinite(values).all():
                raise FloatingPointError
            kept[first - start : last - start].copy_(values)
        offset += size
