"""Phase 1: videos and captions -> caches of latents and embeddings. Run it as often as you like.

    accelerate launch --num_processes=8 -m longcat_video_fft.precompute --config training_config.json
    python -m longcat_video_fft.precompute --config training_config.json --dry_run   # only the plan
    python -m longcat_video_fft.precompute --config training_config.json --verify [--repair]

Any number of processes and nodes; the cache folders must be seen by all. What is there is kept,
what is missing is made, what cannot be made is named. Read next: data_config.py, storage.py,
metadata.py, survey.py, encoding.py, cache.py.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_video_fft.config import TrainConfig, load_config
from longcat_video_fft.data_config import DataConfig, load_data_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from tqdm import tqdm

    from longcat_video_fft.encoding import VideoStage
    from longcat_video_fft.processes import Processes
    from longcat_video_fft.survey import Survey

logger = logging.getLogger("longcat_video_fft")

FLAGS = ("--dry_run", "--verify", "--repair", "--retry_failed")
MODEL_PATTERNS = ("vae/*", "text_encoder/*", "tokenizer/*")
MAX_DECODE_WORKERS = 16
# Latents a second on one H200 at 93 frames of 480x832 (README.md, "Measured").
VIDEOS_PER_S = 1.0
SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Models:
    """Folders of the parts that the caches need."""

    vae: Path
    text_encoder: Path
    tokenizer: Path


@dataclass(frozen=True)
class Missing:
    """What a run has to make, in all processes together."""

    captions: int
    videos: int
    num_bytes: int


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    flags = {word for word in words if word in FLAGS}
    is_main = os.environ.get("RANK", "0") == "0"
    start_logging(is_main=is_main)
    try:
        config, data = read_configs([word for word in words if word not in flags])
        if "--repair" in flags and "--verify" not in flags:
            raise ValueError("the command line: --repair goes with --verify.")
    except ValueError as error:
        if is_main:  # all processes find the same
            sys.stderr.write(f"error: {error}\n")
        return 2
    # Heavy imports wait until the config is known to be sound.
    from tqdm.contrib.logging import logging_redirect_tqdm

    from longcat_video_fft.processes import Processes

    try:
        with logging_redirect_tqdm():
            if "--verify" in flags:
                return verify(data, repairs="--repair" in flags)
            precompute(
                config,
                data,
                Processes(),
                is_dry="--dry_run" in flags,
                retries_failed="--retry_failed" in flags,
            )
    except (ValueError, OSError, RuntimeError) as error:
        logger.debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def start_logging(*, is_main: bool) -> None:
    """The main process reports; the others speak up only when something is wrong."""
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    for library in ("httpx", "httpx2", "botocore"):  # a line a request
        logging.getLogger(library).setLevel(logging.WARNING)
    # The tokenizer tells of captions that are too long; the survey counts them.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)


def read_configs(words: list[str]) -> tuple[TrainConfig, DataConfig]:
    """Raises ValueError for whatever is wrong in the two files or on the command line."""
    config = load_config(words)
    data = load_data_config(config.folder / Path(str(config.data_backend_config)).expanduser())
    for name in (data.videos.cache_dir_vae, data.text.cache_dir):
        if name.startswith("s3://"):
            raise ValueError(
                f"{data.source}: {name}: a cache is made in a folder and can be read from S3. Make "
                "it on a disk, copy it there (aws s3 sync), and then give this address."
            )
    return config, data


def precompute(
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
    from longcat_video_fft.cache import open_folder
    from longcat_video_fft.encoding import read_failures

    models = find_models(config)
    lock = lock_cache(data.latent_cache) if processes.is_main and not is_dry else None
    missing = processes.main_first("plan", lambda: plan(config, data, models, retries_failed))
    if is_dry:
        return
    check_shared_folders(data, processes)
    failed = {} if retries_failed else permanent(read_failures(data.latent_cache))
    caches = open_folder(data.latent_cache), open_folder(data.text_cache)
    embed_captions(data, models, processes, caches[1], missing)
    encode_videos(config, data, models, processes, caches[0], failed, missing)
    if processes.is_main:
        report_result(data)
    if lock is not None:
        os.close(lock)


def find_models(config: TrainConfig) -> Models:
    """Raises ValueError or FileNotFoundError when the model or one of its parts is not there."""
    from longcat_video_fft.artifacts import resolve_artifact

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


def lock_cache(folder: Path) -> int:
    """Held until this process ends, however it ends; two jobs would do the same work twice."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"{folder}: another precompute is at work there; wait for it.") from None
    return descriptor


