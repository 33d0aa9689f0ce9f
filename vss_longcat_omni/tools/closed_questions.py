"""Counts right answers: as text, as speech, and with the video or the question taken away.

    python -m vss_longcat_omni.tools.closed_questions ask --model_name_or_path DIR --codec DIR \
        --data_dir data --out report    # answers the test split; report/answers.jsonl, wavs
    python -m vss_longcat_omni.tools.closed_questions transcribe --codec DIR --data_dir data \
        --out report        # transcribes the wavs with PocketSphinx; report/summary.json

It is for closed questions such as those of data.make_vss, whose right answers are the transcripts
of the split. `ask` needs the GPU, `transcribe` the extra "eval" (pocketsphinx), which may be on
another machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from vss_longcat_omni.dataset.folders import find_samples, read_transcript
from vss_longcat_omni.dataset.prepare import load_fbank, load_inputs
from vss_longcat_omni.inference.answerer import load_answerer
from vss_longcat_omni.media.audio import load_audio, resample, save_audio
from vss_longcat_omni.options.run_arguments import add_max_frames
from vss_longcat_omni.speech.closed_recognizer import load_closed_recognizer
from vss_longcat_omni.speech.codec import open_codec
from vss_longcat_omni.speech.recognizer import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.dataset.folders import Sample

CONDITIONS = ("answer", "answer_without_video", "answer_without_question")


def ask(options: argparse.Namespace) -> None:
    """Ask every question as it is, to a gray video, and in silence; by several processes, since a
    small model leaves most of a GPU idle."""
    options.out.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(ask_part, (options,), nprocs=options.workers)  # pyright: ignore
    parts = [name_part(options.out, part) for part in range(options.workers)]
    lines = sorted(line for part in parts for line in part.read_text().splitlines(keepends=True))
    (options.out / "answers.jsonl").write_text("".join(lines))
    for part in parts:
        part.unlink()


def ask_part(part: int, options: argparse.Namespace) -> None:
    answerer = load_answerer(
        options.model_name_or_path,
        codec_folder=options.codec,
        adapter=options.adapter,
        device=options.device,
        max_frames=options.max_frames,
    )
    samples = list_samples(options)[part :: options.workers]
    with name_part(options.out, part).open("w") as file:
        for sample in tqdm(samples, desc="asking", disable=part > 0):
            media = load_inputs(sample.video, sample.input_audio, answerer.settings)
            gray = torch.full_like(media.frames, 127)
            fbank = load_fbank(answerer.settings.model_folder)
            silence = fbank(torch.zeros_like(load_audio(sample.input_audio)))
            blind = dataclasses.replace(media, frames=gray)
            deaf = dataclasses.replace(media, features=silence)
            answers = [answerer.answer_media(m, sample.video.parent) for m in (media, blind, deaf)]
            texts = {name: a.text for name, a in zip(CONDITIONS, answers, strict=True)}
            wav = options.out / f"{sample.name}.wav"
            codec = answerer.codec
            if len(answers[0].codes):
                save_audio(wav, codec.decode(answers[0].codes), sample_rate=codec.sample_rate)
            line = {"name": sample.name, "expected": read_expected(sample), **texts}
            file.write(json.dumps(line) + "\n")


def name_part(out: Path, part: int) -> Path:
    return out / f"answers-{part}.jsonl"


def transcribe(options: argparse.Namespace) -> None:
    """Write the shares of right answers; speech is transcribed with a grammar of the answers."""
    lines = (options.out / "answers.jsonl").read_text().splitlines()
    answers = {line["name"]: line for line in map(json.loads, lines)}
    samples = list_samples(options)
    recognize = load_closed_recognizer(sorted({read_expected(sample) for sample in samples}))
    codec = open_codec(str(options.codec))
    for sample in tqdm(samples, desc="transcribing"):
        line, wav = answers[sample.name], options.out / f"{sample.name}.wav"
        line["transcribed"] = recognize(load_audio(wav)) if wav.is_file() else ""
        target = codec.decode(codec.encode(load_audio(sample.output_audio)))
        line["target_transcribed"] = recognize(resample(target, codec.sample_rate, SAMPLE_RATE))
    summary = summarize(list(answers.values()))
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, value in summary.items():
        sys.stdout.write(f"{name:30s} {value}\n")


def summarize(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute shares of the questions; `target_transcribed`: true answers through the codec.

    `transcribed_as_answer`: the wav is transcribed as the text beside it, right or not.
    """
    expected = [answer["expected"] for answer in answers]
    kinds = [*CONDITIONS, "transcribed", "target_transcribed"]
    shares = {
        kind: sum(answer[kind] == wanted for answer, wanted in zip(answers, expected, strict=True))
        for kind in kinds
    }
    most = max(expected.count(one) for one in set(expected))
    found = {f"{kind}_right": count / len(answers) for kind, count in shares.items()}
    matching = sum(a["transcribed"] == a["answer"] for a in answers)
    found["transcribed_as_answer"] = matching / len(answers)
    return {"questions": len(answers), **found, "most_frequent_answer": most / len(answers)}


def list_samples(options: argparse.Namespace) -> list[Sample]:
    return find_samples(options.data_dir, options.split)[: options.count]


def read_expected(sample: Sample) -> str:
    if sample.transcript is None:
        raise ValueError(f"{sample.output_audio}: has no transcript, so what is right is unknown")
    return read_transcript(sample.transcript)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", choices=("ask", "transcribe"))
    parser.add_argument("--model_name_or_path", help="a folder or a hub id")
    parser.add_argument("--adapter", help="likewise")
    parser.add_argument("--codec", type=Path, default=Path("cache/codec"))
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, help="the first so many samples; default all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes that ask, each a model")
    add_max_frames(parser, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if options.work == "ask" and options.model_name_or_path is None:
        parser.error("ask needs --model_name_or_path")
    (ask if options.work == "ask" else transcribe)(options)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
