"""Reads an adapter's folder, as a training leaves it: by how much each weight of the base changes.

PEFT's adapter_config.json and adapter_model.safetensors, and trained_modules.safetensors with what
was trained beside the adapters. Needs no PEFT and no base; tools/merge_lora.py writes the result.

Shapes: r rank.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from vss_longcat_omni.model.saving import TRAINED_MODULES
from vss_longcat_omni.options.run_arguments import read_json

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# Fields of PEFT's LoraConfig that are followed here, and those that change nothing of a merge.
FOLLOWED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
# All others must be empty, or one of these. Other ways to initialize change the base too.
PLAIN = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal"),
    "peft_type": ("LORA",),
}


class LoraPair(NamedTuple):
    """What is added to a weight (out, in): scale * b @ a."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


Change: TypeAlias = LoraPair | Tensor  # a tensor takes the stored one's place


def apply_change(stored: Tensor, change: Change, dtype: torch.dtype | None = None) -> Tensor:
    """Return the new weight, computed in float32 and rounded to `dtype` (None: as stored)."""
    if isinstance(change, LoraPair):
        merged = stored.float() + change.scale * (change.b.float() @ change.a.float())
    else:
        merged = change
    return merged.to(dtype or stored.dtype)


def read_adapter(folder: Path) -> dict[str, Change]:
    """Return what changes, by the model's names: pairs to add, and whole tensors in their place.

    Raises:
        ValueError: a file is missing or broken, or the adapter is more than plain LoRA.
    """
    config = _read_config(folder / CONFIG)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_trained(folder / WEIGHTS).items():
        match = ADAPTER_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{folder / WEIGHTS}: {key} is no LoRA weight of a linear layer.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    changes: dict[str, Change] = {}
    for module, pair in sides.items():
        r = _find(config.get("rank_pattern"), module, config["r"])
        alpha = _find(config.get("alpha_pattern"), module, config["lora_alpha"])
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None:
            raise ValueError(f"{folder / WEIGHTS}: {module} has only one of lora_A and lora_B.")
        if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[0] == b.shape[1] == r:
            raise ValueError(
                f"{folder}: {module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not "
                f"of rank {r}, which {CONFIG} says."
            )
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        changes[f"{module}.weight"] = LoraPair(a, b, scale)
    if (folder / TRAINED_MODULES).is_file():
        for name, tensor in _read_trained(folder / TRAINED_MODULES).items():
            if name in changes:
                raise ValueError(f"{folder / TRAINED_MODULES}: {name} has an adapter too.")
            changes[name] = tensor
    return changes


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file: {path.parent} is no folder of an adapter.")
    config = read_json(path, name=str(path))
    for key, value in config.items():
        is_known = key in FOLLOWED | NEUTRAL or value in PLAIN.get(key, ())
        if value and not is_known:
            raise ValueError(
                f"{path}: {key}={value!r}: plain LoRA alone is merged here. PEFT's own "
                "merge_and_unload may know it, where the whole model fits into memory."
            )
    missing = [key for key in ("r", "lora_alpha") if key not in config]
    if missing:
        raise ValueError(f"{path}: no {missing[0]}: not the config of a LoRA adapter.")
    return config


def _find(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the first value whose pattern ends the module's name, as in PEFT."""
    items = (patterns or {}).items()
    return next((v for k, v in items if re.match(rf"(.*\.)?({k})$", module)), default)


def _read_trained(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file: {path.parent} is no whole adapter.")
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ValueError(f"{path}: not readable as safetensors ({error}).") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors.")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinite values.")
    return tensors


def compute_digest(folder: Path) -> str:
    """Return the sha256 of all that is read here."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, TRAINED_MODULES):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()
