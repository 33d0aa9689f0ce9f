"""Measures a model on held-out questions: text, units, speech and latency.

    python -m llama_omni.evaluate MODEL DATA --output_dir OUT
    python -m llama_omni.evaluate MODEL DATA --output_dir OUT --asr whisper:openai/whisper-large-v3

DATA is a dataset as for training. Writes OUT/results.jsonl (a line a record), OUT/wav/*.wav and
OUT/summary.json, and prints the summary. Earlier turns of a conversation stand in the prompt as
they are in the data; the last question is answered. Numbers of the paper: its section 4.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: see generate.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llama_omni.dataset.check import scan_records
from llama_omni.dataset.records import read_records
from llama_omni.generate import (
    add_model_arguments,
    check_arguments,
    choose_voice,
    device_and_dtype,
    find_kmeans,
    load_omni_model,
    read_omni_config,
)
from llama_omni.inference.answering import (
    CHUNK_SIZE,
    MAX_NEW_TOKENS,
    Answer,
    Omni,
    answer,
    answer_streaming,
    join_parts,
)
from llama_omni.inference.metrics import Result, format_table, summarize
from llama_omni.model.loading import WEIGHTS
from llama_omni.options.hub import resolve_artifact
from llama_omni.speech.audio import load_audio, resample, save_audio
from llama_omni.speech.recognizer import NEEDS_EVAL, SAMPLE_RATE, is_installed, load_recognizer
from llama_omni.speech.utmos import UTMOS_WEIGHTS, load_utmos

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from llama_omni.dataset.record_formats import Turn
    from llama_omni.dataset.records import Record
    from llama_omni.speech.quantizer import Quantizer
    from llama_omni.speech.recognizer import Recognizer
    from llama_omni.speech.vocoder import Voice

logger = logging.getLogger("llama_omni.evaluate")


@dataclass(frozen=True, kw_only=True)
class Evaluators:
    """Holds what an evaluation uses beside the model; each may be absent."""

    voice: Voice | None = None
    quantizer: Quantizer | None = None  # makes expected units of the answers' speech
    recognizer: Recognizer | None = None
    utmos: Callable[[Tensor], float] | None = None


def evaluate(
    omni: Omni,
    records: Sequence[Record],
    *,
    output_dir: Path,
    evaluators: Evaluators,
    chunk_size: int = CHUNK_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    with_silence: bool = False,
) -> dict[str, Any]:
    """Returns the summary of inference/metrics.py; a run that is killed leaves its results.jsonl.

    Answers are streamed where there is a voice, to measure the latency; units and waveform are
    those of whole answers. `with_silence` asks each question again with all samples zero.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    options = {"evaluators": evaluators, "chunk_size": chunk_size}
    if evaluators.voice is not None:  # first use loads kernels, which is no latency of the model
        ask(omni, records[0], **options, max_new_tokens=2)
    results: list[Result] = []
    with (output_dir / "results.jsonl").open("w", encoding="utf-8") as file:
        for record in tqdm(records, desc="answering", unit="record", smoothing=0):
            reply = ask(omni, record, **options, max_new_tokens=max_new_tokens)
            result = score(omni, record, reply, evaluators=evaluators, output_dir=output_dir)
            if with_silence:
                result.answer_to_silence = ask_with_silence(omni, record, max_new_tokens).text
            results.append(result)
            file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
            file.flush()
    summary = summarize(results, evaluators.recognizer)
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (output_dir / "summary.json").write_text(text + "\n", encoding="utf-8")
    return summary


def ask(
    omni: Omni, record: Record, *, evaluators: Evaluators, chunk_size: int, max_new_tokens: int
) -> Answer:
    """Returns the answer to a record's last question."""
    *history, turn = record.turns
    waveform = load_audio(turn.speech_path)
    if evaluators.voice is None:
        return answer(omni, waveform, history=history, max_new_tokens=max_new_tokens)
    parts = answer_streaming(
        omni,
        waveform,
        voice=evaluators.voice,
        history=history,
        chunk_size=chunk_size,
        max_new_tokens=max_new_tokens,
    )
    return join_parts(omni, parts)


def ask_with_silence(omni: Omni, record: Record, max_new_tokens: int) -> Answer:
    """Returns the text answer to a question of the same length with all samples zero."""
    *history, turn = record.turns
    silence = torch.zeros_like(load_audio(turn.speech_path))
    return answer(omni, silence, history=history, max_new_tokens=max_new_tokens)


def score(
    omni: Omni, record: Record, reply: Answer, *, evaluators: Evaluators, output_dir: Path
) -> Result:
    """Counts the errors of one answer; writes its waveform to output_dir/wav."""
    turn = record.turns[-1]
    expected = turn.answer.strip()
    answer_ids, expected_ids = (
        omni.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        for text in (reply.text, expected)
    )
    expected_units = None if reply.units is None else find_units(turn, evaluators.quantizer)
    unit_errors = None
    if expected_units:
        unit_errors = Levenshtein.distance(reply.units or [], expected_units)
    result = Result(
        source=str(record.source),
        line=record.line,
        question_wav=str(turn.speech_path),
        question=turn.question,
        expected=expected,
        answer=reply.text,
        is_finished=reply.is_finished,
        token_errors=Levenshtein.distance(answer_ids, expected_ids),
        num_expected_tokens=len(expected_ids),
        units=reply.units,
        expected_units=expected_units,
        unit_errors=unit_errors,
        first_audio_seconds=reply.first_audio_seconds,
    )
    if evaluators.voice is not None:
        score_speech(result, reply.waveform, evaluators=evaluators, output_dir=output_dir)
    return result


