"""What a training would start from: caches, weights and disk, looked at and not changed.

The half of `dry_run.py` that reads files. Nothing is downloaded and no model is loaded.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_video_fft.dataset.sampler import TrainingOrder, split_held_out
from longcat_video_fft.dataset.samples import CAPTIONS, read_samples
from longcat_video_fft.dataset.sources import S3_SCHEME, open_caches
from longcat_video_fft.model.loading import CheckpointReader, check_names
from longcat_video_fft.options.buckets import parse_bucket
from longcat_video_fft.plan.memory import BF16, FP32, ModelSizes, master_bytes, state_bytes
from longcat_video_fft.precompute.encoding import read_failures
from longcat_video_fft.precompute.job import Models, check_identity
from longcat_video_fft.precompute.manifest import MANIFEST
from longcat_video_fft.precompute.state import find_missing, permanent
from longcat_video_fft.storage.storage import StorageError
from longcat_video_fft.training.checkpoint import finished_checkpoints

if TYPE_CHECKING:
    from longcat_video_fft.dataset.cache import TensorCache
    from longcat_video_fft.options.buckets import Bucket
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.data_config import DataConfig

# The released model, for a plan before it is downloaded: dit/config.json and the sizes of its parts
# as bf16 (the transformer's from its shapes).
RELEASED_CONFIG: dict[str, Any] = {"text_tokens_zero_pad": True}
PARTS = ("vae", "text_encoder", "tokenizer")
RELEASED_PARTS_BYTES = 12_000_000_000  # UMT5-XXL's encoder and the VAE, about


@dataclass
class Findings:
    """Lines to print, and what would stop the run."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Samples(Findings):
    """The samples of an epoch; `order` is None before there is a survey."""

    order: TrainingOrder | None = None
    buckets: Counter[Bucket] = field(default_factory=Counter)

    @property
    def largest(self) -> Bucket:
        return max(self.buckets, key=lambda bucket: bucket.num_tokens)


def read_cache(config: TrainConfig, data: DataConfig) -> Samples:
    """The real bucket mix, and what the caches lack."""
    found = Samples()
    try:
        latents, text = open_caches(data)
        samples = read_samples(latents.storage)
    except (ValueError, OSError, StorageError):
        # No folder or no samples.parquet: nothing was surveyed.
        return _without_survey(data, found)
    failed: dict[Any, Any] = {}
    is_local = not data.videos.cache_dir_vae.startswith(S3_SCHEME)
    if is_local:
        failed = permanent(read_failures(data.latent_cache))
    names, buckets = [], []
    num_there = 0
    for name, size, bucket, caption in samples:
        entry = latents.find(name, size)
        is_there = entry is not None and text.find(caption) is not None
        num_there += is_there
        if is_there or (is_local and (name, size) not in failed):
            names.append(name)
            buckets.append(parse_bucket(entry.bucket) if entry is not None else bucket)
    found.lines.append(
        f"{latents.storage.location}: {num_there:,} of {len(samples):,} samples are there"
        + (f", {len(failed):,} cannot be made" if failed else "")
    )
    if is_local:
        _tell_missing(data, latents, text, failed, found)
    if not names:
        found.problems.append("the caches hold no sample: run longcat_video_fft.precompute")
        return _without_survey(data, found)
    return _arrange(config, data, names, buckets, found)


def _arrange(
    config: TrainConfig,
    data: DataConfig,
    names: list[str],
    buckets: list[Bucket],
    found: Samples,
) -> Samples:
    """The order that the training will take."""
    try:
        is_held_out = split_held_out(names, config.num_held_out_samples)
    except ValueError as error:
        found.problems.append(str(error))
        is_held_out = [False] * len(names)
    kept = [(n, b) for n, b, out in zip(names, buckets, is_held_out, strict=True) if not out]
    found.order = TrainingOrder(
        [name for name, _ in kept],
        [bucket for _, bucket in kept],
        batch_size=config.train_batch_size,
        seed=config.seed,
        repeats=data.videos.repeats,
    )
    found.buckets = Counter(bucket for _, bucket in kept)
    for bucket, number in sorted(found.buckets.items(), reverse=True):
        share = 100 * number / len(kept)
        tokens = f"{bucket.num_tokens:,} tokens each"
        found.lines.append(f"  {bucket!s:>14} {number:>9,} ({share:.1f} %), {tokens}")
    return found


def _without_survey(data: DataConfig, found: Samples) -> Samples:
    """All samples are taken to be of the longest and official landscape shape."""
    bucket = data.rule.choose_bucket(height=480, width=832, num_available=10**9)
    assert bucket is not None
    found.buckets = Counter({bucket: 1})
    where = data.videos.cache_dir_vae
    if where.startswith(S3_SCHEME):
        found.problems.append(f"{where}: no cache there; make it on a disk and copy it")
    found.lines.append(
        f"{where}: nothing there yet; the training makes the caches first (phase 1; precompute "
        f"--dry_run tells how much). Assumed below: every sample is {bucket}."
    )
    return found


