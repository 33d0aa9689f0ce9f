"""Extracts target units of a dataset's answers on all processes, before stage 2 trains on them.

Place in the data flow: records (records.py) -> units by answer -> samples (data_utils.py).
speech/quantizer.py extracts them, speech/unit_cache.py keeps them for the next run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    import torch

    from llama_omni.dataset.records import Record
    from llama_omni.options.config import TrainConfig


def prepare_units(
    config: TrainConfig, records: list[Record], output_dir: Path, device: torch.device
) -> dict[str, list[int]]:
    """Returns units of every answer without any in its record, extracted by all processes, cached.

    Raises:
        ValueError: the k-means has another number of units than `unit_vocab_size`.
    """
    # Heavy imports wait until stage 2 needs them: data_utils.py is also a command.
    from llama_omni.options.hub import resolve_artifact
    from llama_omni.speech.quantizer import extract_units, load_quantizer
    from llama_omni.speech.unit_cache import load_unit_cache

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
