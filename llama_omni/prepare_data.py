"""From a dataset path to a checked dataset: the steps from `records.py` to `data_utils.py`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from llama_omni.data_utils import SpeechInstructionDataset, scan_records
from llama_omni.dataset.records import BadRecord, Record, read_records
from llama_omni.stage2_trainer import prepare_units
from llama_omni.training.parallel import is_main_process

if TYPE_CHECKING:
    import torch

    from llama_omni.options.config import TrainConfig

logger = logging.getLogger(__name__)

SHOWN_BAD_RECORDS = 20


def build_dataset(
    config: TrainConfig, path: str, *, tokenizer: Any, features: Any, device: torch.device
) -> SpeechInstructionDataset:
    """Reads and checks records, gets their units in stage 2; all processes call it.

    Raises:
        ValueError: there are bad records (all are logged) and `skip_bad_records` is false, or no
            good record is left.
    """
    records, bad = read_records(
        Path(path), needs_units=config.stage == 2, unit_vocab_size=config.unit_vocab_size
    )
    bad += _scan_once(config, records, tokenizer)
    bad = sorted((b for b in bad if not b.is_warning), key=lambda b: b.line)
    records = drop_bad(config, path, records, bad)
    units = None
    if config.stage == 2:
        units = prepare_units(config, records, Path(str(config.output_dir)), device)
    return SpeechInstructionDataset(
        records,
        tokenizer,
        feature_extractor=features,
        ds_rate=config.speech_encoder_ds_rate,
        labelled="all" if config.stage == 1 else "last",
        units=units,
        pad_audio_to_30s=config.pad_audio_to_30s,
        max_length=config.model_max_length,
    )


def _scan_once(config: TrainConfig, records: list[Record], tokenizer: Any) -> list[BadRecord]:
    """Bad records by audio headers and token counts; one process looks and tells the others."""
    found: list[Any] = [None]
    if is_main_process():
        found[0] = scan_records(
            records,
            tokenizer=tokenizer,
            max_length=config.model_max_length,
            ds_rate=config.speech_encoder_ds_rate,
            unit_vocab_size=config.unit_vocab_size,
            ctc_upsample_factor=config.ctc_upsample_factor,
            stage=config.stage,
            pad_audio_to_30s=config.pad_audio_to_30s,
            decode=False,
        )
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def drop_bad(
    config: TrainConfig, path: str, records: list[Record], bad: list[BadRecord]
) -> list[Record]:
    """The records that are not bad; stops when some are, unless told to skip them."""
    for record in bad[:SHOWN_BAD_RECORDS]:
        logger.warning("bad record %s", record)
    if len(bad) > SHOWN_BAD_RECORDS:
        logger.warning("... and %d more", len(bad) - SHOWN_BAD_RECORDS)
    if bad and not config.skip_bad_records:
        raise ValueError(
            f"{path}: {len(bad)} bad record(s), first {bad[0]}. Mend them (`python -m "
            f"llama_omni.data_utils check {path}` lists all), or give --skip_bad_records."
        )
    bad_places = {(b.source, b.line) for b in bad}
    good = [r for r in records if (r.source, r.line) not in bad_places]
    if bad:
        logger.warning("skipped %d bad record(s), %d are left", len(bad), len(good))
    if not good:
        raise ValueError(f"{path}: no usable record is left.")
    return good
