"""Make samples for vss_longcat_omni: a shape moves, a voice asks what of it, another one answers.

shapes.py (what is shown) and espeak.py (how it is said) -> OUT/01/{input.mp4, input.wav,
output.wav, output.txt}, the layout of that folder's source document. The question decides which of
three attributes is right, so neither the video nor the speech alone gives the answer. All is a
function of the arguments: the same ones give the same bytes, whatever the number of workers.

    python -m data.make_vss OUT --count 600 --seed 0 --split train --workers 2
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
from tqdm import tqdm

from data import espeak, make_videos
from data.make_videos import encode_video
from data.shapes import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    Combination,
    list_combinations,
    render_scene,
    scene_of,
)
from data.speech_formats import write_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from data.shapes import Scene

FACTS_NAME = ".facts.json"  # hidden: for an evaluator, not for the trainer
FILE_NAMES = ("input.mp4", "input.wav", "output.wav", "output.txt")
SPLITS = {"train": "train", "test": "held_out"}  # ours: that of `shapes.list_combinations`
QUESTIONS = {  # the attribute of Combination that is asked for: wordings
    "color": (
        "What color is it?",
        "Which color do you see?",
        "Tell me the color.",
        "What color does it have?",
        "Can you name the color?",
    ),
    "shape": (
        "What shape is it?",
        "Which shape do you see?",
        "Tell me the shape.",
        "What shape does it have?",
        "Can you name the shape?",
    ),
    "direction": (
        "Which way does it move?",
        "Which way is it going?",
        "Tell me the direction.",
        "In what direction does it move?",
        "Can you say where it goes?",
    ),
}
ANSWERS = {"color": "it is {}", "shape": "it is a {}", "direction": "it moves {}"}
VALUES = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS)[:4],
}
# Parts of the picture. Shapes are larger than elsewhere and go less far: of few samples, eyes that
# begin with nothing learn colors and directions in any size, shapes only over several patches.
RADII, TRAVELS = (0.20, 0.27), (0.32, 0.42)
VOICES = {  # who asks; the test's variants, and two of its accents, are in no other voice
    "train": (
        "en-us", "en-us+f3", "en-us+m2", "en-us+m3", "en-us+m7", "en-us-nyc+f4", "en-us-nyc+m4",
        "en-gb", "en-gb+f3", "en-gb+f4", "en-gb+m1", "en-gb+m7", "en-gb-scotland+f4",
        "en-gb-scotland+m1", "en-gb-x-rp+f3", "en-gb-x-rp+m2", "en-029+f4", "en-029+m4",
    ),
    "test": (
        "en-us+f5", "en-us+m6", "en-gb+f1", "en-gb+m8", "en-gb-x-gbclan+m5", "en-gb-x-gbcwmd+f5",
    ),
}  # fmt: skip
SPEEDS, PITCHES = (130, 190), (35, 65)  # of who asks: words a minute, 0 to 99
# Who answers. Of 13 voices the only one that PocketSphinx understood at 120, 140 and 160; at 140
# an answer has a codec frame (60 ms) for each of its letters, and four to spare.
ANSWER_VOICE, ANSWER_SPEED, ANSWER_PITCH = "en-us+f2", 140, 50


@dataclass(frozen=True)
class VssSet:
    """What `make_vss` made."""

    folder: Path
    num_samples: int
    num_made: int  # of these, made by this call; the others were there


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a sample's bytes depend on; a bad field raises ValueError that names it."""

    seed: int
    split: str
    width: int
    height: int
    fps: int
    seconds: float

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split}: choose from {', '.join(SPLITS)}")
        _ = self.video  # knows what the others may be

    @property
    def video(self) -> make_videos.Settings:
        return make_videos.Settings(
            seed=self.seed,
            width=self.width,
            height=self.height,
            fps=self.fps,
            seconds=self.seconds,
            split=SPLITS[self.split],
            directions=4,
            crf=18,
            per_folder=1,
        )


@dataclass(frozen=True, kw_only=True)
class Talk:
    """One sample: what is shown, who asks what, and the right answer."""

    scene: Scene
    kind: str  # a key of QUESTIONS
    question: str
    value: str  # the attribute that is asked for
    answer: str  # the sentence that gives it
    voice: str
    speed: int
    pitch: int

    @property
    def facts(self) -> dict[str, str]:
        """Return what an evaluator needs to know."""
        names = ("kind", "question", "value", "answer", "voice")
        shown = {name: getattr(self.scene, name) for name in Combination._fields}
        return {name: getattr(self, name) for name in names} | shown


