"""Measures a model on a held-out split: its losses, its text, its speech and its pace.

    python -m vss_longcat_omni.evaluate --model_name_or_path DIR --adapter OUT --codec cache/codec \
        --data_dir data --out report [--asr whisper:openai/whisper-large-v3-turbo]

Writes report/NAME.wav and a line of report/results.jsonl for each sample, and report/summary.json,
which it prints; the first answers go to TensorBoard to listen to, beside the true ones. Samples
come from dataset/folders.py by way of dataset/prepare.py's cache, answers from
inference/answerer.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vss_longcat_omni.dataset.folders import find_samples
from vss_longcat_omni.options.hub import resolve_artifact
from vss_longcat_omni.options.run_arguments import SamplingRule, add_max_frames

if TYPE_CHECKING:
    from vss_longcat_omni.dataset.folders import Sample


def check_folders(options: argparse.Namespace) -> list[Sample]:
    """Return the samples; checks for the folders before anything large is imported.

    Raises:
        ValueError, FileNotFoundError: a folder is missing, or not what it should be.
    """
    samples = find_samples(options.data_dir, options.split)[: options.count]
    folder = resolve_artifact(options.model_name_or_path, field="model_name_or_path")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json: not a LongCat-Flash-Omni folder.")
    if options.adapter is not None:
        adapter = resolve_artifact(options.adapter, field="adapter")
        if not (adapter / "adapter_config.json").is_file():
            raise ValueError(f"--adapter {adapter}: no adapter_config.json; give what was saved")
    if not options.codec.is_dir():
        raise FileNotFoundError(
            f"--codec {options.codec}: no such folder; give that of the training (cache/codec "
            "unless it had another)"
        )
    return samples


def run(options: argparse.Namespace) -> dict[str, Any]:
    samples = check_folders(options)
    import torch

    from vss_longcat_omni.dataset.prepare import prepare
    from vss_longcat_omni.inference.answerer import load_answerer
    from vss_longcat_omni.inference.measure import choose_recognizer, evaluate

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    recognizer = choose_recognizer(options.asr, device)
    answerer = load_answerer(
        options.model_name_or_path,
        codec_folder=options.codec,
        adapter=options.adapter,
        device=device,
        system_prompt=options.system_prompt,
        frame_sampling=options.frame_sampling,
        use_audio_track=options.use_audio_track,
        max_vision_tokens=options.max_vision_tokens,
        max_frames=options.max_frames,
        has_text=options.transcripts == "file",
    )
    num_workers = max(1, len(os.sched_getaffinity(0)))
    prepared = prepare(
        samples, answerer.settings, answerer.codec, options.cache_dir, num_workers=num_workers
    )
    common: dict[str, Any] = {"out": options.out, "recognizer": recognizer}
    if not options.tensorboard_dir:
        return evaluate(answerer, prepared, **common)
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(options.tensorboard_dir) as writer:
        return evaluate(answerer, prepared, **common, writer=writer)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="a folder or a hub id")
    parser.add_argument("--adapter", help="what train_ds.py saved; a folder or a hub id")
    parser.add_argument("--codec", type=Path, default=Path("cache/codec"))
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--cache_dir", type=Path, default=Path("cache"))
    parser.add_argument("--count", type=int, help="the first so many samples; default all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--asr",
        default="auto",
        help="whisper:FOLDER_OR_HUB_ID, pocketsphinx, none, or auto (pocketsphinx if installed)",
    )
    parser.add_argument("--system_prompt", default="")
    parser.add_argument("--transcripts", choices=("file", "none"), default="file")
    parser.add_argument(
        "--frame_sampling", choices=get_args(SamplingRule), default="multimodal_interleaved"
    )
    parser.add_argument("--use_audio_track", action="store_true", help="as in the training")
    parser.add_argument("--max_vision_tokens", type=int, default=28672)
    add_max_frames(parser, default=500)
    parser.add_argument(
        "--tensorboard_dir", default="tensorboard_logs/evaluate", help="empty: nothing there"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    options = parser.parse_args(argv)
    if options.count is not None and options.count < 1:
        parser.error("--count: give 1 or more")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    summary = run(options)
    from vss_longcat_omni.inference.metrics import format_table

    sys.stdout.write(format_table(summary))
    sys.stdout.write(f"details in {options.out / 'results.jsonl'}\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
