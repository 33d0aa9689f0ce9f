"""Opens every file of a data set, before training does, and says what is wrong in which folder.

Beside the data flow: folders.py lists the folders, media/audio.py and media/video.py open the
files. Problems are what training cannot use; warnings are what is seldom meant.

    python -m vss_longcat_omni.dataset check data [--split training] [--tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vss_longcat_omni.dataset.folders import (
    COMMAND,
    SPLIT_FOLDERS,
    SampleFolder,
    find_split,
    list_sample_folders,
    read_transcript,
)
from vss_longcat_omni.media.audio import audio_duration, read_mono
from vss_longcat_omni.media.video import probe_video, validate_video

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SAMPLE_RATE = 16000
MIN_SAMPLES = 400  # at 16 kHz: one window of the filter bank, so one audio token
CODEC_HOP = 960  # samples at 16 kHz a codec frame: 16.67 frames a second
MAX_SECONDS = 120.0  # max_audio_duration of the official demo
SILENCE = 1e-3  # of full scale: -60 dB

# Beyond these, files are seldom meant for each other.
MAX_RATIO, MIN_DIFFERENCE = 4.0, 10.0  # of the question's and the video's length; seconds
CHARACTERS_A_SECOND = (0.5, 40.0)  # of the transcript; English speech has about 15


@dataclass
class Report:
    """Holds what was found in one folder; lengths in seconds, 0 where a file cannot be used."""

    path: Path
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    video_seconds: float = 0.0
    input_seconds: float = 0.0
    output_seconds: float = 0.0
    transcript: str | None = None


def check_folder(
    folder: SampleFolder, *, decode: bool = True, max_seconds: float = MAX_SECONDS
) -> Report:
    """Open the files of one folder; `decode` reads all of them, rather than headers and indexes.

    Problems: a file is missing, unreadable or of zero length; no video track; speech beyond
    `max_seconds`, a question too short for a token, a silent answer; a transcript that is empty or
    not UTF-8. `check_transcripts` reports a transcript that is too long.
    """
    report = Report(folder.path, notices=[folder.notice] if folder.notice else [])
    sample = folder.sample
    if sample is None:
        report.problems.append(folder.problem)
        return report

    def read(what: Callable[..., Any], path: Path, default: Any) -> Any:
        try:
            return what(path)
        except (ValueError, OSError) as error:
            report.problems.append(str(error).removeprefix(f"{path.parent}{os.sep}"))
            return default

    probe = validate_video if decode else probe_video
    report.video_seconds = read(lambda path: probe(path).duration, sample.video, 0.0)
    measure = functools.partial(_measure, decode=decode)
    report.input_seconds, is_silent = read(measure, sample.input_audio, (0.0, False))
    if is_silent:
        report.warnings.append(f"{sample.input_audio.name}: silent")
    report.output_seconds, is_silent = read(measure, sample.output_audio, (0.0, False))
    if is_silent:
        report.problems.append(f"{sample.output_audio.name}: silent, nothing to learn")
    if sample.transcript is not None:
        report.transcript = read(read_transcript, sample.transcript, None)
    _check_lengths(report, sample.input_audio.name, sample.output_audio.name, max_seconds)
    return report


def check_transcripts(reports: Sequence[Report], tokenizer: Any = None) -> None:
    """Add to `problems` where an answer's text does not fit beside its sound.

    N codec frames take N + 1 stream frames, of which the text takes one a token and one for its end
    (research: official `data/converters/audio_converter.py`). Without a tokenizer a text counts
    one token a word, which no tokenizer goes below, so what is reported is certain.
    """
    count_tokens = _token_counter(tokenizer)
    for report in reports:
        if not (report.transcript and report.output_seconds):
            continue
        try:
            num_tokens = count_tokens(report.transcript)
        except ValueError as error:
            report.problems.append(f"transcript: {error}")
            continue
        frames = math.ceil(report.output_seconds * SAMPLE_RATE / CODEC_HOP)
        if num_tokens > frames:
            least = "" if tokenizer else "at least "
            report.problems.append(
                f"transcript: too long: {least}{num_tokens} tokens and their end for "
                f"{frames + 1} stream frames ({report.output_seconds:.2f} s of speech)"
            )


def check_split(
    place: Path,
    *,
    tokenizer: Any = None,
    decode: bool = True,
    max_seconds: float = MAX_SECONDS,
    workers: int = 1,
    show_progress: bool = True,
) -> list[Report]:
    """Return a report on each folder of a split, in order. workers > 1 starts processes (spawned,
    so a script that calls this needs its `if __name__ == "__main__"` guard)."""
    folders = list_sample_folders(place)
    check = functools.partial(check_folder, decode=decode, max_seconds=max_seconds)
    workers = min(workers, len(folders))
    reports = []
    with tqdm(total=len(folders), desc=str(place), unit="sample", disable=not show_progress) as bar:
        for report in _map(check, folders, workers):
            reports.append(report)
            bar.update()
    check_transcripts(reports, tokenizer)
    return reports


def _map(
    check: Callable[[SampleFolder], Report], folders: list[SampleFolder], workers: int
) -> Iterator[Report]:
    if workers <= 1:
        yield from map(check, folders)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(check, folders, chunksize=4)


def _measure(path: Path, *, decode: bool) -> tuple[float, bool]:
    """Return (seconds, whether it is silent, which headers do not say); raises as `load_audio`."""
    seconds = audio_duration(path)
    if seconds == 0:
        raise ValueError(f"{path}: zero-length audio")
    if not decode:
        return seconds, False
    waveform, rate = read_mono(path)
    decoded = len(waveform) / rate
    if decoded < 0.99 * seconds:  # a header promises what a broken download lacks
        raise ValueError(f"{path}: cut off after {decoded:.1f} of {seconds:.1f} s")
    return decoded, bool(waveform.abs().max() < SILENCE)


def _check_lengths(report: Report, question: str, answer: str, max_seconds: float) -> None:
    video, asked, answered = report.video_seconds, report.input_seconds, report.output_seconds
    for name, seconds in ((question, asked), (answer, answered)):
        if seconds > max_seconds:
            report.problems.append(f"{name}: too long: {seconds:.1f} s, over {max_seconds:g} s")
    if 0 < asked * SAMPLE_RATE < MIN_SAMPLES:
        report.problems.append(f"{question}: too short: {asked:.3f} s, under one token (0.025 s)")
    if video and asked > max(MAX_RATIO * video, video + MIN_DIFFERENCE):
        report.warnings.append(f"{question} lasts {asked:.1f} s, the video {video:.1f} s")
    if report.transcript and answered:
        pace = len(report.transcript) / answered
        if not CHARACTERS_A_SECOND[0] <= pace <= CHARACTERS_A_SECOND[1]:
            report.warnings.append(
                f"transcript: {pace:.1f} characters a second of {answer}: is it what is said there?"
            )


def _token_counter(tokenizer: Any) -> Callable[[str], int]:
    """Return what counts a text's tokens; a tokenizer without special tokens raises ValueError."""
    if tokenizer is None:
        return lambda text: len(text.split())
    from vss_longcat_omni.dataset.special_tokens import read_special_tokens
    from vss_longcat_omni.dataset.template import encode_text

    tokens = read_special_tokens(tokenizer)
    return lambda text: len(encode_text(text, tokenizer, tokens=tokens))


