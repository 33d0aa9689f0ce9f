"""Weights in and out: a `dit` folder -> (sharded) parameters -> a folder of the Diffusers layout.

A model is built on the meta device, sharded, given memory, and only then loaded: each process reads
just the rows it keeps. Training from nothing draws initial values from a hash of the parameter's
name and the value's place, so that they do not depend on the number of processes or the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers import __version__ as diffusers_version
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from longcat_video_fft.model.sharding import (
    first_element,
    local,
    random_bits,
    random_keys,
    to_int32,
)
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.hub import check_free_disk, resolve_artifact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longcat_video_fft.options.config import TrainConfig

MAX_SHARD_BYTES = 5_000_000_000
WEIGHTS = "diffusion_pytorch_model"  # .safetensors, or -00001-of-00006.safetensors and an index
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
LARGEST_SANE = 1e4  # of a weight's absolute value
# Initialization: layers whose output scales or replaces what follows begin small, so that a new
# model begins near the identity. Not at 0: the blocks' gradients would be 0, and timings untrue.
SMALL_LAYERS = ("adaLN_modulation.", "final_layer.linear.")
SMALL_GAIN = 0.2
DRAW_CHUNK = 1 << 24


def find_transformer(config: TrainConfig) -> Path:
    """Returns the folder dit/ of the model; raises ValueError when it is not there."""
    root = resolve_artifact(
        config.model, field="pretrained_model_name_or_path", allow_patterns=("dit/*",)
    )
    folder = root / "dit"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"pretrained_model_name_or_path={config.model}: {root} has no dit/config.json. It must "
            "be laid out as the released LongCat-Video: dit/, vae/, text_encoder/, tokenizer/."
        )
    return folder


def local_model(spec: str) -> Path | None:
    """Returns the folder that `spec` names, without a connection; None where it is not here.

    Raises:
        ValueError: neither a folder nor a hub id.
    """
    if Path(spec).expanduser().is_dir():
        return Path(spec).expanduser()
    repo, _, revision = spec.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise ValueError(
            f"pretrained_model_name_or_path={spec}: no such folder; give one, or a hub id."
        )
    with contextlib.suppress(LocalEntryNotFoundError):
        return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
    return None


def build_transformer(folder: Path) -> LongCatVideoTransformer3DModel:
    """Builds the model of `folder`/config.json on the meta device: no memory, no values."""
    options = json.loads((folder / "config.json").read_text("utf-8"))
    with torch.device("meta"):
        return LongCatVideoTransformer3DModel.from_config(options)  # pyright: ignore


class CheckpointReader:
    """Reads rows of named tensors from a folder's safetensors files, with or without an index.

    Raises:
        ValueError: no weights in the folder, a file of the index is missing, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: damaged or cut short ({error}). Copy or download it again."
                ) from error
            self.where.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.where[name].get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads rows [start, stop) of a tensor; all of a scalar."""
        piece = self.where[name].get_slice(name)
        return piece[start:stop] if piece.get_shape() else self.where[name].get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that the index names, else all that are there."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of the {len(names)} weight files named in "
                f"{indexes[0].name} are missing, first {missing[0]}. Copy or download them again."
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder}: no *.safetensors file. Give pretrained_model_name_or_path a folder whose "
            'dit/ holds the weights, or set transformer_init to "random" to train from nothing.'
        )
    return files


@torch.no_grad()
def load_weights(
    model: nn.Module, folder: Path | None, *, seed: int, init: str = "pretrained"
) -> None:
    """Loads every parameter from `folder`, or initializes it. All processes call it.

    Raises:
        ValueError: on all processes: names or shapes do not match the model's, or `verify_loaded`.
    """
    params = {official_name(name): param for name, param in model.named_parameters()}
    if init == "random":
        for name, param in params.items():
            init_parameter(name, param, seed=seed)
    else:
        assert folder is not None
        reader = CheckpointReader(folder)
        check_names(reader, params)
        for name, param in params.items():
            part = local(param)
            width = math.prod(param.shape[1:])
            start = first_element(param) // max(1, width)
            part.copy_(reader.rows(name, start, start + (len(part) if part.ndim else 1)))
    verify_loaded(model)


def official_name(name: str) -> str:
    """Returns a parameter's name without the wrappers of checkpointing and compilation."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def check_names(reader: CheckpointReader, params: dict[str, Any]) -> None:
    """Raises ValueError unless the folder holds these names, with these shapes, and no others."""
    missing = [name for name in params if name not in reader]
    unexpected = [name for name in reader.where if name not in params]
    wrong = [name for name in params if name in reader and reader.shape(name) != params[name].shape]
    for names, what in ((missing, "missing"), (unexpected, "unknown to the model")):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"{reader.folder}: {len(names)} weights are {what}: {listed}. The folder is "
                "incomplete, or its config.json is another model's."
            )
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{reader.folder}: {name} has shape {reader.shape(name)}, but config.json makes it "
            f"{tuple(params[name].shape)} ({len(wrong)} such weights). Give the config.json that "
            "belongs to these weights."
        )


