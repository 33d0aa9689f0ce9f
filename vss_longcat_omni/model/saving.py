"""Saves weights in the released layout: LLM shards with an index, part files for all else.

The part files are the encoders', the projectors', the audio tables' and the speech heads'.

They are safetensors here, where the released ones are pickles of the same keys; loading.py reads
both.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from vss_longcat_omni.model.loading import FUSED_EXPERTS, PART_FILES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from vss_longcat_omni.model.config import LongcatOmniConfig

TRAINED_MODULES = "trained_modules.safetensors"  # what is trained beside the adapters
MAX_SHARD_BYTES = 5_000_000_000
ENCODER_KEYS = ("vision_config", "audio_config")


def save_config(config: LongcatOmniConfig, folder: Path) -> None:
    """Write config.json, vision/config.json and audio/config.json."""
    values = config.to_dict()
    for key in ENCODER_KEYS:
        part = values.pop(key)
        if part is not None:
            path = folder / key.removesuffix("_config") / "config.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(part, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def save_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a whole model's state dict: shards of at most 5 GB, and the part files."""
    parts: dict[str, dict[str, Tensor]] = {}
    shards: list[dict[str, Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in split_experts(state):
        if part := find_part(name):
            parts.setdefault(part, {})[name.removeprefix(PART_FILES[part])] = tensor
            continue
        if num_bytes + tensor.nbytes > MAX_SHARD_BYTES and shards[-1]:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for part, tensors in parts.items():
        path = (folder / part).with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(tensors, path)


def find_part(name: str) -> str | None:
    """Return the part file that a tensor belongs to; None: the language model's shards."""
    found = (part for part, prefix in PART_FILES.items() if prefix and name.startswith(prefix))
    return next(found, None)


def split_experts(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as released: one tensor for each projection of each expert."""
    for name, tensor in state.items():
        fused = FUSED_EXPERTS.fullmatch(name)
        if fused is None:
            yield name, tensor
            continue
        experts, projection = fused.groups()
        for index, expert in enumerate(tensor):
            if projection == "down_proj":
                yield f"{experts}.{index}.down_proj.weight", expert
            else:
                gate, up = expert.chunk(2)
                yield f"{experts}.{index}.gate_proj.weight", gate
                yield f"{experts}.{index}.up_proj.weight", up


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write atomically."""
    temporary = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)