def _tell_missing(
    data: DataConfig, latents: TensorCache, text: TensorCache, failed: Any, found: Samples
) -> None:
    if not (data.text_cache / CAPTIONS).is_file():
        found.lines.append(f"{data.text_cache}: no {CAPTIONS}; the training makes it first")
        return
    missing = find_missing(data, latents, text, failed=failed, embedding_dim=4096)
    if missing.videos or missing.captions:
        found.lines.append(
            f"missing: {missing.videos:,} videos and {missing.captions:,} captions, "
            f"{missing.num_bytes / 1e9:,.2f} GB; the training makes them first (phase 1)"
        )
        free = free_bytes(data.latent_cache)
        if missing.num_bytes > free:
            found.problems.append(
                f"{data.latent_cache}: what is missing needs {missing.num_bytes / 1e9:,.2f} GB "
                f"and {free / 1e9:,.2f} GB are free; free some space or move the cache"
            )
    else:
        found.lines.append("the caches are complete")


@dataclass
class Weights(Findings):
    """What is known of the model's folder."""

    config: dict[str, Any] = field(default_factory=lambda: dict(RELEASED_CONFIG))
    dit: Path | None = None  # where it lies on this machine
    parts_bytes: int = RELEASED_PARTS_BYTES  # what an export copies beside the transformer


def find_weights(config: TrainConfig, data: DataConfig) -> Weights:
    """The model's folder, or its hub id's place in the cache of downloads.

    Raises:
        ValueError: the user's folder is not there or lacks a part.
    """
    found = Weights()
    root = local_model(config.model)
    if root is None:
        if is_path(config.model):
            raise ValueError(
                f"pretrained_model_name_or_path={config.model}: no such folder; give one with "
                "dit/, vae/, text_encoder/ and tokenizer/, or a hub id."
            )
        found.lines.append(
            f"{config.model}: not on this machine; the run downloads it once a node. Shapes below "
            "are the released model's."
        )
        return found
    is_whole = True
    found.parts_bytes = sum(folder_bytes(root / part) for part in PARTS)
    for part in ("dit", *PARTS):
        size = folder_bytes(root / part)
        if size:
            found.lines.append(f"{root / part}: {size / 1e9:,.2f} GB")
        elif root == Path(config.model).expanduser():
            raise ValueError(
                f"pretrained_model_name_or_path={config.model}: has no {part}/; it must be laid "
                "out as the released LongCat-Video: dit/, vae/, text_encoder/, tokenizer/."
            )
        else:
            found.lines.append(f"{config.model}: {part}/ is not on this machine; downloaded first")
            is_whole = False
    if (root / "dit" / "config.json").is_file():
        found.dit = root / "dit" if is_whole else None
        found.config = json.loads((root / "dit" / "config.json").read_text("utf-8"))
    elif is_whole:
        raise ValueError(f"{root / 'dit'}: has no config.json; copy it there.")
    has_cache = (data.latent_cache / MANIFEST).is_file() and (data.text_cache / MANIFEST).is_file()
    if has_cache and is_whole and not found.problems:
        try:
            check_identity(config, data, Models(*(root / part for part in PARTS)))
        except ValueError as error:
            found.problems.append(str(error))
    return found


def check_weight_files(config: TrainConfig, found: Weights, model: Any) -> None:
    """Compares names and shapes of the files with the model's; reads the files' heads only."""
    if found.dit is None or config.transformer_init == "random":
        return
    try:
        check_names(CheckpointReader(found.dit), dict(model.named_parameters()))
    except ValueError as error:
        found.problems.append(str(error))


def is_path(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or spec.count("/") != 1


def local_model(spec: str) -> Path | None:
    """The folder that `spec` names, without a connection."""
    if Path(spec).expanduser().is_dir():
        return Path(spec).expanduser()
    if is_path(spec):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, revision = spec.partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, local_files_only=True)
    except (LocalEntryNotFoundError, ValueError):
        return None
    return Path(folder)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


def free_bytes(folder: Path) -> int:
    """Of the disk where `folder` is or will be."""
    folder = folder.expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def plan_disk(config: TrainConfig, sizes: ModelSizes, weights: Weights) -> Findings:
    """Bytes to be written below output_dir against what is free there."""
    number = sizes.num_parameters
    shapes = [shape for unit in (*sizes.blocks, sizes.root) for shape in unit]
    each = master_bytes(config) * number + state_bytes(shapes, 1, config.optimizer)
    each += FP32 * number * (config.ema_decay is not None)
    written = math.ceil(config.max_train_steps / config.checkpointing_steps)
    kept = min(written, config.checkpoints_total_limit)
    at_once = min(written, kept + 1)
    there = len(finished_checkpoints(Path(config.output_dir)))
    rows = [
        ("checkpoints", each * max(0, at_once - there),
         f"({kept} kept + {at_once - kept} being written - {there} there) x {each / 1e9:.1f} GB "
         f"(weights, states{', average' if config.ema_decay is not None else ''})"),
        ("export", BF16 * number + weights.parts_bytes, "bf16 transformer, text encoder, VAE"),
    ]  # fmt: skip
    needed = sum(size for _, size, _ in rows)
    free = free_bytes(Path(config.output_dir))
    found = Findings()
    found.lines += [f"  {name:<32}{size / 1e9:>9.2f}  {text}" for name, size, text in rows]
    found.lines.append(f"  {'all':<32}{needed / 1e9:>9.2f}  of {free / 1e9:.1f} free")
    if needed > free:
        found.problems.append(
            f"output_dir={config.output_dir}: {needed / 1e9:,.1f} GB are needed and "
            f"{free / 1e9:,.1f} GB are free; lower checkpoints_total_limit, or give another disk"
        )
    return found
