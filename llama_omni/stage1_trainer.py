"""Stage 1, speech to text: trains projector and language model on the answers' cross-entropy.

The speech encoder is frozen unless `tune_speech_encoder`. `train.py` puts the parts together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llama_omni.model.loading import WEIGHTS, CheckpointReader, encoder_shape, read_llama_config
from llama_omni.model.omni import OmniSpeech2SLlamaForCausalLM, build_model_config
from llama_omni.model.speech_encoder import rename_hf_key
from llama_omni.options.hub import resolve_artifact
from llama_omni.training.meter import Objective

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from llama_omni.options.config import TrainConfig

LORA_TARGETS = r"model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def build_objective(config: TrainConfig) -> Objective:
    """Returns mean cross-entropy a token of the answers over the global batch."""
    return Objective(
        task="text", count=lambda batch: batch.num_label_tokens, unit="tokens", ratio="accuracy"
    )


def find_sources(config: TrainConfig) -> tuple[Path, Path]:
    """Returns the folders of the language model (with tokenizer) and of the speech encoder."""
    llama = resolve_artifact(
        str(config.model_name_or_path), field="model_name_or_path", allow_patterns=WEIGHTS
    )
    encoder = resolve_artifact(
        str(config.speech_encoder), field="speech_encoder", allow_patterns=WEIGHTS
    )
    return llama, encoder


def build_model(
    config: TrainConfig, llama: Path, encoder: Path
) -> tuple[Any, list[CheckpointReader]]:
    """Builds the model on meta, and the readers of its weights; the first that has a weight wins.

    `llama` is a plain Llama or an earlier LLaMA-Omni checkpoint to continue from.
    """
    base = read_llama_config(llama)
    readers = [
        CheckpointReader(llama),
        CheckpointReader(encoder, lambda key: _in_model(rename_hf_key(key))),
    ]
    shape = encoder_shape(readers[1], "model.speech_encoder.")
    check_encoder_sizes(config, shape, encoder)
    with torch.device("meta"):
        model = OmniSpeech2SLlamaForCausalLM(build_model_config(base, shape, config))
    if config.pretrain_speech_projector:
        folder = resolve_artifact(
            config.pretrain_speech_projector, field="pretrain_speech_projector"
        )
        readers.insert(0, CheckpointReader(folder, _projector_only))
    if config.lora_enable:
        add_lora(model, config)
    return model, readers


def check_encoder_sizes(config: TrainConfig, shape: dict[str, int], folder: Path) -> None:
    for name in ("mel_size", "speech_encoder_hidden_size"):
        if getattr(config, name) != shape[name]:
            raise ValueError(
                f"{config.source}: {name}={getattr(config, name)}, but the encoder in {folder} has "
                f"{shape[name]}. Set {name} to {shape[name]}, or give another speech_encoder."
            )


def _in_model(name: str | None) -> str | None:
    return None if name is None else f"model.speech_encoder.{name}"


def _projector_only(key: str) -> str | None:
    """Accepts `linear1.weight`, `speech_projector.linear1.weight` and the full name."""
    tail = key.rpartition("speech_projector.")[2]
    return f"model.speech_projector.{tail}" if tail.startswith("linear") else None


def add_lora(model: nn.Module, config: TrainConfig) -> None:
    """Adds adapters to all linears of the language model's layers; final_model merges them."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=LORA_TARGETS,
        bias="none",
    )
    inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)


def set_trainable(model: Any, config: TrainConfig) -> None:
    """Sets `requires_grad` by the config: the projector always, the others as asked."""
    for name, param in model.named_parameters():
        if "speech_projector." in name:
            wanted = True
        elif "speech_encoder." in name:
            wanted = config.tune_speech_encoder
        elif "speech_generator." in name:
            wanted = False
        elif "lora_" in name:
            wanted = config.lora_enable
        else:
            wanted = config.trains_backbone
        param.requires_grad_(wanted)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns groups with their own peak learning rate: projector, encoder, language model."""
    rates = {
        "speech_projector.": config.speech_projector_lr or config.learning_rate,
        "speech_encoder.": config.speech_encoder_lr or config.learning_rate,
        "": config.learning_rate,
    }
    groups: dict[str, list[nn.Parameter]] = {part: [] for part in rates}
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups[next(part for part in rates if part in name)].append(param)
    return [
        {"params": params, "lr": rates[part], "weight_decay": config.weight_decay}
        for part, params in groups.items()
        if params
    ]