def plan(
    config: TrainConfig, data: DataConfig, models: Models, retries_failed: bool
) -> tuple[Survey, Missing]:
    """Rank 0's part: looks at storage, caches and disk, and says what will be done."""
    import json

    from longcat_video_fft.cache import open_folder
    from longcat_video_fft.encoding import read_failures
    from longcat_video_fft.manifest import check_manifest, describe_latents, describe_text
    from longcat_video_fft.sources import open_videos
    from longcat_video_fft.survey import find_rows, survey
    from longcat_video_fft.text_encoder import MAX_TOKENS, load_tokenizer

    logger.info("hashing %s", models.vae.parent)
    latents = describe_latents(models.vae, data.rule, vae_dtype=config.vae_dtype)
    text = describe_text(models.text_encoder, models.tokenizer, max_tokens=MAX_TOKENS)
    check_manifest(data.latent_cache, latents)
    check_manifest(data.text_cache, text)
    tokenizer = load_tokenizer(models.tokenizer)
    found = survey(find_rows(data, open_videos(data)), data, tokenizer)
    dim = json.loads((models.text_encoder / "config.json").read_text("utf-8"))["d_model"]
    for line in found.lines(dim):
        logger.info("%s", line)
    failed = {} if retries_failed else permanent(read_failures(data.latent_cache))
    caches = open_folder(data.latent_cache), open_folder(data.text_cache)
    missing = find_missing(data, *caches, failed=failed, embedding_dim=dim)
    check_disk(data, missing)
    logger.info(
        "to make: %s of %s videos, %s of %s captions, %.2f GB; about %.1f h on one H200 for the "
        "videos, divided by the number of GPUs",
        f"{missing.videos:,}", f"{found.num_samples:,}", f"{missing.captions:,}",
        f"{found.num_captions:,}", missing.num_bytes / 1e9, missing.videos / VIDEOS_PER_S / 3600,
    )  # fmt: skip
    return found, missing


def permanent(failures: dict[Any, tuple[str, str]]) -> dict[Any, tuple[str, str]]:
    """Those that another try would not mend."""
    from longcat_video_fft.metadata import RETRIED_ERRORS

    return {key: value for key, value in failures.items() if value[0] not in RETRIED_ERRORS}


def find_missing(
    data: DataConfig, latents: Any, text: Any, *, failed: dict[Any, Any], embedding_dim: int
) -> Missing:
    """What samples.parquet and captions.parquet ask for and the caches lack."""
    import pyarrow.parquet as pq

    from longcat_video_fft.survey import CAPTIONS, read_samples

    jobs = [
        bucket
        for name, size, bucket, _ in read_samples(latents.storage)
        if (name, size) not in failed and latents.find(name, size) is None
    ]
    captions = pq.read_table(data.text_cache / CAPTIONS).to_pydict()
    lengths = [
        length
        for name, length in zip(captions["caption_id"], captions["num_tokens"], strict=True)
        if text.find(name) is None
    ]
    num_bytes = sum(bucket.latent_bytes for bucket in jobs) + 2 * embedding_dim * sum(lengths)
    return Missing(captions=len(lengths), videos=len(jobs), num_bytes=num_bytes)


def is_complete(data: DataConfig) -> bool:
    """Whether the training can start: nothing that the last survey asked for is missing."""
    from longcat_video_fft.cache import open_folder
    from longcat_video_fft.encoding import read_failures
    from longcat_video_fft.survey import CAPTIONS, SAMPLES

    if not ((data.latent_cache / SAMPLES).is_file() and (data.text_cache / CAPTIONS).is_file()):
        return False
    caches = open_folder(data.latent_cache), open_folder(data.text_cache)
    failed = permanent(read_failures(data.latent_cache))
    missing = find_missing(data, *caches, failed=failed, embedding_dim=0)
    return not (missing.videos or missing.captions)


def check_disk(data: DataConfig, missing: Missing) -> None:
    """Raises ValueError when what is missing will not fit."""
    from longcat_video_fft.artifacts import check_free_disk

    check_free_disk(
        data.latent_cache,
        missing.num_bytes,
        what=f"{data.source}: caches of {missing.videos:,} more videos",
        remedy="Free some space, or give cache_dir_vae and cache_dir on a larger disk.",
    )


def check_shared_folders(data: DataConfig, processes: Processes) -> None:
    """Raises ValueError on a node that does not see what rank 0 wrote."""
    from longcat_video_fft.survey import CAPTIONS, SAMPLES

    for path in (data.latent_cache / SAMPLES, data.text_cache / CAPTIONS):
        if not path.is_file():
            raise ValueError(
                f"{path}: rank 0 wrote it and rank {processes.rank} on {os.uname().nodename} does "
                "not see it. cache_dir_vae and cache_dir must be on a disk that all nodes share."
            )


