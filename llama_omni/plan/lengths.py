"""Lengths of a dataset for the plan: audio headers and token counts of an even sample of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama_omni.dataset.prompt import AFTER_SPEECH, BEFORE_SPEECH, SYSTEM_PROMPT
from llama_omni.plan.sizes import Lengths, SampleLength

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_omni.dataset.records import Record
    from llama_omni.options.config import TrainConfig

LOOKED_AT = 1000  # records
PROMPT_TOKENS, NEXT_PROMPT_TOKENS = 61, 24  # of the first and of further turns, by Llama 3
LETTERS_PER_TOKEN = 4.5  # of English in Llama 3's tokenizer
UNITS_PER_SECOND = 29.1  # arXiv 2409.06666, table 1: 553.6 units of 19.0 s


def read_lengths(config: TrainConfig, data_path: str | None) -> Lengths:
    """Of `data_path`, or the paper's means when there is none.

    Tokens are counted by the tokenizer.json of a local model, else told from the letters. A record
    of n turns makes one sample in stage 1 and n in stage 2.

    Raises:
        ValueError or FileNotFoundError: the dataset cannot be read or holds no good record.
    """
    if not data_path:
        return Lengths.paper()
    from llama_omni.dataset.records import read_records

    records, _ = read_records(Path(data_path), needs_units=config.stage == 2)
    if not records:
        raise ValueError(f"{data_path}: no usable record. See `python -m llama_omni.data_utils`.")
    looked_at = records[:: -(-len(records) // LOOKED_AT)]
    count, prompts, how = token_counter(config)
    samples = [s for r in looked_at for s in record_lengths(r, config.stage, count, prompts)]
    num_samples = sum(len(r.turns) if config.stage == 2 else 1 for r in records)
    source = f"{len(looked_at)} records of {data_path}, tokens by {how}"
    return Lengths(tuple(samples), num_samples, source)


def token_counter(config: TrainConfig) -> tuple[Callable[[str], int], tuple[int, int], str]:
    """(tokens of a text, prompt tokens of the first and of further turns, how they are counted)."""
    folder = config.model_name_or_path if config.stage == 1 else config.stage1_model_path
    path = Path(str(folder)) / "tokenizer.json"
    if not path.is_file():
        return (
            lambda text: round(len(text) / LETTERS_PER_TOKEN),
            (
                PROMPT_TOKENS,
                NEXT_PROMPT_TOKENS,
            ),
            "their letters",
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    turn = count(BEFORE_SPEECH) + count(AFTER_SPEECH)
    return count, (count(SYSTEM_PROMPT) + turn, turn), str(path)


def record_lengths(
    record: Record, stage: int, count: Callable[[str], int], prompts: tuple[int, int]
) -> list[SampleLength]:
    """The samples that a record makes."""
    clips: list[float] = []
    text = learned = 0
    samples: list[SampleLength] = []
    for number, turn in enumerate(record.turns):
        clips.append(seconds_of(turn.speech_path))
        answer = count(turn.answer) + 1  # <|eot_id|>
        text += prompts[number > 0] + answer
        learned = answer if stage == 2 else learned + answer
        units = len(turn.tgt_units or ())
        if stage == 2 and not units and turn.answer_speech_path is not None:
            units = round(seconds_of(turn.answer_speech_path) * UNITS_PER_SECOND)
        samples.append(SampleLength(tuple(clips), text, learned, units))
    return samples if stage == 2 else samples[-1:]


def seconds_of(path: Path) -> float:
    """From the header; raises ValueError when it cannot be read."""
    import soundfile

    try:
        return soundfile.info(path).duration
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path}: not readable as audio ({error}).") from None
