"""Transcribes answers that have no output.txt by a recognizer.

    python -m vss_longcat_omni.tools.transcribe data --asr whisper:openai/whisper-large-v3-turbo

It comes before training, which takes these texts from the cache (--transcripts file). For each
answer's content cache/transcripts holds DIGEST.txt, and DIGEST.json, which names the recognizer and
the sound. A killed run continues where it stopped; texts of another recognizer are written again.
DATA is the folder around training/ and test/, or one of these.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from vss_longcat_omni.dataset.folders import SPLIT_FOLDERS, find_samples
from vss_longcat_omni.dataset.prepare import ContentDigests, locked, naming, transcript_path
from vss_longcat_omni.media.audio import load_audio
from vss_longcat_omni.speech.recognizer import load_recognizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.dataset.folders import Sample
    from vss_longcat_omni.speech.recognizer import Recognizer


@dataclass
class Report:
    num_own: int = 0  # samples with an output.txt
    num_there: int = 0  # transcribed by an earlier run
    num_written: int = 0
    problems: list[str] = field(default_factory=list)  # of samples that have no transcript now


def transcribe(samples: Sequence[Sample], recognizer: Recognizer, cache_dir: Path) -> Report:
    """Transcribe each answer that has no output.txt, once; write nothing where there is no word."""
    report = Report()
    todo = [sample for sample in samples if sample.transcript is None]
    report.num_own = len(samples) - len(todo)
    paths = find_paths(todo, cache_dir)
    for sample, path in tqdm(zip(todo, paths, strict=True), "transcribing", len(todo)):
        if is_written(path, recognizer):
            report.num_there += 1
            continue
        sound = sample.output_audio
        try:
            with naming(sound):
                text = recognizer.transcribe(load_audio(sound))
                if not text.strip():
                    raise ValueError(f"{recognizer.name} finds no word; write {sound.stem}.txt")
        except (ValueError, OSError) as error:
            report.problems.append(str(error))
            continue
        write(path, text.strip() + "\n")  # before its note: what has a note is whole
        note = {"asr": recognizer.name, "sound": str(sound)}
        write(path.with_suffix(".json"), json.dumps(note) + "\n")
        report.num_written += 1
    return report


def find_paths(samples: Sequence[Sample], cache_dir: Path) -> list[Path]:
    """Return the file for each answer's transcript."""
    (cache_dir / "transcripts").mkdir(parents=True, exist_ok=True)
    with locked(cache_dir / "prepare.lock"):
        digests = ContentDigests(cache_dir / "digests.json")
        paths = [transcript_path(digests.of(s.output_audio), cache_dir) for s in samples]
        digests.save()
    return paths


def is_written(path: Path, recognizer: Recognizer) -> bool:
    """Say whether the transcript is there, and this recognizer's."""
    try:
        note = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return path.is_file() and note.get("asr") == recognizer.name


def write(path: Path, text: str) -> None:
    """Write atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def find_all(folder: Path) -> list[Sample]:
    """Return the samples of every split that is there.

    Raises:
        ValueError: there is none.
    """
    found: dict[Path, Sample] = {}  # a folder of neither name is found as either
    errors = []
    for split in SPLIT_FOLDERS:
        try:
            found |= {sample.output_audio: sample for sample in find_samples(folder, split)}
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return list(found.values())


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0 when every sample has a transcript, 1 when not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of samples")
    parser.add_argument("--asr", required=True, help="whisper:FOLDER_OR_HUB_ID, or pocketsphinx")
    parser.add_argument("--cache_dir", type=Path, default=Path("cache"), help="as in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    samples = find_all(options.data)
    if options.asr in ("auto", "none"):
        raise ValueError(f"--asr {options.asr}: name the one that is to write the transcripts")
    recognizer = load_recognizer(options.asr, device=options.device)
    assert recognizer is not None
    report = transcribe(samples, recognizer, options.cache_dir)
    sys.stdout.writelines(f"no transcript: {problem}\n" for problem in report.problems)
    sys.stdout.write(
        f"{options.data}: {len(samples)} samples, {report.num_own} with a text of their own, "
        f"{report.num_there} transcribed before, {report.num_written} now by {recognizer.name}, "
        f"{len(report.problems)} without a transcript\n"
    )
    return 1 if report.problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
