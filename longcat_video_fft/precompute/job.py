"""The job of `__main__.py`, in every process: plan, embed captions, encode videos, report."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from longcat_video_fft.dataset.cache import ShardWriter
from longcat_video_fft.dataset.samples import CAPTIONS, SAMPLES
from longcat_video_fft.dataset.sources import open_videos
from longcat_video_fft.model.text_encoder import TextEncoder, load_tokenizer
from longcat_video_fft.model.vae import load_video_encoder
from longcat_video_fft.options.buckets import MAX_TOKENS
from longcat_video_fft.options.hub import check_free_disk, resolve_artifact
from longcat_video_fft.precompute.encoding import (
    Failures,
    VideoStage,
    encode_captions,
)
from longcat_video_fft.precompute.manifest import check_manifest, describe_latents, describe_text
from longcat_video_fft.precompute.state import CacheState, is_complete
from longcat_video_fft.precompute.survey import find_rows, survey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.data_config import DataConfig
    from longcat_video_fft.precompute.processes import Processes

logger = logging.getLogger(__name__)

MODEL_PATTERNS = ("vae/*", "text_encoder/*", "tokenizer/*")
MAX_DECODE_WORKERS = 16
# Latents a second on one H200 at 93 frames of 480x832 (README.md, "Measured").
VIDEOS_PER_S = 1.38


@dataclass(frozen=True)
class Models:
    """The model's folders, one for each part that the caches need."""

    vae: Path
    text_encoder: Path
    tokenizer: Path


def make_caches(
    config: TrainConfig,
    data: DataConfig,
    processes: Processes,
    *,
    is_dry: bool = False,
    retries_failed: bool = False,
) -> None:
    """Makes both caches complete; every process calls it.

    Raises:
        ValueError: a mistake of the user's: storage, model, cache of other settings, disk.
        OSError: the disk fails or is full.
    """
    models = find_models(config)
    holds_lock = processes.is_main and not is_dry
    with lock_cache(data.latent_cache) if holds_lock else contextlib.nullcontext():
        planned = processes.main_first("plan", lambda: plan(config, data, models, retries_failed))
        if is_dry:
            return
        check_shared_folders(data, processes)
        state = planned or CacheState(data, retries_failed=retries_failed)
        embed_captions(state, models, processes)
        encode_videos(state, config, models, processes)
        if processes.is_main:
            CacheState(data).report()


def ensure_caches(config: TrainConfig, data: DataConfig, processes: Processes) -> None:
    """Makes what is missing, when the training begins; every process calls it.

    All do what rank 0 finds, so that none waits for work that others do not see.

    Raises:
        ValueError: as `make_caches`, or the caches were made by another encoder or another rule.
    """

    def look() -> None:
        if is_complete(data):
            check_identity(config, data, find_models(config))
        else:
            logger.info("the caches are not complete: they are made first (phase 1)")
            processes.add("caches incomplete", 1)

    if data.videos.cache_dir_vae.startswith("s3://"):
        return  # made elsewhere and copied there; the data set checks what it reads
    processes.main_first("caches", look)
    if processes.add("caches incomplete", 0):
        make_caches(config, data, processes)


def check_identity(config: TrainConfig, data: DataConfig, models: Models) -> None:
    """Raises ValueError when a cache was made otherwise than this run would make it."""
    latents = describe_latents(models.vae, data.rule, vae_dtype=config.vae_dtype)
    text = describe_text(models.text_encoder, models.tokenizer, max_tokens=MAX_TOKENS)
    check_manifest(data.latent_cache, latents)
    check_manifest(data.text_cache, text)


def find_models(config: TrainConfig) -> Models:
    """Raises ValueError or FileNotFoundError when the model or one of its parts is not there."""
    root = resolve_artifact(
        config.model, field="pretrained_model_name_or_path", allow_patterns=MODEL_PATTERNS
    )
    models = Models(root / "vae", root / "text_encoder", root / "tokenizer")
    for folder in (models.vae, models.text_encoder, models.tokenizer):
        if not folder.is_dir():
            raise ValueError(
                f"pretrained_model_name_or_path={config.model}: {root} has no {folder.name}/. It "
                "must be laid out as the released LongCat-Video: vae/, text_encoder/, tokenizer/."
            )
    return models