def init_parameter(name: str, param: Tensor, *, seed: int) -> None:
    """Initializes this process's part with values that depend on name, place and seed alone.

    As usual for diffusion transformers: linears uniform after Glorot and Bengio (2010), norms 1,
    biases 0, `SMALL_LAYERS` uniform with a gain of SMALL_GAIN.

    Raises:
        ValueError: the name follows none of these patterns.
    """
    part = local(param)
    module, _, kind = name.rpartition(".")
    if kind == "bias":
        part.zero_()
    elif kind == "weight" and "norm" in module.rpartition(".")[2]:
        part.fill_(1)
    elif kind == "weight" and param.ndim > 1:
        fan_out, fan_in = param.shape[0], math.prod(param.shape[1:])
        deviation = math.sqrt(2 / (fan_in + fan_out))
        if any(layer in name for layer in SMALL_LAYERS):
            deviation = SMALL_GAIN / math.sqrt(fan_in)
        init_uniform(
            part, math.sqrt(3) * deviation, first_element(param), random_keys(seed, "start", name)
        )
    else:
        raise ValueError(f"{name}: no rule for its initial values; init_parameter needs one.")


def init_uniform(part: Tensor, bound: float, first: int, keys: tuple[int, int]) -> None:
    """Draws U(-bound, bound), 24 random bits a value; `first`: the part's place in the whole."""
    flat = part.view(-1)
    for start in range(0, len(flat), DRAW_CHUNK):
        piece = flat[start : start + DRAW_CHUNK]
        numbers = torch.tensor([*keys, to_int32(first + start)], dtype=torch.int32)
        bits = random_bits(numbers.to(piece.device), piece) >> 8  # -2^23 .. 2^23 - 1
        piece.copy_(bits.float().add_(0.5).mul_(bound * 2.0**-23))


@torch.no_grad()
def verify_loaded(model: nn.Module) -> None:
    """Checks that every weight has a sane value. All processes call it, and all raise alike.

    Raises:
        ValueError: a tensor is still on the meta device, or a parameter is not finite, larger than
            LARGEST_SANE, or all zero where it is no bias.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    on_meta = [official_name(name) for name, value in tensors if value.is_meta]
    if on_meta:
        raise ValueError(f"{len(on_meta)} tensors were never given memory, first {on_meta[0]}.")
    names, largest = [], []
    for name, param in model.named_parameters():
        part = local(param)
        names.append(official_name(name))
        largest.append(part.abs().amax().float().cpu() if part.numel() else torch.zeros(()))
    sizes = torch.nan_to_num(torch.stack(largest), nan=math.inf)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sizes, dist.ReduceOp.MAX)
    for name, size in zip(names, sizes.tolist(), strict=True):
        if math.isinf(size):
            raise ValueError(f"{name}: the weights hold NaN or infinite values.")
        if size > LARGEST_SANE:
            raise ValueError(f"{name}: a weight of size {size:.3g} is beyond all sense.")
        if size == 0 and not name.endswith("bias"):
            raise ValueError(f"{name}: all its weights are zero; the file was never written.")


def save_transformer(module: Any, folder: Path, *, dtype: torch.dtype, is_main: bool) -> None:
    """Writes config.json and safetensors of the Diffusers layout; all processes call it.

    The main process gathers and writes tensor by tensor. The folder is written atomically: beside
    its place, then renamed.
    """
    partial = folder.with_name(folder.name + ".partial")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        total = sum(p.numel() for p in module.parameters()) * dtype.itemsize
        check_free_disk(partial, total, what="The transformer's export")
        (partial / "config.json").write_text(json.dumps(diffusers_config(module), indent=2))
    writer = ShardWriter(partial)
    for name, value in whole_tensors(module, dtype):
        if is_main:
            writer.add(name, value)
    if is_main:
        writer.finish()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    if dist.is_initialized():
        dist.barrier()


class ShardWriter:
    """Collects tensors into files of at most MAX_SHARD_BYTES."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shard: dict[str, Tensor] = {}
        self.files: list[list[str]] = []  # the names in each file that is written
        self.size = self.total = 0

    def add(self, name: str, value: Tensor) -> None:
        if self.shard and self.size + value.nbytes > MAX_SHARD_BYTES:
            self._flush()
        self.shard[name] = value
        self.size += value.nbytes
        self.total += value.nbytes

    def _flush(self) -> None:
        path = self.folder / f"part-{len(self.files)}"
        save_file(self.shard, path, metadata={"format": "pt"})
        self.files.append(list(self.shard))
        self.shard, self.size = {}, 0

    def finish(self) -> None:
        """Writes the rest, and gives the files the names that their number asks for."""
        self._flush()
        count = len(self.files)
        index: dict[str, str] = {}
        for number, names in enumerate(self.files):
            place = "" if count == 1 else f"-{number + 1:05d}-of-{count:05d}"
            final = f"{WEIGHTS}{place}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / final)
            index.update(dict.fromkeys(names, final))
        if count > 1:
            (self.folder / f"{WEIGHTS}.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": self.total}, "weight_map": index}, indent=2)
            )


def whole_tensors(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields (official name, whole tensor on the CPU) one by one; all processes take part."""
    reshard(module)
    for name, param in module.named_parameters():
        value: Any = param.detach().to(dtype)
        if isinstance(value, DTensor):  # of an offloaded block it is in host memory
            value = value.to(value.device_mesh.device_type)
            value = value.full_tensor()  # pyright: ignore
        yield official_name(name), value.cpu().contiguous()


def reshard(module: nn.Module) -> None:
    """Frees gathered weights: FSDP keeps some after a forward, and would not see new ones."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def diffusers_config(module: Any) -> dict[str, Any]:
    """Makes a Diffusers config.json. Its own `save_config` would name FSDP's subclass."""
    kind = next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))
    options = {key: value for key, value in module.config.items() if not key.startswith("_")}
    return {"_class_name": kind.__name__, "_diffusers_version": diffusers_version, **options}