def score_speech(
    result: Result, waveform: Tensor | None, *, evaluators: Evaluators, output_dir: Path
) -> None:
    """Writes the speech, and puts its transcript and UTMOS score in `result`."""
    assert evaluators.voice is not None
    if waveform is None:
        result.recognized = "" if evaluators.recognizer else None  # every word counts as lost
        return
    rate = evaluators.voice.sample_rate
    path = output_dir / "wav" / f"{result.line:06d}.wav"
    save_audio(path, waveform, sample_rate=rate)
    result.wav, result.wav_seconds = str(path), len(waveform) / rate
    waveform = resample(waveform, rate, SAMPLE_RATE)
    if evaluators.recognizer is not None:
        result.recognized = evaluators.recognizer.transcribe(waveform)
    if evaluators.utmos is not None:
        result.utmos = evaluators.utmos(waveform)


def find_units(turn: Turn, quantizer: Quantizer | None) -> list[int] | None:
    """Returns the units that the answer should have: those of its speech where they can be made,
    else the record's own, as in training."""
    path = turn.answer_speech_path
    if quantizer is not None and path is not None and path.is_file():
        return quantizer.extract(load_audio(path))
    return None if turn.tgt_units is None else list(turn.tgt_units)


def read_questions(data: Path, *, unit_vocab_size: int, limit: int | None) -> list[Record]:
    """Returns the usable records of a dataset; the others are named in the log.

    Raises:
        ValueError: no record is usable.
    """
    records, bad = read_records(data, unit_vocab_size=unit_vocab_size)
    bad += scan_records(records, stage=1, show_progress=False)
    for record in bad:
        logger.warning("left out %s", record)
    places = {(record.source, record.line) for record in bad}
    good = [record for record in records if (record.source, record.line) not in places][:limit]
    if not good:
        raise ValueError(f"{data}: no usable record.")
    return good


def choose_evaluators(folder: Path, args: argparse.Namespace, device: torch.device) -> Evaluators:
    """Loads what the arguments name and the installation allows; warns of what is not measured.

    Raises:
        ValueError, FileNotFoundError: something was asked for and cannot be had.
    """
    wants_asr = args.asr not in ("auto", "none")
    if not is_installed("jiwer"):
        if wants_asr:
            raise ValueError(f"--asr {args.asr}: word errors need jiwer; {NEEDS_EVAL}")
        logger.warning("no word error rates: jiwer is missing; %s", NEEDS_EVAL)
    voice = choose_voice(folder, args, device)
    if voice is None and (wants_asr or args.utmos):
        raise ValueError("--asr and --utmos evaluate speech, and there is none; leave them out")
    recognizer = load_recognizer(args.asr, device=device) if voice is not None else None
    if voice is not None and recognizer is None:
        logger.warning("no ASR-WER: pocketsphinx is missing or --asr is none; %s", NEEDS_EVAL)
    return Evaluators(
        voice=voice,
        quantizer=choose_quantizer(folder, args, device),
        recognizer=recognizer,
        utmos=load_utmos(args.utmos, device=device) if args.utmos else None,
    )


def choose_quantizer(
    folder: Path, args: argparse.Namespace, device: torch.device
) -> Quantizer | None:
    """Loads the quantizer of the answers' speech; None, with a warning, where parts are missing."""
    from llama_omni.speech.kmeans import read_kmeans
    from llama_omni.speech.quantizer import load_quantizer

    config, _ = read_omni_config(folder)
    if not getattr(config, "speech_generator_type", None):
        return None
    kmeans = find_kmeans(folder, args)
    hubert = resolve_artifact(args.hubert, field="--hubert") if args.hubert else None
    if kmeans is None or (hubert is None and read_kmeans(kmeans).features != "log_mel"):
        logger.warning(
            "expected units are those in the records alone: give --kmeans and --hubert for others"
        )
        return None
    return load_quantizer(kmeans, hubert_path=hubert, device=device)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="final_model folder or hub id")
    parser.add_argument("data", metavar="DATA", type=Path, help="dataset file or folder")
    parser.add_argument("--limit", type=int, help="the first N records alone")
    parser.add_argument(
        "--asr",
        default="auto",
        help="whisper:FOLDER_OR_HUB_ID, pocketsphinx, none, or auto (pocketsphinx if installed)",
    )
    parser.add_argument(
        "--utmos",
        nargs="?",
        const=UTMOS_WEIGHTS,
        metavar="WEIGHTS",
        help=f"score the speech; WEIGHTS: file or hub id, else {UTMOS_WEIGHTS} (downloaded)",
    )
    parser.add_argument("--hubert", help="mHuBERT folder or .pt, for units of the answers' speech")
    parser.add_argument("--silence", action="store_true", help="also ask with silence, to compare")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args, "limit", "chunk_size", "max_new_tokens")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    device, dtype = device_and_dtype(args.device, args.dtype)
    folder = resolve_artifact(args.model, field="MODEL", allow_patterns=WEIGHTS)
    config, _ = read_omni_config(folder)
    unit_vocab_size = getattr(config, "unit_vocab_size", 1000)
    records = read_questions(args.data, unit_vocab_size=unit_vocab_size, limit=args.limit)
    evaluators = choose_evaluators(folder, args, device)
    omni = load_omni_model(folder, device=device, dtype=dtype)
    with logging_redirect_tqdm():
        return evaluate(
            omni,
            records,
            output_dir=args.output_dir,
            evaluators=evaluators,
            chunk_size=args.chunk_size,
            max_new_tokens=args.max_new_tokens,
            with_silence=args.silence,
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        summary = run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(format_table(summary))
    sys.stdout.write(f"details in {args.output_dir / 'results.jsonl'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
