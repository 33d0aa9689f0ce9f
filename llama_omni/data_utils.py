"""From records to batches: prompt, labels, mel frames and target units, right-padded.

Place in the data flow: records (dataset/records.py) -> samples -> batches (training/loop.py). Text
is made by dataset/prompt.py, mel by speech/audio.py, both here in the DataLoader's workers; units
were extracted before.

    python -m llama_omni.data_utils check DATA [--stage 2] [--tokenizer FOLDER]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llama_omni.dataset.check import scan_records
from llama_omni.dataset.prompt import (
    IGNORE_INDEX,
    SPEECH_TOKEN_INDEX,
    pad_token_id,
    tokenize_conversation,
    tokenize_prompt,
)
from llama_omni.dataset.sampler import FILLER
from llama_omni.speech.audio import compute_mel, load_audio, num_speech_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from llama_omni.dataset.records import Record, Turn

__all__ = [
    "IGNORE_INDEX",
    "SPEECH_TOKEN_INDEX",
    "Batch",
    "Sample",
    "SpeechInstructionDataset",
    "collate",
    "pad_token_id",
    "scan_records",
    "tokenize_conversation",
    "tokenize_prompt",
]


@dataclass
class Sample:
    """One conversation up to some answer. `tgt_units` is None in stage 1."""

    input_ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    mels: list[torch.Tensor]  # a clip each turn: (n_mels, F)
    tgt_units: list[int] | None  # (U,)


@dataclass
class Batch:
    """Samples padded on the right; the clips of all turns of all samples stand in order."""

    input_ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, IGNORE_INDEX where nothing is learned
    speech: torch.Tensor  # (S, n_mels, F) float32
    speech_lengths: torch.Tensor  # (S,) int64, mel frames
    tgt_units: torch.Tensor | None  # (B, U) int64, IGNORE_INDEX as padding

    @property
    def num_label_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_units(self) -> int:
        return 0 if self.tgt_units is None else int((self.tgt_units != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:  # called by the DataLoader
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            change(self.input_ids),
            change(self.labels),
            change(self.speech),
            change(self.speech_lengths),
            None if self.tgt_units is None else change(self.tgt_units),
        )


class SpeechInstructionDataset(Dataset[Sample]):
    """Samples of either stage; an item depends on its index alone, so order can be resumed.

    labelled="all" (stage 1): a sample is a record, and all its answers are learned. "last" (stage
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
        labelled: Literal["all", "last"] = "all",
        units: Mapping[str, Sequence[int]] | None = None,
        pad_audio_to_30s: bool = False,
        max_length: int = 2048,
    ) -> None:
        if units is not None and labelled != "last":
            raise ValueError("units belong to one answer: they need labelled='last'")
        self.records = records
        self.tokenizer = tokenizer
        self.feature_extractor = feature_extractor
        self.ds_rate = ds_rate
        self.labelled: Literal["all", "last"] = labelled
        self.units = units
        self.pad_audio_to_30s = pad_audio_to_30s
        self.max_length = max_length
        # (record, number of its turns) of each sample
        self.samples = [
            (index, num_turns)
            for index, record in enumerate(records)
            for num_turns in range(
                1 if labelled == "last" else len(record.turns), len(record.turns) + 1
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
            labelled=self.labelled,
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


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """(rows, longest row) int64."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


if __name__ == "__main__":
    from llama_omni.dataset.check import main

    sys.exit(main())
