"""What a training would start from: the caches and the weights, looked at and not changed.

The half of `dry_run.py` that reads files. Nothing is downloaded and no model is loaded.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from longcat_video_fft.dataset.sampler import TrainingOrder, split_held_out
from longcat_video_fft.dataset.sources import S3_SCHEME
from longcat_video_fft.model.loading import find_transformer, local_model
from longcat_video_fft.options.buckets import Bucket, bucket_lines
from longcat_video_fft.options.hub import check_free_disk
from longcat_video_fft.precompute.job import check_identity, find_models
from longcat_video_fft.precompute.manifest import MANIFEST
from longcat_video_fft.precompute.state import CacheState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.data_config import DataConfig

PARTS = ("dit", "vae", "text_encoder", "tokenizer")
EMBEDDING_DIM = 4096  # of a caption's tokens, UMT5-XXL's


@dataclass
class Report:
    """The plan as it grows: lines, what would stop the run, and what could not be looked at."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def section(self, title: str, *lines: str) -> None:
        self.lines += ["", title, *(f"  {line}" for line in lines)]

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """A check's ValueError becomes a problem, and the plan continues."""
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))


class Samples(NamedTuple):
    """The longest bucket, and the order of an epoch: None before there is a survey."""

    largest: Bucket
    order: TrainingOrder | None


def read_samples(config: TrainConfig, data: DataConfig, report: Report) -> Samples:
    """The real mix of buckets, and what the caches lack; before a survey an assumed one."""
    title, where = f"Caches ({data.source})", data.videos.cache_dir_vae
    try:
        state = CacheState(data)
    except (ValueError, OSError):  # no folder or no tables: nothing was surveyed
        report.section(title, f"{where}: nothing there yet; the training makes the caches first")
        if where.startswith(S3_SCHEME):
            report.problems.append(f"{where}: no cache there; make it on a disk and copy it")
        return assume_samples(data, report)
    missing, total = state.missing, len(state.samples)
    size = missing.num_bytes(EMBEDDING_DIM)
    failed = f", {len(state.failed):,} cannot be made" if state.failed else ""
    lacking = "the caches are complete"
    if missing.videos or missing.captions:
        lacking = (
            f"missing: {missing.videos:,} videos and {missing.captions:,} captions, "
            f"{size / 1e9:,.2f} GB; the training makes them first (phase 1)"
        )
        with report.noting():
            check_free_disk(data.latent_cache, size, what="What the caches lack")
    there = f"{where}: {state.num_whole:,} of {total:,} samples are there{failed}"
    report.section(title, there, lacking)
    usable = state.usable
    if not usable:
        report.problems.append("the caches hold no sample: run longcat_video_fft.precompute")
        return assume_samples(data, report)
    with report.noting():
        is_held_out = split_held_out([name for name, _ in usable], config.num_held_out_samples)
        usable = [sample for sample, out in zip(usable, is_held_out, strict=True) if not out]
    names, buckets = zip(*usable, strict=True)
    report.lines += bucket_lines(Counter(buckets))
    order = TrainingOrder(
        names, buckets, batch_size=config.train_batch_size, seed=config.seed,
        repeats=data.videos.repeats,
    )  # fmt: skip
    return Samples(max(buckets, key=lambda bucket: bucket.num_tokens), order)


def assume_samples(data: DataConfig, report: Report) -> Samples:
    """All samples are taken to be of the longest length and the official landscape shape."""
    bucket = Bucket(data.rule.frames[0], *data.rule.choose_shape(480, 832))
    size = f"{bucket.latent_bytes / 1e6:.2f} MB of latents"
    report.lines.append(f"  Assumed below: every sample is {bucket}, {size}.")
    report.unchecked.append("the videos (precompute --dry_run counts them)")
    return Samples(bucket, None)


def find_weights(config: TrainConfig, data: DataConfig, report: Report) -> Path | None:
    """The folder dit/; None where the model is still to be downloaded.

    Raises:
        ValueError: the user's folder is not there or lacks a part.
    """
    root = local_model(config.model)
    here = replace(config, pretrained_model_name_or_path=str(root))
    is_whole = root is not None and all((root / part).is_dir() for part in PARTS)
    if not is_whole and root != Path(config.model).expanduser():
        text = f"{config.model}: not on this machine; the run downloads it once a node. Shapes"
        report.section("Model", f"{text} below are the released model's.")
        report.unchecked.append("the weights (not downloaded yet)")
        return None
    dit, models = find_transformer(here), find_models(here)
    report.section("Model", str(root))
    if all((folder / MANIFEST).is_file() for folder in (data.latent_cache, data.text_cache)):
        with report.noting():
            check_identity(here, data, models)
    return dit