@contextlib.contextmanager
def lock_cache(folder: Path) -> Iterator[None]:
    """Holds a lock until this process ends, however it ends; two jobs would do the same work twice.

    Raises:
        ValueError: another job holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another precompute is at work there; wait for it."
            ) from None
        yield


def plan(config: TrainConfig, data: DataConfig, models: Models, retries_failed: bool) -> CacheState:
    """Does rank 0's part: looks at storage, caches and disk, and reports what will be done.

    Raises:
        ValueError: as `make_caches`.
    """
    logger.info("hashing %s", models.vae.parent)
    check_identity(config, data, models)
    tokenizer = load_tokenizer(models.tokenizer)
    found = survey(find_rows(data, open_videos(data)), data, tokenizer)
    dim = json.loads((models.text_encoder / "config.json").read_text("utf-8"))["d_model"]
    for line in found.lines(dim):
        logger.info("%s", line)
    state = CacheState(data, retries_failed=retries_failed)
    missing = state.missing
    check_free_disk(
        data.latent_cache,
        missing.num_bytes(dim),
        what=f"{data.source}: caches of {missing.videos:,} more videos",
        remedy="Free some space, or give cache_dir_vae and cache_dir on a larger disk.",
    )
    logger.info(
        "to make: %s of %s videos, %s of %s captions, %.2f GB; about %.1f h on one H200 for the "
        "videos, divided by the number of GPUs",
        f"{missing.videos:,}", f"{found.num_samples:,}", f"{missing.captions:,}",
        f"{found.num_captions:,}", missing.num_bytes(dim) / 1e9,
        missing.videos / VIDEOS_PER_S / 3600,
    )  # fmt: skip
    return state


def check_shared_folders(data: DataConfig, processes: Processes) -> None:
    """Raises ValueError on a node that does not see what rank 0 wrote."""
    for path in (data.latent_cache / SAMPLES, data.text_cache / CAPTIONS):
        if not path.is_file():
            raise ValueError(
                f"{path}: rank 0 wrote it and rank {processes.rank} on {os.uname().nodename} does "
                "not see it. cache_dir_vae and cache_dir must be on a disk that all nodes share."
            )


def embed_captions(state: CacheState, models: Models, processes: Processes) -> None:
    """Runs the first stage; the encoder is loaded only where there is work, and dropped after."""
    options, folder = state.data.text, state.data.text_cache
    size, captions = options.text_encoder_batch_size, state.captions
    batches = [captions[start : start + size] for start in range(0, len(captions), size)]
    mine = [
        batch
        for batch in batches[processes.rank :: processes.world_size]
        if any(state.text.find(name) is None for name, *_ in batch)
    ]
    bar = open_bar("captions", processes, state.missing.captions)

    def show(made: int = 0) -> None:
        bar.update(processes.add("captions", made) - bar.n)

    with bar:
        if mine:
            tokenizer = load_tokenizer(models.tokenizer)
            encoder = TextEncoder(models.text_encoder, tokenizer, processes.device)
            writer = ShardWriter(folder, processes.rank)
            encode_captions(
                mine, encoder, writer, state.text,
                write_batch_size=options.write_batch_size, on_done=show,
            )  # fmt: skip
            writer.close()
            del encoder
            release_memory()
        processes.wait_for_all("captions done", "captions", show)


def encode_videos(
    state: CacheState, config: TrainConfig, models: Models, processes: Processes
) -> None:
    """Runs the second stage."""
    data = state.data
    mine = state.samples[processes.rank :: processes.world_size]
    jobs = [job for job in mine if state.needs_video(job[0], job[1])]
    bar = open_bar("videos", processes, state.missing.videos)
    show = progress(bar, processes)
    with bar:
        if jobs:
            dtype = torch.bfloat16 if config.vae_dtype == "bf16" else torch.float32
            cores = (os.cpu_count() or 1) // processes.num_local
            writer = ShardWriter(data.latent_cache, processes.rank)
            stage = VideoStage(
                open_videos(data),
                data.rule,
                load_video_encoder(
                    models.vae, processes.device, dtype=dtype, chunk_frames=config.vae_chunk_frames
                ),
                writer,
                Failures(data.latent_cache, processes.rank),
                workers=config.decode_workers or max(1, min(MAX_DECODE_WORKERS, cores)),
                compiles=config.vae_compile and processes.device.type == "cuda",
                on_done=show,
            )
            started = time.perf_counter()
            stage.run(jobs)
            writer.close()
            report_time(stage, len(jobs), time.perf_counter() - started)
        processes.wait_for_all("videos done", "videos", show)


def open_bar(unit: str, processes: Processes, total: int) -> tqdm[Any]:
    """Opens the whole job's progress bar, which rank 0 shows where there is anything to do."""
    is_shown = processes.is_main and total > 0
    return tqdm(desc=unit, unit=unit.removesuffix("s"), total=total, disable=not is_shown)


def progress(bar: tqdm[Any], processes: Processes) -> Callable[..., None]:
    """Returns what the stage calls after each video; rank 0 shows the whole job's numbers."""

    def show(made: int = 0, failed: int = 0, num_bytes: int = 0) -> None:
        done = processes.add("videos", made + failed)
        num_failed = processes.add("failed", failed)
        total_bytes = processes.add("bytes", num_bytes)
        if not bar.disable:
            bar.set_postfix_str(f"{total_bytes / 1e9:.2f} GB, {num_failed} failed", refresh=False)
            bar.update(done - bar.n)

    return show


def report_time(stage: VideoStage, num_videos: int, seconds: float) -> None:
    """Logs where this process's time went."""
    parts = [f"{name} {spent:.1f} s" for name, spent in sorted(stage.seconds.items(), reverse=True)]
    logger.info(
        "this process: %d videos in %.1f s, %.2f a second (%s; %d workers)",
        num_videos, seconds, num_videos / seconds, ", ".join(parts), stage.workers,
    )  # fmt: skip


def release_memory() -> None:
    """Gives a GPU's memory back for the next stage."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