def talk_of(seed: int, index: int, *, split: str) -> Talk:
    """The sample of an index: a function of the arguments alone.

    The kinds take turns, and in each kind its values do, so that guessing gets 1/8 of the colors,
    1/5 of the shapes and 1/4 of the directions right, in both splits.
    """
    rng = random.Random(f"{seed}/vss/{split}/{index}")
    kind = list(QUESTIONS)[index % len(QUESTIONS)]
    value = VALUES[kind][index // len(QUESTIONS) % len(VALUES[kind])]
    combinations = list_combinations(SPLITS[split])
    chosen = rng.choice([each for each in combinations if getattr(each, kind) == value])
    scene = replace(
        scene_of(seed, index, split=SPLITS[split]),
        **chosen._asdict(),
        radius=rng.uniform(*RADII),
        travel=rng.uniform(*TRAVELS),
    )
    return Talk(
        scene=scene,
        kind=kind,
        question=rng.choice(QUESTIONS[kind]),
        value=value,
        answer=ANSWERS[kind].format(value),
        voice=rng.choice(VOICES[split]),
        speed=rng.randint(*SPEEDS),
        pitch=rng.randint(*PITCHES),
    )


def list_answers() -> tuple[str, ...]:
    """All sentences that are ever answered, for the grammar of a recognizer."""
    return tuple(ANSWERS[kind].format(value) for kind in QUESTIONS for value in VALUES[kind])


def name_folder(index: int) -> str:
    """01, 02, ..., 99, 100: as in the source document, the same for every count."""
    return f"{index + 1:02d}"


def make_vss(
    out: Path,
    *,
    count: int,
    seed: int = 0,
    split: str = "train",
    width: int = 112,
    height: int = 112,
    fps: int = 10,
    seconds: float = 2.0,
    workers: int = 1,
    show_progress: bool = True,
) -> VssSet:
    """Write `count` samples and their facts under `out`; files that are already there are kept.

    split: `test` has combinations of color, shape and direction that `train` lacks, and other
    voices ask. A video has round(seconds * fps) frames. A larger count extends a set. workers > 1
    starts processes (spawned, so a script that calls this needs its `if __name__ == "__main__"`
    guard).

    Raises ValueError for a bad argument, or when `out` has samples made with other arguments,
    before anything is written.
    """
    settings = Settings(
        seed=seed, split=split, width=width, height=height, fps=fps, seconds=float(seconds)
    )
    for field, value in (("count", count), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{field}={value}: must be 1 or more")
    before = _validate_folder(out, settings)
    facts = {name_folder(index): talk_of(seed, index, split=split).facts for index in range(count)}
    content = {"settings": asdict(settings), "samples": before | facts}
    write_file(out / FACTS_NAME, (json.dumps(content, indent=2) + "\n").encode())
    missing = [
        index
        for index in range(count)
        if not all((out / name_folder(index) / name).is_file() for name in FILE_NAMES)
    ]
    _run(out, settings, missing, workers=workers, show_progress=show_progress)
    return VssSet(folder=out, num_samples=count, num_made=len(missing))


def read_facts(folder: Path) -> dict[str, dict[str, str]]:
    """The facts of each sample (see `Talk.facts`) by the name of its folder."""
    return json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))["samples"]


def _validate_folder(out: Path, settings: Settings) -> dict[str, Any]:
    """The facts that are there; names are numbers alone, so other samples could be mixed up."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write into")
    path = out / FACTS_NAME
    if not path.is_file():
        if (out / name_folder(0)).exists():
            raise ValueError(f"{out} has samples but no {FACTS_NAME}; give another folder")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_with, samples = dict(content["settings"]), dict(content["samples"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not valid ({error}); give another folder") from error
    for field, value in asdict(settings).items():
        if made_with.get(field) != value:
            raise ValueError(
                f"{field}={value}: {out} was made with {field}={made_with.get(field)}; "
                "give the same value or another folder"
            )
    return samples


def _run(
    out: Path, settings: Settings, indices: list[int], *, workers: int, show_progress: bool
) -> None:
    """Make these samples, in this process or in `workers` others."""
    save = functools.partial(_save_sample, out=out, settings=settings)
    with tqdm(total=len(indices), desc="samples", unit="sample", disable=not show_progress) as bar:
        if workers == 1 or not indices:
            for index in indices:
                save(index)
                bar.update()
            return
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            for _ in pool.map(save, indices, chunksize=16):
                bar.update()


def _save_sample(index: int, *, out: Path, settings: Settings) -> None:
    talk = talk_of(settings.seed, index, split=settings.split)
    video, question, answer, transcript = (out / name_folder(index) / name for name in FILE_NAMES)
    if not question.is_file():
        write_file(question, _speak(talk.question, talk.voice, talk.speed, talk.pitch))
    if not answer.is_file():
        write_file(answer, _speak_answer(talk.answer))
    if not transcript.is_file():
        write_file(transcript, f"{talk.answer}\n".encode())
    if not video.is_file():
        frames = render_scene(
            talk.scene,
            width=settings.width,
            height=settings.height,
            num_frames=settings.video.num_frames,
        )
        part = video.with_name(video.name + ".part")
        encode_video(part, frames, fps=settings.fps)
        part.replace(video)


@functools.cache
def _speak_answer(text: str) -> bytes:
    """There are few answers, and one voice gives them all: each is spoken once a process."""
    return _speak(text, ANSWER_VOICE, ANSWER_SPEED, ANSWER_PITCH)


def _speak(text: str, voice: str, speed: int, pitch: int) -> bytes:
    samples = espeak.synthesize(text, voice=voice, speed=speed, pitch=pitch)
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, espeak.SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return encoded.getvalue()


def _build_parser() -> argparse.ArgumentParser:
    """The command line; options that are not given keep `make_vss`'s defaults, but workers."""
    parser = argparse.ArgumentParser(
        prog="python -m data.make_vss",
        description="Make videos with spoken questions and answers, all fixed by the arguments.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write into")
    add("--count", type=int, required=True, help="number of samples")
    add("--seed", type=int, help="default 0")
    add("--split", help=f"{' or '.join(SPLITS)}; default train")
    add("--width", type=int, help="pixels, even; default 112")
    add("--height", type=int, help="pixels, even; default 112")
    add("--fps", type=int, help="frames a second; default 10")
    add("--seconds", type=float, help="of video; default 2.0")
    add("--workers", type=int, default=2, help="processes; default 2")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: make the samples and write one line that sums it up."""
    parser = _build_parser()
    options = vars(parser.parse_args(argv))
    out = options.pop("out")
    try:
        made = make_vss(out, **options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    sys.stdout.write(
        f"{out}: {made.num_samples} samples ({made.num_made} made, "
        f"{made.num_samples - made.num_made} already there)\n"
    )


if __name__ == "__main__":
    main()
