"""Make a spoken question-and-answer dataset with espeak-ng, in each format that llama_omni reads.

questions.py (what is asked) -> espeak.py (how it sounds) -> speech_formats.py (OUT/*.json). All
is a function of the arguments: the same seed gives the same bytes, whatever the number of workers.

    python -m data.make_speech OUT --count 2000 --seed 0 --format all --workers 4
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import multiprocessing
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from tqdm import tqdm

from data import espeak
from data.questions import Pair, list_categories, order_pairs, select_pairs
from data.speech_formats import FILE_NAMES, Clip, Turn, write_datasets, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

QUESTION_VOICES = (
    "en-us", "en-us+f3", "en-us+m3", "en-us-nyc+f5", "en-us-nyc+m4", "en-gb", "en-gb+f2",
    "en-gb+m7", "en-gb-scotland+f4", "en-gb-scotland+m1", "en-gb-x-rp+m2", "en-029+m5",
)  # fmt: skip
ANSWER_VOICE = "en-us+f1"  # one voice answers, as in the paper, and it asks nothing
ANSWER_PITCH = 50  # the voice's own
AUDIO_SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "mp3": "MPEG_LAYER_III"}
SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # those of mp3


@dataclass(frozen=True)
class SpeechSet:
    """What `make_speech` made: dataset files by format, and counts."""

    files: dict[str, Path]
    num_conversations: int
    num_turns: int
    num_clips: int  # different audio files
    num_made: int  # of these, made by this call; the others were there


@dataclass(frozen=True, kw_only=True)
class Sound:
    """How clips sound and are stored; a bad field raises ValueError that names it."""

    voices: Sequence[str]
    speeds: tuple[int, int]
    pitches: tuple[int, int]
    answer_voice: str
    answer_speed: int
    audio: str
    sample_rate: int

    def __post_init__(self) -> None:
        if not self.voices:
            raise ValueError("voices: give at least one")
        for voice in (*self.voices, self.answer_voice):
            espeak.validate_voice(voice)
        _check_range("speeds", self.speeds, espeak.SPEED_RANGE)
        _check_range("pitches", self.pitches, espeak.PITCH_RANGE)
        _check_range("answer_speed", (self.answer_speed, self.answer_speed), espeak.SPEED_RANGE)
        _check_choice("audio", self.audio, AUDIO_SUBTYPES)
        _check_choice("sample_rate", self.sample_rate, SAMPLE_RATES)

    def conversation(self, pairs: Sequence[Pair], rng: random.Random) -> list[Turn]:
        """The first 1 to len(pairs) pairs, asked by one speaker; `rng` draws how many and who."""
        num_turns = rng.randint(1, len(pairs))
        asker = (rng.choice(self.voices), rng.randint(*self.speeds), rng.randint(*self.pitches))
        answerer = (self.answer_voice, self.answer_speed, ANSWER_PITCH)
        return [
            Turn(
                self._clip("questions", pair.question, *asker),
                self._clip("answers", pair.answer, *answerer),
            )
            for pair in pairs[:num_turns]
        ]

    def _clip(self, folder: str, text: str, voice: str, speed: int, pitch: int) -> Clip:
        key = f"{text}|{voice}|{speed}|{pitch}|{self.sample_rate}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
        path = f"{self.audio}/{folder}/{slug}-{digest}.{self.audio}"
        return Clip(text, voice, speed, pitch, path)


def make_speech(
    out: Path,
    *,
    count: int,
    seed: int = 0,
    distinct: int | None = None,
    categories: Sequence[str] | None = None,
    phrasings: int | None = None,
    voices: Sequence[str] = QUESTION_VOICES,
    speeds: tuple[int, int] = (130, 190),
    pitches: tuple[int, int] = (35, 65),
    answer_voice: str = ANSWER_VOICE,
    answer_speed: int = 160,
    turns: int = 1,
    audio: str = "wav",
    sample_rate: int = espeak.SAMPLE_RATE,
    format: str = "jsonl",
    units: Mapping[str, Sequence[int]] | None = None,
    workers: int = 1,
    show_progress: bool = True,
) -> SpeechSet:
    """Write `count` spoken conversations under `out`; audio that is already there is kept.

    distinct, categories, phrasings: see `questions.select_pairs`. voices, speeds (words a minute)
    and pitches (0 to 99), both inclusive: drawn for each conversation's questions from (seed,
    index). Every answer is spoken by answer_voice at answer_speed. turns: 1 to so many a
    conversation, drawn likewise. audio: wav, mp3 or flac. sample_rate: Hz; espeak-ng's own is
    22050. format: a key of FILE_NAMES, or "all". units: answer units keyed by the answer's
    resolved audio path, for `unit` and `tgt_units`. workers > 1 starts processes (spawned, so a
    script that calls this needs its `if __name__ == "__main__"` guard).

    Raises ValueError for a bad argument, before anything is written.
    """
    sound = Sound(
        voices=voices,
        speeds=speeds,
        pitches=pitches,
        answer_voice=answer_voice,
        answer_speed=answer_speed,
        audio=audio,
        sample_rate=sample_rate,
    )
    _check_choice("format", format, (*FILE_NAMES, "all"))
    for field, value in (("count", count), ("turns", turns), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{field}={value}: must be 1 or more")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write into")
    pairs = select_pairs(seed=seed, distinct=distinct, categories=categories, phrasings=phrasings)
    asked = order_pairs(pairs, count * turns, seed=seed)
    conversations = [
        sound.conversation(
            asked[index * turns : (index + 1) * turns],
            random.Random(f"{seed}/conversation/{index}"),
        )
        for index in range(count)
    ]
    answer_units = _match_units(out, conversations, units)

    clips = {clip.path: clip for talk in conversations for turn in talk for clip in turn}
    missing = [clip for clip in clips.values() if not (out / clip.path).is_file()]
    save = functools.partial(_save_clip, out=out, audio=audio, sample_rate=sample_rate)
    _run(save, missing, workers=workers, show_progress=show_progress)
    return SpeechSet(
        files=write_datasets(out, conversations, answer_units, format=format),
        num_conversations=count,
        num_turns=sum(map(len, conversations)),
        num_clips=len(clips),
        num_made=len(missing),
    )


def _check_choice(field: str, value: object, known: Mapping[Any, Any] | tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{field}={value}: choose from {', '.join(map(str, known))}")


def _check_range(field: str, value: tuple[int, int], limits: tuple[int, int]) -> None:
    if not limits[0] <= value[0] <= value[1] <= limits[1]:
        given = " ".join(map(str, sorted(set(value), key=value.index)))
        raise ValueError(f"{field}={given}: must rise and lie in {limits[0]} to {limits[1]}")


def _match_units(
    out: Path, conversations: list[list[Turn]], units: Mapping[str, Sequence[int]] | None
) -> dict[str, Sequence[int]]:
    """Units of each answer by `Clip.path`; empty when no units are given."""
    if units is None:
        return {}
    paths = {turn.answer.path for turns in conversations for turn in turns}
    by_path = {path: units.get(str((out / path).resolve())) for path in sorted(paths)}
    lacking = [path for path, ids in by_path.items() if not ids]
    if lacking:
        raise ValueError(f"units: none for {len(lacking)} answers, the first is {out / lacking[0]}")
    return {path: ids for path, ids in by_path.items() if ids}


def _run(
    save: Callable[[Clip], None], clips: list[Clip], *, workers: int, show_progress: bool
) -> None:
    """Call `save` on each clip, in this process or in `workers` others."""
    with tqdm(total=len(clips), desc="speech", unit="clip", disable=not show_progress) as bar:
        if workers == 1 or not clips:
            for clip in clips:
                save(clip)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            for _ in pool.map(save, clips, chunksize=16):
                bar.update()


def _save_clip(clip: Clip, *, out: Path, audio: str, sample_rate: int) -> None:
    samples = espeak.synthesize(clip.text, voice=clip.voice, speed=clip.speed, pitch=clip.pitch)
    if sample_rate != espeak.SAMPLE_RATE:
        import soxr

        resampled = np.round(soxr.resample(samples.astype(float), espeak.SAMPLE_RATE, sample_rate))
        samples = np.clip(resampled, -32768, 32767).astype(np.int16)
    encoded = io.BytesIO()
    subtype = AUDIO_SUBTYPES[audio]
    soundfile.write(encoded, samples, sample_rate, format=audio.upper(), subtype=subtype)
    write_file(out / clip.path, encoded.getvalue())


def _build_parser() -> argparse.ArgumentParser:
    """The command line; options that are not given keep `make_speech`'s defaults."""

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    parser = argparse.ArgumentParser(
        prog="python -m data.make_speech",
        description="Make a spoken question-and-answer dataset, the same for the same arguments.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write into")
    add("--count", type=int, required=True, help="number of conversations")
    add("--seed", type=int, help="default 0")
    add("--distinct", type=int, help="use only so many distinct pairs, mixed over the categories")
    add("--categories", type=names, help=f"comma-separated, of {', '.join(list_categories())}")
    add("--phrasings", type=int, help="ways to ask each thing, at most; default all")
    add("--voices", type=names, help=f"comma-separated; default {','.join(QUESTION_VOICES)}")
    add("--speeds", type=int, nargs=2, metavar=("LOW", "HIGH"), help="words a minute; 130 190")
    add("--pitches", type=int, nargs=2, metavar=("LOW", "HIGH"), help="0 to 99; default 35 65")
    add("--answer-voice", help=f"the one voice of all answers; default {ANSWER_VOICE}")
    add("--answer-speed", type=int, help="words a minute; default 160")
    add("--turns", type=int, help="1 to so many turns a conversation; default 1")
    add("--audio", help=f"{', '.join(AUDIO_SUBTYPES)}; default wav")
    add("--sample-rate", type=int, help=f"Hz; default {espeak.SAMPLE_RATE}, espeak-ng's own")
    add("--format", help=f"{', '.join(FILE_NAMES)} or all; default jsonl")
    add("--units", type=Path, help="json file: answer audio path -> list of units")
    add("--workers", type=int, help="processes; default 1")
    return parser


def _read_units(path: Path, out: Path) -> dict[str, list[int]]:
    """Read {answer audio path (relative to `out`, or absolute): [unit, ...]}; resolve the keys."""
    try:
        units = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(units, dict) or not all(
        isinstance(ids, list) and all(type(unit) is int for unit in ids) for ids in units.values()
    ):
        raise ValueError(f"{path}: must be an object of audio path -> list of whole numbers")
    return {str((out / key).resolve()): ids for key, ids in units.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: make the dataset and write one line that sums it up."""
    parser = _build_parser()
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    try:
        if "units" in options:
            options["units"] = _read_units(options["units"], out)
        made = make_speech(out, **options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    names = ", ".join(file.name for file in made.files.values())
    sys.stdout.write(
        f"{out}: {made.num_conversations} conversations, {made.num_turns} turns, {made.num_clips} "
        f"clips ({made.num_made} made, {made.num_clips - made.num_made} already there); {names}\n"
    )


if __name__ == "__main__":
    main()
