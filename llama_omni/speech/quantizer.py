"""Quantizes speech to units: the nearest centroid to each frame, equal neighbors merged.

Place in the data flow: the answers' speech -> units, before training (`dataset/units.py`, or the
command `units.py`) and in `evaluate.py`. Features come from `hubert.py` or `log_mel.py`,
centroids from `kmeans.py`, the cache is `unit_cache.py`'s.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llama_omni.speech.audio import load_audio
from llama_omni.speech.hubert import MHUBERT_URL, full_float32, load_hubert
from llama_omni.speech.kmeans import KMeans, read_kmeans
from llama_omni.speech.log_mel import LogMelFeatures
from llama_omni.speech.unit_cache import UnitCache

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

SHOWN_FILES = 5


class Features(Protocol):
    """Describes what `hubert.HubertFeatures` and `log_mel.LogMelFeatures` have in common."""

    dim: int
    identity: str

    def __call__(self, waveform: Tensor) -> Tensor:
        """Returns (T, dim), 50 a second, for (num_samples,) at 16 kHz."""
        ...


class Quantizer:
    """Makes units of waveforms. `num_units` is the size of their vocabulary."""

    def __init__(self, features: Features, kmeans: KMeans) -> None:
        self.features = features
        self.kmeans = kmeans
        self.num_units = kmeans.num_units
        # What makes units comparable; a cache of units made otherwise is an error.
        self.identity = {
            "num_units": kmeans.num_units,
            "kmeans_sha256": kmeans.digest,
            "features": features.identity,
        }

    @torch.no_grad()
    def assign(self, waveform: Tensor) -> Tensor:
        """Returns the unit of every frame (T,), on the CPU, for (num_samples,) at 16 kHz."""
        with full_float32():
            return self.kmeans.assign(self.features(waveform)).cpu()

    def extract(self, waveform: Tensor) -> list[int]:
        """Returns the units of (num_samples,) at 16 kHz, equal neighbors merged.

        Raises:
            ValueError: too short for one frame of mHuBERT (25 ms).
        """
        return torch.unique_consecutive(self.assign(waveform)).tolist()


def load_quantizer(
    kmeans_path: Path,
    *,
    hubert_path: Path | None = None,
    device: torch.device | str = "cpu",
    unit_backend: Literal["transformers", "fairseq"] = "transformers",
) -> Quantizer:
    """Loads centroids with the features they were fitted on.

    Args:
        kmeans_path: the released .bin or any joblib file of scikit-learn's k-means, or our
            .safetensors of either kind.
        hubert_path: a Hugging Face folder or fairseq .pt, for centroids over mHuBERT.
        unit_backend: "fairseq" runs fairseq's own network, to compare.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no mHuBERT for centroids that need it, or one of another width.
    """
    kmeans = read_kmeans(kmeans_path)
    if kmeans.features == "log_mel":
        features, source = LogMelFeatures(device=device), "the log-mel frames of this program"
    else:
        if hubert_path is None:
            raise ValueError(
                f"{kmeans_path}: these centroids are over mHuBERT features, so hubert_model_path "
                f"(--hubert) is needed: a folder, or the file {MHUBERT_URL}. For units without it, "
                "fit your own: `python -m llama_omni.units fit`."
            )
        features = load_hubert(hubert_path, device=device, unit_backend=unit_backend)
        source = str(hubert_path)
    width = kmeans.centroids.shape[1]
    if width != features.dim:
        raise ValueError(
            f"{kmeans_path}: its centroids are {width} wide, but the features of {source} are "
            f"{features.dim} wide. Give the k-means that was fitted on these features, or the "
            "encoder that belongs to this k-means."
        )
    centroids = kmeans.centroids.to(device)
    return Quantizer(features, KMeans(kmeans.features, centroids, kmeans.durations))


def extract_units(
    paths: Sequence[Path],
    quantizer: Quantizer,
    cache_dir: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Writes the units of this rank's share of `paths` to the cache; what is there is not redone.

    Each of `world_size` processes calls it with the same `paths`. It may be killed at any time
    and called again, also with another `world_size`. Rank 0 shows its own progress.

    Raises:
        ValueError: the cache holds units of another quantizer; or, after all else is done, some
            audio could not be read (each file is logged by name).
    """
    cache = UnitCache(cache_dir, quantizer.identity)
    share = sorted({path.resolve() for path in paths})[rank::world_size]
    open_paths = cache.find_missing(share)
    failed: list[str] = []
    bar = tqdm(
        total=len(share),
        initial=len(share) - len(open_paths),
        desc=f"units{f' (process 1 of {world_size})' if world_size > 1 else ''}",
        unit="clip",
        disable=rank != 0 or not share,
    )
    with bar, cache.open_shard(rank) as shard, logging_redirect_tqdm():
        for path in open_paths:
            try:
                units = quantizer.extract(load_audio(path))
            except (OSError, ValueError) as error:
                message = str(error) if str(path) in str(error) else f"{path}: {error}"
                logger.error("no units: %s", message)
                failed.append(message)
            else:
                shard.write(path, units)
            bar.update()
    if failed:
        shown = "; ".join(failed[:SHOWN_FILES]) + ("; ..." if len(failed) > SHOWN_FILES else "")
        raise ValueError(
            f"{len(failed)} of {len(share)} audio files gave no units: {shown}. The others are in "
            f"{cache_dir}; fix or leave out these and run again."
        )
