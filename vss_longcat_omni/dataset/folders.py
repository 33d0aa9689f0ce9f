"""Finds samples in folders on disk: video, question and spoken answer of each; opens no file.

First step of the data flow: data/training/01/{input.mp4, input.wav, output.wav} -> Sample, whose
files media/ reads. check.py opens them all and reports what training could not use:

    python -m vss_longcat_omni.dataset check data [--split training] [--tokenizer FOLDER]
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {"training": ("training", "train"), "test": ("test",)}  # the document's name first
STEMS = (("input", "output"), ("in", "out"))  # of a sample's files; the second are the older ones
AUDIO_SUFFIXES = (".wav", ".mp3")  # the first one found is used
COMMAND = "python -m vss_longcat_omni.dataset check"
MAX_SHOWN = 5  # names or folders in one message


@dataclass(frozen=True)
class Sample:
    """Names the files of one sample; all exist, and none has been opened."""

    name: str  # of its folder, unique in its split
    video: Path
    input_audio: Path
    output_audio: Path
    transcript: Path | None  # what output_audio says; see read_transcript


@dataclass(frozen=True)
class SampleFolder:
    """Describes a folder of a split: its sample, or why it holds none."""

    path: Path
    sample: Sample | None
    problem: str = ""  # with no sample
    notice: str = ""  # of what is there and not used


def find_samples(folder: Path, split: str = "training") -> list[Sample]:
    """Return the complete samples of a split, in natural order of folder names (2 before 10).

    `folder` holds the split's folder (training/, or train/ in the older layout; test/), or is that
    folder itself. A sample's files are input.mp4, input.wav or .mp3, output.wav or .mp3, and
    output.txt where there is a transcript; in the older layout in.mp4, in.wav, out.wav, out.txt.
    Test samples need all of this too. Incomplete folders are left out with a warning.

    Raises ValueError where no complete sample is there: where it looked, and what it found instead.
    """
    place = find_split(folder, split)
    folders = list_sample_folders(place)
    bad = [entry for entry in folders if entry.sample is None]
    examples = "".join(f"\n  {entry.path}: {entry.problem}" for entry in bad[:MAX_SHOWN])
    if len(bad) == len(folders):
        raise ValueError(
            f"No valid samples found in {place}: {len(bad)} folders, none of them complete"
            f"{examples}\n  `{COMMAND} {folder}` lists all"
        )
    if bad:
        logger.warning(
            "%s: %d of %d folders are not complete and left out; `%s %s` lists all%s",
            place, len(bad), len(folders), COMMAND, folder, examples,
        )  # fmt: skip
    if notices := [entry for entry in folders if entry.notice]:
        first = notices[0]
        logger.info("%s: %s (%d folders alike)", first.path, first.notice, len(notices))
    return [entry.sample for entry in folders if entry.sample is not None]


def find_split(folder: Path, split: str = "training") -> Path:
    """Return the folder whose sub-folders are the split's samples.

    Raises ValueError: an unknown split, or no such folder with a sub-folder in it.
    """
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"split={split}: choose from {', '.join(SPLIT_FOLDERS)}")
    folder = Path(folder)
    if not folder.is_dir():
        state = "a file; give the folder around it" if folder.exists() else "not there"
        raise ValueError(f"No valid samples found: {folder} is {state}")
    names = {entry.name for entry in _list(folder)}
    other = {name for key, known in SPLIT_FOLDERS.items() if key != split for name in known}
    places = [folder / name for name in SPLIT_FOLDERS[split]]
    if folder.resolve().name not in other and not names & {*other, *SPLIT_FOLDERS[split]}:
        places.append(folder)  # else its sub-folders are splits, or the other split's samples
    found = [place for place in places if place.is_dir() and _list_folders(place)]
    if not found:
        looked = "".join(f"\n  {place}: {_describe(place)}" for place in places)
        raise ValueError(
            f"No valid samples found for the split {split}. Looked in{looked}\n"
            f"  Instead, {folder} holds {_enumerate(folder)}. Each sample needs a folder of its "
            f"own, such as {places[0] / '01'}/{{input.mp4, input.wav, output.wav}}"
        )
    if len(found) > 1:
        logger.warning("%s is used, and %s is not: join them", *found[:2])
    return found[0]


def list_sample_folders(place: Path) -> list[SampleFolder]:
    """Describe each sub-folder, in natural order of names; hidden ones are none."""
    return [_read_folder(Path(entry.path)) for entry in _list_folders(place)]


def read_transcript(path: Path) -> str:
    """Return what the answer says, as one segment: line breaks count as spaces.

    In the official form each segment has audio codes of its own, between `</pause>` tokens. One
    output.wav does not show where a line's sound ends, so lines cannot be segments.

    Raises ValueError: not UTF-8, or no word in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path}: empty; write what the answer says, or remove the file")
    return " ".join(text.split())