def main(argv: list[str] | None = None) -> int:
    """Run `check`; return 0 when every sample is usable, 1 when not, 2 when nothing was found."""
    args = _parse_args(argv)
    try:
        tokenizer = _load_tokenizer(args.tokenizer) if args.tokenizer else None
        places = _find_places(args.data, args.split)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    num_bad = 0
    for place in places:
        reports = check_split(
            place,
            tokenizer=tokenizer,
            decode=not args.headers_only,
            max_seconds=args.max_seconds,
            workers=args.workers,
        )
        num_bad += sum(bool(report.problems) for report in reports)
        sys.stdout.writelines(f"{line}\n" for line in [*_lines(reports), _sum_up(place, reports)])
    if not args.tokenizer:
        sys.stdout.write("not checked: transcripts in tokens, only in words; give --tokenizer\n")
    if args.headers_only:
        sys.stdout.write("not checked: whether all decodes, silence; leave out --headers_only\n")
    return 1 if num_bad else 0


def _parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND.rpartition(" ")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="list every bad sample with what is wrong")
    add = check.add_argument
    add(
        "data",
        type=Path,
        metavar="DIR",
        help="the folder with training/ and test/, or one of these",
    )
    add("--split", choices=tuple(SPLIT_FOLDERS), help="default: all that are there")
    add("--tokenizer", help="the model's folder or hub id, to count the transcripts' tokens")
    add("--max_seconds", type=float, default=MAX_SECONDS, help="of speech; default 120")
    add("--headers_only", action="store_true", help="do not decode sound and pictures")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    return parser.parse_args(argv)


def _load_tokenizer(spec: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"--tokenizer {spec}: no tokenizer there ({error})") from error
    _token_counter(tokenizer)  # raises now where it cannot be used
    return tokenizer


def _find_places(folder: Path, split: str | None) -> list[Path]:
    """Return the folder of the split, or of every split that is there."""
    if split is not None:
        return [find_split(folder, split)]
    places, errors = [], []
    for name in SPLIT_FOLDERS:
        try:
            places.append(find_split(folder, name))
        except ValueError as error:
            errors.append(error)
    if not places:
        raise errors[0]
    return list(dict.fromkeys(places))  # samples without a split's folder around them are of both


def _lines(reports: Sequence[Report]) -> Iterator[str]:
    for report in reports:
        for label, texts in (
            ("", report.problems),
            ("warning: ", report.warnings),
            ("notice: ", report.notices),
        ):
            if texts:
                yield f"{report.path}: {label}{'; '.join(texts)}"


def _sum_up(place: Path, reports: Sequence[Report]) -> str:
    num_bad = sum(bool(report.problems) for report in reports)
    num_warned = sum(bool(report.warnings) for report in reports)
    num_transcripts = sum(report.transcript is not None for report in reports)
    hours = [
        sum(seconds) / 3600
        for seconds in zip(
            *((r.video_seconds, r.input_seconds, r.output_seconds) for r in reports), strict=True
        )
    ]
    return (
        f"{place}: {len(reports)} samples, {num_bad} bad, {num_warned} with warnings, "
        f"{num_transcripts} with a transcript; {hours[0]:.2f} h of video, {hours[1]:.2f} h of "
        f"input and {hours[2]:.2f} h of output speech"
    )
