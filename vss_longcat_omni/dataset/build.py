"""Builds the data sets of a run from its options: finds samples and a codec, and prepares all.

train_ds.py calls it first of all. It follows folders.py, prepare.py and examples.py; collator.py
makes micro-batches of what comes out.
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from vss_longcat_omni.dataset.examples import VssDataset
from vss_longcat_omni.dataset.folders import find_samples, find_split
from vss_longcat_omni.dataset.prepare import Settings, locked, prepare
from vss_longcat_omni.dataset.special_tokens import read_special_tokens
from vss_longcat_omni.media.pixels import PixelConfig
from vss_longcat_omni.options.hub import resolve_artifact
from vss_longcat_omni.speech.codec import open_codec
from vss_longcat_omni.speech.fit_codec import fit_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vss_longcat_omni.dataset.conversation import Turn
    from vss_longcat_omni.dataset.folders import Sample
    from vss_longcat_omni.options.run_arguments import RunArguments
    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments


def build_datasets(
    run: RunArguments,
    training: OmniTrainingArguments,
    folder: Path,
    build_conversation: Callable[..., list[Turn]],
    *,
    vision_config: dict[str, Any] | None,
    audio_vocab_size: int,
) -> dict[str, VssDataset]:
    """Return the training set, and the test set where there is one, by the names of the splits.

    Args:
        folder: of the model, with its tokenizer and filter bank.
        build_conversation: preprocess_function of train_ds.py.
        vision_config, audio_vocab_size: of the model's config.

    Raises:
        ValueError: no sample can be used, or the codec has more codes than the model's tables.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = read_special_tokens(tokenizer)
    pixels = PixelConfig.from_dict(vision_config or {}, source=f"{folder}/vision/config.json")
    pixels = dataclasses.replace(pixels, max_vision_length=run.max_vision_tokens)
    data_dir, cache_dir = Path(run.data_dir), Path(run.cache_dir)
    samples = {"training": find_samples(data_dir)}
    if has_split(data_dir, "test"):
        samples["test"] = find_samples(data_dir, "test")
    settings = Settings(
        pixels=pixels,
        model_folder=folder,
        frame_sampling=run.frame_sampling,  # pyright: ignore[reportArgumentType]
        use_audio_track=run.use_audio_track,
    )
    codec = open_codec(str(find_codec(run, samples["training"])), device=training.device)
    largest = max(codec.codebook_sizes) + tokens.codec.offset
    if largest > audio_vocab_size:
        raise ValueError(
            f"codec: its codes go up to {largest:,}, but the model's audio tables have "
            f"audio_vocab_size={audio_vocab_size:,} rows. Take a codec with smaller codebooks."
        )
    build_conversation = partial(build_conversation, system_prompt=run.system_prompt)
    num_workers = max(1, len(os.sched_getaffinity(0)))
    return {
        split: VssDataset(
            prepare(found, settings, codec, cache_dir, num_workers=num_workers),
            build_conversation,
            tokenizer,
            tokens=tokens,
            pixels=pixels,
            use_transcripts=run.transcripts == "file",
            show_progress=training.should_log,
        )
        for split, found in samples.items()
    }


def has_split(data_dir: Path, split: str) -> bool:
    try:
        find_split(data_dir, split)
    except ValueError:
        return False
    return True


def find_codec(run: RunArguments, samples: Sequence[Sample]) -> Path:
    """Return the folder of the codec asked for, else of the embedded one, which is fitted to these
    answers where it is not yet."""
    if run.codec is not None:
        return resolve_artifact(run.codec, field="codec")
    cache_dir = Path(run.cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / "codec"
    with locked(cache_dir / "codec.lock"):
        if not folder.is_dir():
            fit_codec([sample.output_audio for sample in samples], folder)
    return folder