def _read_folder(path: Path) -> SampleFolder:
    names = {entry.name for entry in _list(path) if entry.is_file()}

    def find(stem: str, suffixes: tuple[str, ...]) -> list[str]:
        return [stem + suffix for suffix in suffixes if stem + suffix in names]

    # The layout of which there is more; the document's where both have as much.
    question, answer = max(
        STEMS, key=lambda stems: sum(len(find(stem, (".mp4", *AUDIO_SUFFIXES))) for stem in stems)
    )
    wanted = ((question, (".mp4",)), (question, AUDIO_SUFFIXES), (answer, AUDIO_SUFFIXES))
    found = [find(*want) for want in wanted]
    if not all(found):
        lacking = [want for want, names in zip(wanted, found, strict=True) if not names]
        missing = [" or ".join(stem + end for end in suffixes) for stem, suffixes in lacking]
        used = {name for names in found for name in names}
        return SampleFolder(path, None, f"no {', no '.join(missing)}; {_close_misses(path, used)}")
    video, question_audio, answer_audio = (path / names[0] for names in found)
    transcript = f"{answer}.txt"
    sample = Sample(
        name=path.name,
        video=video,
        input_audio=question_audio,
        output_audio=answer_audio,
        transcript=path / transcript if transcript in names else None,
    )
    twice = [f"{names[0]} is used, {names[1]} is not" for names in found if len(names) > 1]
    return SampleFolder(path, sample, notice="; ".join(twice))


def _close_misses(path: Path, used: set[str]) -> str:
    """Say what the folder holds beside the files that count: the wanted ones, misnamed."""
    others = _enumerate(path, used)
    if others == "nothing":
        return "it holds nothing else" if used else "it is empty"
    return f"it holds {others} instead, and names must be exact"


def _describe(place: Path) -> str:
    if place.is_dir():
        return f"no sub-folder; it holds {_enumerate(place)}"
    return "a file, not a folder" if place.exists() else "not there"


def _enumerate(path: Path, left_out: set[str] | None = None) -> str:
    """List the first names in a folder, sub-folders with a slash."""
    entries = [entry for entry in _list(path) if entry.name not in (left_out or ())]
    shown = [entry.name + "/" * entry.is_dir() for entry in entries[:MAX_SHOWN]]
    more = [f"{len(entries) - MAX_SHOWN} more"] if len(entries) > MAX_SHOWN else []
    return ", ".join(shown + more) or "nothing"


def _list_folders(place: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in _list(place) if entry.is_dir()]


def _list(path: Path) -> list[os.DirEntry[str]]:
    """List entries in natural order, without hidden ones (.DS_Store), as the disk spells them:
    Input.mp4 is not input.mp4, also where opening either gives the same file."""
    with os.scandir(path) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(shown, key=lambda entry: (_natural(entry.name), entry.name))


def _natural(name: str) -> list[str | int]:
    """Split into texts and numbers by turns, so that texts and numbers each meet their own."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]
