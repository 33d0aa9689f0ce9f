"""Fits the embedded speech codec to the user's own speech; it needs no download.

`train_ds.py` fits it to the answers where no other codec is named; tools/fit_codec.py is the
command. What it is: embedded_codec.py.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vss_longcat_omni.media.audio import load_audio
from vss_longcat_omni.speech.embedded_codec import (
    FRAME_SAMPLES,
    MAX_CODEBOOK_SIZES,
    NUM_CODEBOOKS,
    SAMPLE_RATE,
    MelCodec,
    assign,
    check_is_new,
    compute_frames,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

NUM_COMPONENTS = 128
MIN_FRAMES = 17  # one second
MIN_FRAMES_PER_ENTRY = 4
MAX_HOURS = 5.0
BATCH_SIZE = 10_000  # points that k-means takes in a step
MAX_PASSES = 30  # over all points; it stops earlier when ten steps in a row have gained nothing


def fit_codec(
    paths: Sequence[Path],
    folder: Path,
    *,
    codebook_sizes: Sequence[int] | None = None,
    max_hours: float = MAX_HOURS,
    seed: int = 0,
) -> MelCodec:
    """Fit a codec to these recordings and write its folder atomically.

    Args:
        codebook_sizes: entries of the four codebooks; None: as the amount of speech allows.
        max_hours: of speech to take, drawn from all; files of equal content count once.

    Raises:
        ValueError: the folder exists, too little speech, or codebook sizes that it does not allow.
    """
    check_is_new(folder)
    validate_codebook_sizes(codebook_sizes)
    if not max_hours > 0:
        raise ValueError(f"max_hours={max_hours}: must be more than 0")
    frames = _read_frames(paths, max_hours=max_hours, seed=seed)
    codebook_sizes = choose_codebook_sizes(len(frames), codebook_sizes)
    minutes = len(frames) * 0.06 / 60
    logger.info("%.1f minutes of speech: codebooks of %s", minutes, list(codebook_sizes))
    mean, basis = _fit_components(frames)
    rest = (frames - mean) @ basis
    codebooks = []
    for number, size in enumerate(tqdm(codebook_sizes, desc="k-means", unit="codebook")):
        codebooks.append(fit_kmeans(rest, size, seed=seed + number))
        rest = rest - codebooks[-1][assign(rest, codebooks[-1])]
    codec = MelCodec(mean, basis, codebooks)
    codec.save(folder, {"fitted_to_frames": len(frames), "seed": seed})
    return codec


def fit_kmeans(points: Tensor, num_centroids: int, *, seed: int = 0) -> Tensor:
    """Cluster (N, D) to (num_centroids, D) float32 by scikit-learn's MiniBatchKMeans and `seed`.

    Raises:
        ValueError: fewer points than centroids, or scikit-learn is not installed.
    """
    if len(points) < num_centroids:
        raise ValueError(f"{len(points)} points cannot make {num_centroids} centroids")
    try:
        from sklearn.cluster import MiniBatchKMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ValueError(
            "fitting a codec needs scikit-learn: `pip install scikit-learn`, or name a codec that "
            "is fitted already (--codec FOLDER)"
        ) from error
    # None of the centroids is drawn again for having few points: most are of silence.
    kmeans = MiniBatchKMeans(
        num_centroids,
        batch_size=BATCH_SIZE,
        max_iter=MAX_PASSES,
        tol=0.0,
        n_init=1,  # pyright: ignore[reportArgumentType] - its stub has the default alone
        reassignment_ratio=0.0,
        random_state=seed,
        compute_labels=False,
    )
    # Sums of several threads would differ from run to run in their last bits.
    with threadpool_limits(1):
        kmeans.fit(points.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)


def validate_codebook_sizes(codebook_sizes: Sequence[int] | None) -> None:
    """Raise ValueError unless there are four, each at least 2 and within the model's ids."""
    if codebook_sizes is None:
        return
    if len(codebook_sizes) != NUM_CODEBOOKS or any(
        not 2 <= size <= most
        for size, most in zip(codebook_sizes, MAX_CODEBOOK_SIZES, strict=False)
    ):
        raise ValueError(
            f"books={list(codebook_sizes)}: give {NUM_CODEBOOKS} sizes of at least 2 and at most "
            f"{list(MAX_CODEBOOK_SIZES)}"
        )


def choose_codebook_sizes(num_frames: int, codebook_sizes: Sequence[int] | None) -> tuple[int, ...]:
    """Return the sizes asked for, else 4 sqrt(N) entries: 250 for 4 minutes, 2200 for 5 hours.

    More would lower the error a little, and be harder to learn for the model.

    Raises:
        ValueError: fewer frames than MIN_FRAMES, or than MIN_FRAMES_PER_ENTRY an entry.
    """
    if num_frames < MIN_FRAMES:
        raise ValueError(
            f"{num_frames * 0.06:.1f} s of speech in all: a codec needs at least one second, and "
            "is understood from about a minute on"
        )
    most = num_frames // MIN_FRAMES_PER_ENTRY
    if codebook_sizes is None:
        size = max(2, min(round(4 * math.sqrt(num_frames)), most))
        return tuple(min(size, limit) for limit in MAX_CODEBOOK_SIZES)
    if max(codebook_sizes) > most:
        raise ValueError(
            f"books={list(codebook_sizes)}: {num_frames} frames of speech allow at most {most} "
            f"entries ({MIN_FRAMES_PER_ENTRY} frames an entry); give smaller codebooks or more "
            "speech"
        )
    return tuple(codebook_sizes)


def _read_frames(paths: Sequence[Path], *, max_hours: float, seed: int) -> Tensor:
    """Read (N, FRAME_WIDTH) of distinct files in a drawn order; log bad ones, and leave them out.

    Raises:
        ValueError: no recording can be read.
    """
    budget = max_hours * 3600 * SAMPLE_RATE / FRAME_SAMPLES
    clips: dict[str, Tensor] = {}  # by the content of their files
    problems = []
    order = random.Random(seed).sample(list(paths), len(paths))
    with tqdm(order, desc="log-mel frames", unit="clip") as bar, logging_redirect_tqdm():
        for path in bar:
            try:
                # load_audio reports a missing file.
                content = path.read_bytes() if path.is_file() else b""
                digest = hashlib.sha256(content).hexdigest()
                if digest in clips:
                    continue
                clips[digest] = compute_frames(load_audio(path))
            except (ValueError, OSError) as error:
                problems.append(str(error))
                logger.warning("left out: %s", error)
                continue
            budget -= len(clips[digest])
            if budget <= 0:
                logger.info("took %d of %d clips (max_hours %g)", bar.n + 1, len(order), max_hours)
                break
    if not clips:
        first = f"; the first: {problems[0]}" if problems else ""
        raise ValueError(f"none of {len(paths)} recordings can be used{first}")
    return torch.cat(list(clips.values()))


def _fit_components(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the mean, and the NUM_COMPONENTS directions of largest variance, orthonormal columns."""
    mean = frames.mean(0)
    centered = frames - mean
    _, directions = torch.linalg.eigh((centered.T @ centered).double())  # by rising variance
    return mean, directions.flip(1)[:, :NUM_COMPONENTS].float().contiguous()
