"""Stage 2, speech generation: trains the speech generator alone, by CTC over discrete units.

Targets are units of the answers' speech: the records' own, or extracted once before training (see
`dataset/units.py`). `train.py` puts the parts together.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llama_omni.model.loading import WEIGHTS, CheckpointReader, encoder_shape, read_llama_config
from llama_omni.model.loss import count_infeasible
from llama_omni.model.omni import OmniSpeech2SLlamaForCausalLM, build_model_config
from llama_omni.options.hub import resolve_artifact
from llama_omni.training.meter import Objective

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from llama_omni.dataset.batch import Batch
    from llama_omni.options.config import TrainConfig


def build_objective(config: TrainConfig) -> Objective:
    """Returns mean CTC loss a unit over the global batch, times `ctc_loss_weight`."""
    return Objective(
        task="units",
        count=lambda batch: batch.num_units,
        unit="units",
        ratio="blank_share",
        weight=config.ctc_loss_weight,
        infeasible=partial(_count_infeasible, config),
    )


def _count_infeasible(config: TrainConfig, batch: Batch) -> tuple[int, int]:
    assert batch.tgt_units is not None
    return count_infeasible(
        batch.labels,
        batch.tgt_units,
        factor=config.ctc_upsample_factor,
        stretch=config.ctc_infeasible == "stretch",
    )


def find_sources(config: TrainConfig) -> tuple[Path, Path]:
    """Returns the folder of stage 1's model twice: it holds the speech encoder as well."""
    folder = resolve_artifact(
        str(config.stage1_model_path), field="stage1_model_path", allow_patterns=WEIGHTS
    )
    return folder, folder


def build_model(config: TrainConfig, folder: Path, _: Path) -> tuple[Any, list[CheckpointReader]]:
    """Builds the model on the meta device, and the readers of its weights.

    A generator in the checkpoint (a released model, or an earlier stage 2) is trained further.
    """
    reader = CheckpointReader(folder)
    shape = encoder_shape(reader, "model.speech_encoder.")
    base = read_llama_config(folder)
    rate = getattr(base, "speech_encoder_ds_rate", config.speech_encoder_ds_rate)
    if rate != config.speech_encoder_ds_rate:
        raise ValueError(
            f"{config.source}: speech_encoder_ds_rate={config.speech_encoder_ds_rate}, but stage 1 "
            f"in {folder} was trained with {rate}. Set it to {rate}."
        )
    with torch.device("meta"):
        model = OmniSpeech2SLlamaForCausalLM(build_model_config(base, shape, config))
    return model, [reader]


def set_trainable(model: Any, config: TrainConfig) -> None:
    """Makes the speech generator alone trainable."""
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("speech_generator."))


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Returns one group; asserts that it holds the generator's parameters and no others."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert named
    assert all(name.startswith("speech_generator.") for name, _ in named)
    params = [param for _, param in named]
    return [{"params": params, "lr": config.learning_rate, "weight_decay": config.weight_decay}]


def add_kmeans(config: TrainConfig, final_model: Path) -> None:
    """Saves the unit centroids beside the model, where `generate.py` looks for its voice."""
    from llama_omni.speech.kmeans import read_kmeans, save_kmeans

    kmeans = resolve_artifact(str(config.kmeans_model_path), field="kmeans_model_path")
    save_kmeans(final_model / "kmeans.safetensors", read_kmeans(kmeans))
