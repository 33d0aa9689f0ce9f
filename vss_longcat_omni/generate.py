"""Answers a spoken question about a video: text and a wav.

    python -m vss_longcat_omni.generate --model_name_or_path DIR --adapter OUT \
        --video input.mp4 --audio input.wav --out answer.wav
    python -m vss_longcat_omni.generate ... --data_dir data --split test --out answers/

The model has to fit on one device: a small one, or a GPU of the size. The released 560B is served
from the merged folder (tools/merge_lora.py) by Meituan's own server.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from vss_longcat_omni.dataset.folders import find_samples
from vss_longcat_omni.inference.answerer import load_answerer
from vss_longcat_omni.media.audio import save_audio
from vss_longcat_omni.options.run_arguments import add_max_frames

if TYPE_CHECKING:
    from collections.abc import Iterator


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="a folder or a hub id")
    parser.add_argument("--adapter", help="what train_ds.py saved; a folder or a hub id")
    parser.add_argument("--codec", type=Path, default=Path("cache/codec"))
    parser.add_argument("--video", type=Path)
    parser.add_argument("--audio", type=Path)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, required=True, help="a wav, or a folder for many")
    parser.add_argument("--system_prompt", default="")
    parser.add_argument("--transcripts", choices=("file", "none"), default="file")
    parser.add_argument("--use_audio_track", action="store_true", help="as in the training")
    add_max_frames(parser, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    if (options.data_dir is None) == (options.video is None or options.audio is None):
        parser.error("give --video and --audio, or --data_dir")
    answerer = load_answerer(
        options.model_name_or_path,
        codec_folder=options.codec,
        adapter=options.adapter,
        device=options.device,
        system_prompt=options.system_prompt,
        use_audio_track=options.use_audio_track,
        max_frames=options.max_frames,
        has_text=options.transcripts == "file",
    )
    for video, audio, out in list_questions(options):
        answer = answerer.answer(video, audio)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_audio(out, answerer.codec.decode(answer.codes), sample_rate=answerer.codec.sample_rate)
        out.with_suffix(".txt").write_text(answer.text + "\n")
        sys.stdout.write(f"{out}: {answer.text}\n")


def list_questions(options: argparse.Namespace) -> Iterator[tuple[Path, Path, Path]]:
    """Yield (video, question, wav to write) for each."""
    if options.data_dir is None:
        yield options.video, options.audio, options.out
        return
    for sample in tqdm(find_samples(options.data_dir, options.split), desc="answering"):
        yield sample.video, sample.input_audio, options.out / f"{sample.name}.wav"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
