"""Makes batches of a dataset: prompt, labels, mel frames and target units, right-padded.

Place in the data flow: dataset file -> records (dataset/records.py), checked (dataset/check.py) ->
samples -> batches (dataset/batch.py; training/loop.py). Units are extracted first
(dataset/units.py). Text is made by dataset/prompt.py, mel by speech/audio.py, both in the
DataLoader's workers.

    python -m llama_omni.data_utils check DATA [--stage 2] [--tokenizer FOLDER]
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llama_omni.dataset.batch import IGNORE_INDEX, Batch
from llama_omni.dataset.check import scan_records
from llama_omni.dataset.prompt import tokenize_conversation
from llama_omni.dataset.records import BadRecord, Record, read_records
from llama_omni.dataset.sampler import FILLER
from llama_omni.dataset.units import prepare_units
from llama_omni.speech.audio import load_audio
from llama_omni.speech.whisper_mel import compute_mel, num_speech_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llama_omni.dataset.record_formats import Turn
    from llama_omni.options.config import TrainConfig

logger = logging.getLogger("llama_omni.data_utils")

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
        labeled="all" if config.stage == 1 else "last",
        units=units,
        pad_audio_to_30s=config.pad_audio_to_30s,
        max_length=config.model_max_length,
    )


def _scan_once(config: TrainConfig, records: list[Record], tokenizer: Any) -> list[BadRecord]:
    """Returns the bad records by audio headers and token counts; one process scans for all."""
    found: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
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
    """Returns the records that are not bad; ValueError when some are, but by `skip_bad_records`."""
    for record in bad[:SHOWN_BAD_RECORDS]:
        logger.warning("bad record %s", record)
    if len(bad) > SHOWN_BAD_RECORDS:
        logger.warning("... and %d more", len(bad) - SHOWN_BAD_RECORDS)
    if bad and not config.skip_bad_records:
        raise ValueError(
            f"{path}: {len(bad)} bad record(s), first {bad[0]}. Fix them (`python -m "
            f"llama_omni.data_utils check {path}` lists all), or give --skip_bad_records."
        )
    bad_places = {(b.source, b.line) for b in bad}
    good = [r for r in records if (r.source, r.line) not in bad_places]
    if bad:
        logger.warning("skipped %d bad record(s), %d are left", len(bad), len(good))
    if not good:
        raise ValueError(f"{path}: no usable record is left.")
    return good


@dataclass
class Sample:
    """Holds a conversation up to some answer; `tgt_units` is None in stage 1."""

    input_ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    mels: list[torch.Tensor]  # a clip each turn: (n_mels, F)
    tgt_units: list[int] | None  # (U,)


class SpeechInstructionDataset(Dataset[Sample]):
    """Samples of either stage; an item depends on its index alone, so order can be resumed.

    labeled="all" (stage 1): a sample is a record, and all its answers are learned. "last" (stage
    2): a record of n turns makes n samples, turns 1..k with the labels and units of turn k, since
    the speech generator speaks one answer. Index -1 is a filler, sample 0 with nothing to learn,
    for the last batch of an epoch.

    `units` (None: no targets at all) maps str(answer_speech_path) to extracted units; answers that
    it lacks use their record's own. Questions over 30 s, too short ones and conversations over
    `max_length` tokens raise ValueError with file and line: `scan_records` finds them beforehand.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        *,
        feature_extractor: Any,
        ds_rate: int = 5,
        labeled: Literal["all", "last"] = "all",
        units: Mapping[str, Sequence[int]] | None = None,
        pad_audio_to_30s: bool = False,
        max_length: int = 2048,
    ) -> None:
        if units is not None and labeled != "last":
            raise ValueError("units belong to one answer: they need labeled='last'")
        self.records = records
        self.tokenizer = tokenizer
        self.feature_extractor = feature_extractor
        self.ds_rate = ds_rate
        self.labeled: Literal["all", "last"] = labeled
        self.units = units
        self.pad_audio_to_30s = pad_audio_to_30s
        self.max_length = max_length
        # (record, number of its turns) of each sample
        self.samples = [
            (index, num_turns)
            for index, record in enumerate(records)
            for num_turns in range(
                1 if labeled == "last" else len(record.turns), len(record.turns) + 1
            )
        ]
        for index, num_turns in self.samples if units is not None else ():
            self._units_of(records[index], records[index].turns[num_turns - 1])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if index == FILLER:
            sample = self[0]
            sample.labels = [IGNORE_INDEX] * len(sample.labels)
            sample.tgt_units = None if self.units is None else []
            return sample
        if not 0 <= index < len(self.samples):
            raise IndexError(f"sample {index} of {len(self.samples)}")
        record_index, num_turns = self.samples[index]
        record = self.records[record_index]
        turns = record.turns[:num_turns]
        try:
            mels = [self._mel_of(turn) for turn in turns]
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{record.source}:{record.line}: {error}") from error
        input_ids, labels = tokenize_conversation(
            turns,
            [num_speech_tokens(mel.shape[1], ds_rate=self.ds_rate) for mel in mels],
            self.tokenizer,
            labeled=self.labeled,
        )
        if len(input_ids) > self.max_length:
            raise ValueError(
                f"{record.source}:{record.line}: {len(input_ids)} tokens, over the limit of "
                f"{self.max_length} (model_max_length)"
            )
        units = None if self.units is None else self._units_of(record, turns[-1])
        return Sample(input_ids, labels, mels, units)

    def _mel_of(self, turn: Turn) -> torch.Tensor:
        waveform = load_audio(turn.speech_path, sample_rate=self.feature_extractor.sampling_rate)
        try:
            mel = compute_mel(waveform, self.feature_extractor, pad_to_30s=self.pad_audio_to_30s)
        except ValueError as error:
            raise ValueError(f"{turn.speech_path}: {error}") from error
        if num_speech_tokens(mel.shape[1], ds_rate=self.ds_rate) == 0:
            raise ValueError(f"{turn.speech_path}: too short to give one speech token")
        return mel

    def _units_of(self, record: Record, turn: Turn) -> list[int]:
        path = turn.answer_speech_path
        found = None
        if self.units is not None and path is not None:
            # The root of a record's paths is resolved; resolving each costs a stat a component.
            found = self.units.get(str(path)) or self.units.get(str(path.resolve()))
        found = found or turn.tgt_units
        if not found:
            raise ValueError(
                f"{record.source}:{record.line}: no units of the answer's own and none extracted "
                f"from its speech {path}"
            )
        return list(found)


def collate(samples: Sequence[Sample], *, pad_token_id: int) -> Batch:
    """Right-pads ids with `pad_token_id`, labels and units with IGNORE_INDEX, mel with zeros."""
    mels = [mel for sample in samples for mel in sample.mels]
    speech = pad_sequence([mel.T for mel in mels], batch_first=True)  # (S, F, n_mels)
    units = [sample.tgt_units for sample in samples if sample.tgt_units is not None]
    return Batch(
        input_ids=_pad([sample.input_ids for sample in samples], pad_token_id),
        labels=_pad([sample.labels for sample in samples], IGNORE_INDEX),
        speech=speech.transpose(1, 2).contiguous(),
        speech_lengths=torch.tensor([mel.shape[1] for mel in mels]),
        tgt_units=_pad(units, IGNORE_INDEX) if units else None,
    )


def _pad(sequences: list[list[int]], value: int) -> torch.Tensor:
    """Returns (number of sequences, longest) int64."""
    tensors = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


if __name__ == "__main__":
    from llama_omni.dataset.check import main

    sys.exit(main())
