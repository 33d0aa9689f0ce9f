"""Reads the lengths of a dataset's samples, by audio headers and token counts, for `plan/`."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_omni.options.config import TrainConfig

LOOKED_AT = 1000  # records
PROMPT_TOKENS, NEXT_PROMPT_TOKENS = 61, 24  # of the first and of further turns, by Llama 3
LETTERS_PER_TOKEN = 4.5  # of English in Llama 3's tokenizer
UNITS_PER_SECOND = 29.1  # arXiv 2409.06666, table 1: 553.6 units of 19.0 s


@dataclass(frozen=True)
class SampleLength:
    """Lengths of one training sample."""

    clips: tuple[float, ...]  # seconds
    text_tokens: int  # prompt and answers, <|eot_id|> included
    answer_tokens: int  # those of them that are learned
    units: int = 0


@dataclass(frozen=True)
class Lengths:
    """Lengths of the samples looked at; `num_samples` is how many the dataset has."""

    samples: tuple[SampleLength, ...]
    num_samples: int
    source: str

    @staticmethod
    def paper(num_points: int = 199) -> Lengths:
        """Returns InstructS2S-200K's means (arXiv 2409.06666, table 1), spread by a normal curve.

        The paper gives no spread; a third of the mean is taken, which makes the longest of a large
        set about twice the mean.
        """
        normal = statistics.NormalDist(1.0, 1 / 3)
        samples: list[SampleLength] = []
        for i in range(num_points):
            factor = max(0.2, normal.inv_cdf((i + 0.5) / num_points))
            answer = round(40.5 * factor)
            samples.append(
                SampleLength((7.5 * factor,), PROMPT_TOKENS + answer, answer, round(553.6 * factor))
            )
        source = "means of InstructS2S-200K (arXiv 2409.06666, table 1)"
        return Lengths(tuple(samples), 200_000, source)


def read_lengths(config: TrainConfig, data_path: str | None) -> Lengths:
    """Returns the lengths of `data_path`, or the paper's means when there is none.

    Tokens are counted by the tokenizer.json of a local model, else estimated from the letters. A
    record of n turns makes one sample in stage 1 and n in stage 2.

    Raises:
        ValueError or FileNotFoundError: the dataset cannot be read or holds no good record.
    """
    if not data_path:
        return Lengths.paper()
    from llama_omni.dataset.records import read_records
    from llama_omni.speech.audio import audio_duration

    is_stage2 = config.stage == 2
    records, _ = read_records(Path(data_path), needs_units=is_stage2)
    if not records:
        raise ValueError(f"{data_path}: no usable record. See `python -m llama_omni.data_utils`.")
    looked_at = records[:: -(-len(records) // LOOKED_AT)]
    count, how = _token_counter(config)
    samples: list[SampleLength] = []
    for record in looked_at:
        clips: list[float] = []
        text = learned = 0
        for number, turn in enumerate(record.turns, start=1):
            clips.append(audio_duration(turn.speech_path))
            answer = count(turn.answer) + 1  # <|eot_id|>
            text += (NEXT_PROMPT_TOKENS if number > 1 else PROMPT_TOKENS) + answer
            learned = answer if is_stage2 else learned + answer
            units = len(turn.tgt_units or ())
            if is_stage2 and not units and turn.answer_speech_path is not None:
                units = round(audio_duration(turn.answer_speech_path) * UNITS_PER_SECOND)
            if is_stage2 or number == len(record.turns):
                samples.append(SampleLength(tuple(clips), text, learned, units))
    num_samples = sum(len(record.turns) if is_stage2 else 1 for record in records)
    source = f"{len(looked_at)} records of {data_path}, tokens by {how}"
    return Lengths(tuple(samples), num_samples, source)


def _token_counter(config: TrainConfig) -> tuple[Callable[[str], int], str]:
    """Returns a function that counts the tokens of a text, and how it does."""
    folder = config.model_name_or_path if config.stage == 1 else config.stage1_model_path
    path = Path(str(folder)) / "tokenizer.json"
    if not path.is_file():
        return lambda text: round(len(text) / LETTERS_PER_TOKEN), "their letters"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), str(path)
