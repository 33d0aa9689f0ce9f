"""Loads safetensors folders into (sharded) parameters, and saves them as a released folder.

A model is built on the meta device, wrapped, given memory, and only then loaded: each process
reads just the rows it keeps. What a checkpoint lacks (a new projector or generator, LoRA) is drawn
from a random stream of its own name, so the values do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, LlamaConfig

from llama_omni.model.sharding import first_element, local
from llama_omni.options.hub import check_free_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

# Whisper-large-v3 also holds fp32 copies of all its weights under other names.
WEIGHTS = ("*.json", "model.safetensors", "model-*.safetensors", "kmeans.safetensors")
MAX_SHARD_BYTES = 5_000_000_000
NEW_MODULES = ("speech_projector.", "speech_generator.", "lora_")


def read_llama_config(folder: Path) -> LlamaConfig:
    """Reads config.json; raises ValueError when the folder holds no Llama-shaped model."""
    try:
        base = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable config.json ({error}).") from None
    if not isinstance(base, LlamaConfig):
        raise ValueError(
            f"{folder}: a {base.model_type} model; LLaMA-Omni is built on a Llama. Give the folder "
            "or hub id of a Llama, e.g. meta-llama/Llama-3.1-8B-Instruct."
        )
    return base


class CheckpointReader:
    """Reads rows of named tensors from the safetensors files of one folder.

    Args:
        folder: holds *.safetensors, with or without an index.
        rename: maps a stored name to the model's, or to None to leave it out.

    Raises:
        ValueError: there is no safetensors file in the folder.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str | None] = lambda key: key) -> None:
        self.folder = folder
        self.files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        if not self.files:
            raise ValueError(
                f"{folder}: no *.safetensors file. Convert the checkpoint to safetensors; pickled "
                ".bin and .pt weights are not read."
            )
        self.where: dict[str, tuple[Any, str]] = {}
        for file in self.files:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name = rename(key)
                if name is not None:
                    self.where[name] = (file, key)

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self.where[name]
        return tuple(file.get_slice(key).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Reads the rows [start, stop) of a tensor; all of a scalar."""
        file, key = self.where[name]
        piece = file.get_slice(key)
        return piece[start:stop] if piece.get_shape() else file.get_tensor(key)


def encoder_shape(reader: CheckpointReader, prefix: str = "") -> dict[str, int]:
    """Returns the sizes of a Whisper encoder by its weights.

    Raises:
        ValueError: the folder holds no Whisper encoder.
    """
    conv = f"{prefix}conv1.weight"
    if conv not in reader:
        raise ValueError(f"{reader.folder}: holds no Whisper encoder (no {conv}).")
    width, mel_size, _ = reader.shape(conv)
    layers = sum(
        name.startswith(f"{prefix}blocks.") and name.endswith(".attn.query.weight")
        for name in reader.where
    )
    return {
        "mel_size": mel_size,
        "speech_encoder_hidden_size": width,
        "speech_encoder_layers": layers,
    }


@torch.no_grad()
def load_weights(model: nn.Module, readers: list[CheckpointReader], *, seed: int) -> list[str]:
    """Loads every parameter from the first reader that has it; returns the names newly drawn.

    Raises:
        ValueError: a name that should be there is missing, a shape differs, or a value is NaN.
    """
    new, missing = [], []
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        stored = name.replace(".base_layer.", ".")  # LoRA wraps the linears it adapts
        reader = next((r for r in readers if stored in r), None)
        if reader is None and stored == "lm_head.weight":  # tied in the source checkpoint
            stored = "model.embed_tokens.weight"
            reader = next((r for r in readers if stored in r), None)
        if reader is not None:
            check_shape(stored, reader.shape(stored), shapes[name], reader.folder)
        elif any(part in name for part in NEW_MODULES):
            new.append(name)
        else:
            missing.append(name)
            continue
        part = local(param)
        start = first_element(param) // math.prod(shapes[name][1:])
        stop = start + (len(part) if part.ndim else 1)
        if reader is not None:
            part.copy_(reader.rows(stored, start, stop))
        else:
            values = draw(name, shapes[name], fan_in_of(name, shapes), seed=seed)
            part.copy_(values[start:stop])
        if not torch.isfinite(part).all():
            raise ValueError(f"{name}: the checkpoint holds NaN or infinite values.")
    if missing:
        folders = ", ".join(str(r.folder) for r in readers)
        raise ValueError(
            f"{folders}: {len(missing)} weights are missing, first {missing[0]}. The checkpoint is "
            "incomplete or of another architecture."
        )
    return new


def check_shape(name: str, stored: tuple[int, ...], wanted: tuple[int, ...], folder: Path) -> None:
    if stored == wanted:
        return
    keys = (
        "ctc_decoder_config, unit_vocab_size"
        if "generator" in name
        else ("speech_encoder_ds_rate, speech_encoder_hidden_size")
    )
    raise ValueError(
        f"{folder}: {name} has shape {stored}, but this run's config makes it {wanted}. Give the "
        f"values the checkpoint was made with ({keys}), or another checkpoint."
    )


def fan_in_of(name: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Returns the inputs of the linear layer that a weight or bias belongs to."""
    weight = name.removesuffix("bias") + "weight" if name.endswith("bias") else name
    return math.prod(shapes[weight][1:]) or 1


def draw(name: str, shape: tuple[int, ...], fan_in: int, *, seed: int) -> Tensor:
    """Draws initial values as PyTorch: U(+-1/sqrt(fan_in)), 1 for norms, 0 for LoRA's B."""
    if "layernorm" in name:
        return torch.ones(shape)
    if "lora_B" in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def export_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (released name, whole tensor on the CPU), LoRA merged. All processes take part."""
    params = dict(model.named_parameters())
    for name, param in params.items():
        if "lora_" in name:
            continue
        value = whole(param)
        if ".base_layer." in name:
            prefix = name.split(".base_layer.")[0]
            low = whole(params[f"{prefix}.lora_A.default.weight"]).float()
            high = whole(params[f"{prefix}.lora_B.default.weight"]).float()
            scaling: Any = model.get_submodule(prefix).scaling
            value = (value.float() + scaling["default"] * high @ low).to(value.dtype)
        yield name.replace(".base_layer.", "."), value


def whole(param: Tensor) -> Tensor:
    """Returns the full tensor on the CPU, from all processes' parts (also under ZeRO-3)."""
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().cpu().clone()
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().cpu()


def save_released(
    model: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    is_main: bool,
    companions: tuple[Any, ...] = (),
) -> None:
    """Writes config.json and safetensors shards under released names; all processes call it.

    `companions` (tokenizer, feature extractor) are saved beside them. The folder is written
    atomically: beside its place, then renamed.
    """
    partial = folder.with_name(folder.name + ".partial")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        check_free_disk(partial, total, what="the final model")
    shard: dict[str, Tensor] = {}
    files: list[dict[str, Tensor] | list[str]] = []
    size = 0

    def flush() -> None:
        nonlocal shard, size
        if shard:
            save_file(shard, partial / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
            files.append(list(shard))
        shard, size = {}, 0

    total_bytes = 0
    for name, value in export_names(model):
        if not is_main:
            continue
        value = value.to(dtype).contiguous()
        if size + value.nbytes > MAX_SHARD_BYTES:
            flush()
        shard[name] = value
        size += value.nbytes
        total_bytes += value.nbytes
    if not is_main:
        return
    flush()
    index: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (partial / f"part-{number}.safetensors").rename(partial / final)
        index.update(dict.fromkeys(names, final))
    (partial / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": index}, indent=2)
    )
    model.config.dtype = dtype
    for companion in (model.config, *companions):
        companion.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
