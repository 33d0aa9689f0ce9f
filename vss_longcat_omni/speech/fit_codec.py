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
    MAX_BOOK_SIZES,
    NUM_BOOKS,
    SAMPLE_RATE,
    MelCodec,
    assign,
    check_is_new,
    compute_frames,
    fit_kmeans,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

NUM_COMPONENTS = 128
MIN_FRAMES = 17  # one second
MIN_FRAMES_PER_ENTRY = 4
MAX_HOURS = 5.0


def fit_codec(
    paths: Sequence[Path],
    folder: Path,
    *,
    book_sizes: Sequence[int] | None = None,
    max_hours: float = MAX_HOURS,
    seed: int = 0,
) -> MelCodec:
    """Fits a codec to these recordings and writes it; the folder appears whole or not at all.

    Args:
        book_sizes: entries of the four books; None: as the amount of speech allows.
        max_hours: of speech to look at, drawn from all; files of equal content count once.

    Raises:
        ValueError: the folder exists, too little speech, or book sizes that it does not allow.
    """
    check_is_new(folder)
    validate_book_sizes(book_sizes)
    if not max_hours > 0:
        raise ValueError(f"max_hours={max_hours}: must be more than 0")
    frames = _read_frames(paths, max_hours=max_hours, seed=seed)
    book_sizes = choose_book_sizes(len(frames), book_sizes)
    logger.info("%.1f minutes of speech: books of %s", len(frames) * 0.06 / 60, list(book_sizes))
    mean, basis = _fit_components(frames)
    rest = (frames - mean) @ basis
    books = []
    for number, size in enumerate(book_sizes):
        books.append(fit_kmeans(rest, size, seed=seed + number, label=f"book {number}"))
        rest = rest - books[-1][assign(rest, books[-1])]
    codec = MelCodec(mean, basis, books)
    codec.save(folder, {"fitted_to_frames": len(frames), "seed": seed})
    return codec


def validate_book_sizes(book_sizes: Sequence[int] | None) -> None:
    """Raises ValueError unless there are four, each at least 2 and within the model's ids."""
    if book_sizes is None:
        return
    if len(book_sizes) != NUM_BOOKS or any(
        not 2 <= size <= most for size, most in zip(book_sizes, MAX_BOOK_SIZES, strict=False)
    ):
        raise ValueError(
            f"books={list(book_sizes)}: give {NUM_BOOKS} sizes of at least 2 and at most "
            f"{list(MAX_BOOK_SIZES)}"
        )


def choose_book_sizes(num_frames: int, book_sizes: Sequence[int] | None) -> tuple[int, ...]:
    """The sizes asked for, else 4 sqrt(N) entries: 250 for 4 minutes, 2200 for 5 hours.

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
    if book_sizes is None:
        size = max(2, min(round(4 * math.sqrt(num_frames)), most))
        return tuple(min(size, limit) for limit in MAX_BOOK_SIZES)
    if max(book_sizes) > most:
        raise ValueError(
            f"books={list(book_sizes)}: {num_frames} frames of speech allow at most {most} entries "
            f"({MIN_FRAMES_PER_ENTRY} frames an entry); give smaller books or more speech"
        )
    return tuple(book_sizes)


def _read_frames(paths: Sequence[Path], *, max_hours: float, seed: int) -> Tensor:
    """(N, FRAME_WIDTH) of distinct files in a drawn order; bad ones are logged, and left out.

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
                # Of what is missing, load_audio says so.
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
    """Mean, and the NUM_COMPONENTS directions of largest variance as orthonormal columns."""
    mean = frames.mean(0)
    centred = frames - mean
    _, directions = torch.linalg.eigh((centred.T @ centred).double())  # by rising variance
    return mean, directions.flip(1)[:, :NUM_COMPONENTS].float().contiguous()
