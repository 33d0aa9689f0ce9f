"""Finds the records that training could not use, before it starts, and names file and line.

`scan_records` looks at audio headers and token counts (at each training start) or decodes all audio
(the command). Place in the data flow: beside records.py, ahead of data_utils.py.

    python -m llama_omni.data_utils check DATA [--stage 2] [--tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llama_omni.dataset.prompt import AFTER_SPEECH, BEFORE_SPEECH, SYSTEM_PROMPT
from llama_omni.dataset.records import BadRecord, Record, find_dataset_file, read_records
from llama_omni.speech.audio import audio_duration, read_mono
from llama_omni.speech.whisper_mel import num_mel_frames, num_speech_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SAMPLE_RATE = 16000
MAX_SECONDS = 30.0  # Whisper has positions for no more
MAX_LENGTH = 2048  # the released model's tokenizer_model_max_length
RECORDS_A_TASK, RECORDS_A_CALL = 64, 1024


def scan_records(
    records: Sequence[Record],
    *,
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    ds_rate: int = 5,
    unit_vocab_size: int = 1000,
    ctc_upsample_factor: int = 25,
    stage: int | None = None,
    decode: bool = False,
    pad_audio_to_30s: bool = False,
    show_progress: bool = True,
) -> list[BadRecord]:
    """Returns what is wrong with the records, in their order: one entry a record and severity.

    Questions: unreadable, zero-length, over 30 s, under one speech token. Answers' speech, where
    units will be extracted from it: unreadable, zero-length. Text (with a tokenizer): over
    `max_length` tokens. Units: beyond the vocabulary, or too many for the answer's frames; without
    a tokenizer an answer counts one token a byte, which no byte-level tokenizer exceeds, so what is
    reported is certain. Training stretches the frames of answers with too many units, so these are
    warnings (`is_warning`), unless even stretching leaves no CTC path.

    `stage` 1 looks at questions and text alone, 2 at what stage 2 reads, None at all that the
    records name. `decode` reads all samples rather than the headers.
    """
    text_tokens = _count_text_tokens(records, tokenizer)
    scanned = _scan_audio(records, stage=stage, decode=decode, show_progress=show_progress)
    found: list[BadRecord] = []
    for record, (problems, seconds), (prompt_tokens, answer_tokens) in zip(
        records, scanned, text_tokens, strict=True
    ):
        warnings: list[str] = []
        total = prompt_tokens + sum(answer_tokens)
        for turn, length in zip(record.turns, seconds, strict=True):
            frames = num_mel_frames(round(SAMPLE_RATE * (30 if pad_audio_to_30s else length)))
            num_speech = num_speech_tokens(frames, ds_rate=ds_rate)
            total += num_speech
            if length > 0 and num_speech == 0:
                problems.append(f"{turn.speech_path}: {length:.2f} s is too short, under one token")
        if tokenizer is not None and total > max_length:
            problems.append(f"{total} tokens, over the limit of {max_length} (model_max_length)")
        for turn, num_tokens in zip(record.turns, answer_tokens, strict=True):
            if stage != 1 and turn.tgt_units is not None:
                frames = ctc_upsample_factor * num_tokens
                text, is_bad = check_units(turn.tgt_units, frames, unit_vocab_size=unit_vocab_size)
                if text:
                    (problems if is_bad else warnings).append(text)
        for texts, is_warning in ((problems, False), (warnings, True)):
            if texts:
                found.append(BadRecord(record.source, record.line, "; ".join(texts), is_warning))
    return found


def check_units(
    units: Sequence[int], frames: int, *, unit_vocab_size: int
) -> tuple[str | None, bool]:
    """Returns (what is wrong or None, whether it stays so when `frames` stretch to the units).

    A CTC path needs a frame for each unit, and one for a blank between equal neighbors.
    """
    if max(units) >= unit_vocab_size:
        return f"unit {max(units)} is outside unit_vocab_size={unit_vocab_size}", True
    repeats = sum(left == right for left, right in pairwise(units))
    needed = len(units) + repeats
    if needed <= frames:
        return None, False
    counted = f"{len(units)} units" + (f" with {repeats} equal neighbors" if repeats else "")
    text = f"CTC-infeasible: {counted} need {needed} frames, its text gives {frames}"
    return text, needed > max(frames, len(units))


def _scan_audio(
    records: Sequence[Record], *, stage: int | None, decode: bool, show_progress: bool
) -> Iterator[tuple[list[str], list[float]]]:
    """Yields (problems, seconds of each question) of each record; libsndfile frees the GIL."""
    starts = range(0, len(records), RECORDS_A_TASK)
    tasks = [records[start : start + RECORDS_A_TASK] for start in starts]

    def scan(task: Sequence[Record]) -> list[tuple[list[str], list[float]]]:
        return [_scan_record(record, stage=stage, decode=decode) for record in task]

    label = "decoding audio" if decode else "reading audio headers"
    num_threads = min(32, 4 * (os.cpu_count() or 1))
    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(records), desc=label, unit="record", disable=not show_progress) as bar,
    ):
        for results in pool.map(scan, tasks):
            yield from results
            bar.update(len(results))


def _scan_record(
    record: Record, *, stage: int | None, decode: bool
) -> tuple[list[str], list[float]]:
    problems: list[str] = []
    seconds = []
    for turn in record.turns:
        length = _measure(turn.speech_path, problems, decode=decode)
        seconds.append(length)
        if length > MAX_SECONDS:
            problems.append(
                f"{turn.speech_path}: {length:.1f} s is too long, Whisper takes {MAX_SECONDS:g} s"
            )
        is_read = stage is None or (stage == 2 and turn.tgt_units is None)
        if turn.answer_speech_path is not None and is_read:
            _measure(turn.answer_speech_path, problems, decode=decode)
    return problems, seconds


def _measure(path: Path, problems: list[str], *, decode: bool) -> float:
    """Returns seconds, or 0.0 with a line added to `problems` when the file cannot be used."""
    try:
        length = audio_duration(path)
        if length == 0:
            raise ValueError(f"{path}: zero-length audio")
        if decode:
            waveform, rate = read_mono(path)
            decoded = len(waveform) / rate
            if decoded < 0.99 * length:  # a header promises what a broken download lacks
                raise ValueError(f"{path}: cut off after {decoded:.1f} of {length:.1f} s")
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
        return 0.0
    return length


def _count_text_tokens(
    records: Sequence[Record], tokenizer: Any
) -> Iterator[tuple[int, list[int]]]:
    """Yields (prompt tokens, tokens of each answer with its <|eot_id|>) of each record; without a
    tokenizer, 0 and the upper bound of one token a byte."""
    system = question = 0
    if tokenizer is not None:
        texts = (SYSTEM_PROMPT, BEFORE_SPEECH, AFTER_SPEECH)
        fixed = tokenizer(list(texts), add_special_tokens=False).input_ids
        system, question = len(fixed[0]), len(fixed[1]) + len(fixed[2])
    for start in range(0, len(records), RECORDS_A_CALL):
        chunk = records[start : start + RECORDS_A_CALL]
        answers = [turn.answer.strip() for record in chunk for turn in record.turns]
        if tokenizer is None:
            counts = iter([len(answer.encode()) for answer in answers])
        else:
            encoded = tokenizer(answers, add_special_tokens=False, split_special_tokens=True)
            counts = iter([len(ids) for ids in encoded.input_ids])
        for record in chunk:
            prompt = system + question * len(record.turns)
            yield prompt, [next(counts) + 1 for _ in record.turns]


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every record is usable, 1 when not, 2 when nothing was read."""
    args = _parse_args(argv)
    try:
        tokenizer = _load_tokenizer(args.tokenizer) if args.tokenizer else None
        source = find_dataset_file(args.data)
        records, bad = read_records(
            source,
            needs_units={None: None, 1: False, 2: True}[args.stage],
            unit_vocab_size=args.unit_vocab_size,
        )
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    num_records = len(records) + len(bad)
    bad += scan_records(
        records,
        tokenizer=tokenizer,
        max_length=args.model_max_length,
        ds_rate=args.speech_encoder_ds_rate,
        unit_vocab_size=args.unit_vocab_size,
        ctc_upsample_factor=args.ctc_upsample_factor,
        stage=args.stage,
        decode=not args.headers_only,
        pad_audio_to_30s=args.pad_audio_to_30s,
    )
    errors = [entry for entry in bad if not (entry.is_warning and args.allow_stretch)]
    for entry in sorted(bad, key=lambda entry: entry.line):
        label = "" if entry in errors else "warning: "
        sys.stdout.write(f"{entry.source}:{entry.line}: {label}{entry.reason}\n")
    num_bad = len({entry.line for entry in errors})
    sys.stdout.write(f"{source}: {num_records} records, {num_bad} bad\n")
    for note in _left_out(records, args):
        sys.stdout.write(f"not checked: {note}\n")
    return 1 if errors else 0


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llama_omni.data_utils")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="list every bad record of a dataset by line number")
    check.add_argument("data", type=Path, metavar="DATA", help="a .jsonl or .json file, or folder")
    check.add_argument("--stage", type=int, choices=(1, 2), help="what is needed; default: either")
    check.add_argument("--tokenizer", help="the model's folder or hub id, to count its tokens")
    check.add_argument("--unit_vocab_size", type=int, default=1000)
    check.add_argument("--model_max_length", type=int, default=MAX_LENGTH)
    check.add_argument("--speech_encoder_ds_rate", type=int, default=5)
    check.add_argument("--ctc_upsample_factor", type=int, default=25)
    check.add_argument("--pad_audio_to_30s", action="store_true", help="300 tokens a question")
    check.add_argument("--headers_only", action="store_true", help="do not decode the audio")
    check.add_argument(
        "--allow_stretch",
        action="store_true",
        help="only warn of CTC-infeasible answers that training stretches the frames of",
    )
    return parser.parse_args(argv)


def _load_tokenizer(spec: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"--tokenizer {spec}: no tokenizer there ({error})") from error


def _left_out(records: Sequence[Record], args: argparse.Namespace) -> Iterator[str]:
    if not args.tokenizer:
        yield "length in tokens, and CTC feasibility by a bound only; give --tokenizer FOLDER"
    if args.headers_only:
        yield "whether the audio decodes; leave out --headers_only"
    unextracted = sum(turn.tgt_units is None for record in records for turn in record.turns)
    if args.stage != 1 and unextracted:
        yield f"CTC feasibility of {unextracted} answers whose units are not extracted yet"
