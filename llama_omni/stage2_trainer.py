"""Stage 2, speech generation: trains the speech generator alone, by CTC over discrete units.

Targets are units of the answers' speech: the records' own, or extracted once before training (see
`units.py`). `train.py` puts the parts together.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llama_omni.model.loading import CheckpointReader, encoder_shape
from llama_omni.model.omni import OmniSpeech2SLlamaForCausalLM, build_model_config
from llama_omni.model.speech_generator import count_infeasible
from llama_omni.options.hub import resolve_artifact
from llama_omni.stage1_trainer import WEIGHTS, read_llama_config
from llama_omni.training.loop import Objective

if TYPE_CHECKING:
    from torch import nn

    from llama_omni.data_utils import Batch
    from llama_omni.dataset.records import Record
    from llama_omni.options.config import TrainConfig

logger = logging.getLogger(__name__)


def build_objective(config: TrainConfig) -> Objective:
    """Mean CTC loss a unit over the global batch, times `ctc_loss_weight`."""
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
    """Folders of stage 1's model; it holds the speech encoder as well."""
    folder = resolve_artifact(
        str(config.stage1_model_path), field="stage1_model_path", allow_patterns=WEIGHTS
    )
    return folder, folder


def build_model(config: TrainConfig, folder: Path, _: Path) -> tuple[Any, list[CheckpointReader]]:
    """The model on the meta device and the readers of its weights.

    A generator in the checkpoint (a released model, or an earlier stage 2) is gone on from.
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
    """The speech generator alone."""
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith("speech_generator."))


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """One group; that it holds the generator's parameters and no others is asserted."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert named
    assert all(name.startswith("speech_generator.") for name, _ in named)
    return [{"params": [param for _, param in named], "lr": config.learning_rate}]


def prepare_units(
    config: TrainConfig, records: list[Record], output_dir: Path, device: torch.device
) -> dict[str, list[int]]:
    """Units of every answer that has none in its record, extracted by all processes and cached.

    Raises:
        ValueError: the k-means has another number of units than `unit_vocab_size`.
    """
    from llama_omni.units import extract_units, load_quantizer, load_unit_cache

    kmeans = resolve_artifact(str(config.kmeans_model_path), field="kmeans_model_path")
    hubert = config.hubert_model_path and resolve_artifact(
        config.hubert_model_path, field="hubert_model_path"
    )
    quantizer = load_quantizer(kmeans, hubert_path=hubert or None, device=device)
    if quantizer.num_units != config.unit_vocab_size:
        raise ValueError(
            f"{config.source}: unit_vocab_size={config.unit_vocab_size}, but {kmeans} has "
            f"{quantizer.num_units} units. Set unit_vocab_size to {quantizer.num_units}."
        )
    cache_dir = Path(config.unit_cache_dir) if config.unit_cache_dir else output_dir / "units"
    paths = sorted(
        {
            turn.answer_speech_path
            for record in records
            for turn in record.turns
            if turn.answer_speech_path is not None
            and (turn.tgt_units is None or not config.has_tgt_units)
        }
    )
    extract_units(
        paths, quantizer, cache_dir, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    dist.barrier()
    cached = load_unit_cache(cache_dir)
    keys = {str(path): str(path.resolve()) for path in paths}
    return {path: cached[key] for path, key in keys.items() if key in cached}


def add_kmeans(config: TrainConfig, final_model: Path) -> None:
    """Puts the unit centres beside the model, where `generate.py` looks for the embedded voice."""
    from llama_omni.speech.kmeans import read_kmeans, save_kmeans

    kmeans = resolve_artifact(str(config.kmeans_model_path), field="kmeans_model_path")
    save_kmeans(final_model / "kmeans.safetensors", read_kmeans(kmeans))