def embed_captions(
    data: DataConfig, models: Models, processes: Processes, cache: Any, planned: Any
) -> None:
    """The first stage; the encoder is loaded only where there is work, and dropped after."""
    from tqdm import tqdm

    from longcat_video_fft.cache import ShardWriter
    from longcat_video_fft.encoding import caption_batches, encode_captions
    from longcat_video_fft.text_encoder import TextEncoder, load_tokenizer

    options = data.text
    batches = list(caption_batches(data.text_cache, options.text_encoder_batch_size))
    mine = [
        batch
        for batch in batches[processes.rank :: processes.world_size]
        if any(cache.find(name) is None for name, _ in batch)
    ]
    total = planned[1].captions if planned else 0
    bar = tqdm(
        total=total, desc="captions", unit="caption", disable=not (processes.is_main and total)
    )

    def show(made: int = 0) -> None:
        bar.update(processes.add("captions", made) - bar.n)

    with bar:
        if mine:
            encoder = TextEncoder(
                models.text_encoder, load_tokenizer(models.tokenizer), processes.device
            )
            writer = ShardWriter(data.text_cache, processes.rank)
            encode_captions(
                mine, encoder, writer, cache,
                write_batch_size=options.write_batch_size, on_done=show,
            )  # fmt: skip
            writer.close()
            del encoder
            release_memory()
        processes.wait_for_all("captions done", "captions", show)


def encode_videos(
    config: TrainConfig,
    data: DataConfig,
    models: Models,
    processes: Processes,
    cache: Any,
    failed: dict[Any, Any],
    planned: Any,
) -> None:
    """The second stage."""
    import torch
    from tqdm import tqdm

    from longcat_video_fft.cache import ShardWriter
    from longcat_video_fft.encoding import Failures, VideoStage
    from longcat_video_fft.sources import open_videos
    from longcat_video_fft.survey import read_samples
    from longcat_video_fft.vae import load_video_encoder

    jobs = [
        job
        for job in read_samples(cache.storage)[processes.rank :: processes.world_size]
        if job[:2] not in failed and cache.find(job[0], job[1]) is None
    ]
    total = planned[1].videos if planned else 0
    bar = tqdm(total=total, desc="videos", unit="video", disable=not (processes.is_main and total))
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


def progress(bar: tqdm[Any], processes: Processes) -> Callable[..., None]:
    """What the stage calls after each video: the whole job's numbers, shown by rank 0."""

    def show(made: int = 0, failed: int = 0, num_bytes: int = 0) -> None:
        done = processes.add("videos", made + failed)
        num_failed = processes.add("failed", failed)
        total_bytes = processes.add("bytes", num_bytes)
        if not bar.disable:
            bar.set_postfix_str(f"{total_bytes / 1e9:.2f} GB, {num_failed} failed", refresh=False)
            bar.update(done - bar.n)

    return show


def report_time(stage: VideoStage, num_videos: int, seconds: float) -> None:
    """Where this process's time went."""
    parts = [f"{name} {spent:.1f} s" for name, spent in sorted(stage.seconds.items(), reverse=True)]
    logger.info(
        "this process: %d videos in %.1f s, %.2f a second (%s; %d workers)",
        num_videos, seconds, num_videos / seconds, ", ".join(parts), stage.workers,
    )  # fmt: skip


def report_result(data: DataConfig) -> None:
    """How many samples there are now, and which are not, by reason.

    Raises:
        RuntimeError: a sample is neither there nor failed.
    """
    from longcat_video_fft.bad_video import REASONS
    from longcat_video_fft.cache import open_folder
    from longcat_video_fft.encoding import read_failures
    from longcat_video_fft.survey import read_samples

    cache, failures = open_folder(data.latent_cache), read_failures(data.latent_cache)
    samples = read_samples(cache.storage)
    absent = [(name, size) for name, size, *_ in samples if cache.find(name, size) is None]
    lost = [key for key in absent if key not in failures]
    if lost:
        raise RuntimeError(f"{data.latent_cache}: {len(lost)} samples were not made, as {lost[0]}")
    logger.info("%s: %s samples", data.latent_cache, f"{len(samples) - len(absent):,}")
    reasons = Counter(failures[key][0] for key in absent)
    for reason, number in reasons.most_common():
        logger.warning("not made: %d %s (%s)", number, reason, REASONS[reason])
        named = [key for key in absent if failures[key][0] == reason][:SHOWN_FAILURES]
        for key in named:
            logger.warning("    %s: %s", key[0], failures[key][1])


def verify(data: DataConfig, *, repairs: bool) -> int:
    """Compares every checksum; with `repairs`, what is wrong is made anew by the next run."""
    from longcat_video_fft.cache import TensorCache, reject
    from longcat_video_fft.storage import LocalStorage

    num_bad = 0
    for folder in (data.latent_cache, data.text_cache):
        bad = TensorCache(LocalStorage(folder)).verify()
        for entry in bad:
            logger.error(
                "%s: %s at %d is corrupt (%s)", folder, entry.shard, entry.offset, entry.id
            )
        if repairs and bad:
            reject(folder, bad)
        num_bad += len(bad)
        logger.info("%s: %d corrupt", folder, len(bad))
    if num_bad and not repairs:
        logger.error("run again with --verify --repair, then without both, to make them anew")
    return int(num_bad > 0 and not repairs)


def release_memory() -> None:
    """Gives a GPU's memory back for the next stage."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
