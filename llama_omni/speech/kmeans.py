"""Reads, writes and fits k-means centroids, which make units of features.

`quantizer.py` and `mel_voice.py` use them. Two kinds: the released centroids over mHuBERT features
(the file at KM1000_URL, sha256 KM1000_SHA256; nothing is downloaded here), and the embedded kind
over log-mel frames, fitted on the user's own audio by `python -m llama_omni.units fit`.

Our format is safetensors: "centroids" (K, D) float32; for log-mel also "durations" (K,), the mean
number of frames that a unit lasts; metadata "features" says which kind, and "frames" how the
log-mel frames were made.
"""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from llama_omni.speech import log_mel
from llama_omni.speech.hubert import verify_sha256
from llama_omni.speech.joblib_file import read_cluster_centers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

KM1000_FILE = "mhubert_base_vp_en_es_fr_it3_L11_km1000.bin"
KM1000_URL = f"https://dl.fbaipublicfiles.com/hubert/{KM1000_FILE}"
KM1000_SHA256 = "c70f5416c38044d0c20e33fdeedf4533974a8ac4029985cdef3b755038381a0b"

FRAMES_AT_ONCE = 16_384  # whose distances are in memory together


@dataclass(frozen=True, eq=False)
class KMeans:
    """Holds centroids of one kind. `durations` (mean frames a run) exist for log-mel alone."""

    features: str  # "mhubert" or "log_mel"
    centroids: Tensor  # (K, D) float32
    durations: Tensor | None = None  # (K,) float32

    @property
    def num_units(self) -> int:
        return len(self.centroids)

    @property
    def digest(self) -> str:
        """Returns the sha256 of the values, the same for a .bin and its conversion."""
        return hashlib.sha256(self.centroids.cpu().contiguous().numpy().tobytes()).hexdigest()

    def assign(self, features: Tensor) -> Tensor:
        """Returns (T,) indices of the nearest centroids to (T, D), in float32 on their device.

        It compares ||x - c||^2 without ||x||^2, which is the same for all centroids.
        """
        offsets = self.centroids.square().sum(1)
        units = [
            (offsets - 2 * part @ self.centroids.T).argmin(1)
            for part in features.split(FRAMES_AT_ONCE)
        ]
        return torch.cat(units)


def read_kmeans(path: Path) -> KMeans:
    """Reads centroids from our safetensors, or a joblib file of scikit-learn (no code in it runs).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not k-means centroids, or a damaged copy of the released ones.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such k-means file. Fit one on your own audio with `python -m "
            f"llama_omni.units fit DATA OUT.safetensors`, or get the released one: {KM1000_URL}"
        )
    if path.suffix == ".safetensors":
        kmeans = _read_safetensors(path)
    else:
        if path.name == KM1000_FILE:
            verify_sha256(path, KM1000_SHA256)
        kmeans = KMeans("mhubert", torch.from_numpy(read_cluster_centers(path)))
    centroids = kmeans.centroids
    if centroids.ndim != 2 or len(centroids) == 0 or not centroids.isfinite().all():
        raise ValueError(f"{path}: the centroids are not a finite matrix: {list(centroids.shape)}")
    if kmeans.durations is not None and len(kmeans.durations) != len(centroids):
        raise ValueError(
            f"{path}: {len(kmeans.durations)} durations for {len(centroids)} centroids; fit again"
        )
    return replace(kmeans, centroids=centroids.float().contiguous())


def _read_safetensors(path: Path) -> KMeans:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not readable as safetensors: {error}") from error
    if "centroids" not in tensors:
        raise ValueError(f'{path}: has no tensor "centroids" (it has {sorted(tensors)})')
    features = metadata.get("features", "mhubert")
    if features not in ("mhubert", "log_mel"):
        raise ValueError(f"{path}: features={features!r}; mhubert and log_mel are known")
    if features == "log_mel" and metadata.get("frames") != log_mel.IDENTITY:
        raise ValueError(
            f"{path}: fitted over {metadata.get('frames')!r}, while frames are now made as "
            f"{log_mel.IDENTITY!r}: fit it again"
        )
    return KMeans(features, tensors["centroids"], tensors.get("durations"))


def save_kmeans(path: Path, kmeans: KMeans) -> None:
    from safetensors.torch import save_file

    tensors = {"centroids": kmeans.centroids.cpu().contiguous()}
    metadata = {"features": kmeans.features}
    if kmeans.durations is not None:
        tensors["durations"] = kmeans.durations.cpu().contiguous()
    if kmeans.features == "log_mel":
        metadata["frames"] = log_mel.IDENTITY
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def fit_log_mel(
    paths: Sequence[Path], num_units: int, *, seed: int = 0, max_hours: float = 1.0
) -> KMeans:
    """Fits centroids and durations to the log-mel frames of `paths`, or of `max_hours` of them.

    Raises:
        ValueError: unreadable audio, or fewer frames than units.
    """
    from llama_omni.speech.audio import load_audio

    budget = max_hours * 3600 * log_mel.SAMPLE_RATE / log_mel.HOP
    clips: list[Tensor] = []
    order = random.Random(seed).sample(list(paths), len(paths))
    with tqdm(total=len(order), desc="log-mel frames", unit="clip") as bar:
        for path in order:
            clips.append(log_mel.compute_log_mel(load_audio(path)))
            bar.update()
            budget -= len(clips[-1])
            if budget <= 0:
                logger.info("took %d of %d clips (--max_hours %g)", bar.n, len(order), max_hours)
                break
    frames = torch.cat(clips) if clips else torch.empty(0, log_mel.NUM_MELS)
    centroids = fit_kmeans(frames, num_units, seed=seed)
    kmeans = KMeans("log_mel", centroids)
    return replace(kmeans, durations=mean_run_lengths([kmeans.assign(c) for c in clips], num_units))


def fit_kmeans(features: Tensor, num_units: int, *, seed: int = 0) -> Tensor:
    """Fits (num_units, D) to (N, D) by scikit-learn's KMeans: greedy k-means++ starts, which `seed`
    fixes, then at most 50 of Lloyd's iterations.

    Raises:
        ValueError: fewer distinct frames than units.
    """
    from sklearn.cluster import KMeans as Fitter
    from threadpoolctl import threadpool_limits

    num_distinct = len(features.unique(dim=0)) if len(features) < 100 * num_units else num_units
    if num_distinct < num_units:
        raise ValueError(
            f"{num_distinct} distinct frames cannot make {num_units} units: give more audio, or a "
            "smaller --num_units"
        )
    logger.info("fitting %d centroids to %d frames", num_units, len(features))
    with threadpool_limits(1):  # several threads add up in any order: other bits at each run
        fitter = Fitter(num_units, n_init=1, max_iter=50, random_state=seed)  # pyright: ignore
        fitter.fit(features.numpy())
    return torch.from_numpy(fitter.cluster_centers_)


def mean_run_lengths(clips: Sequence[Tensor], num_units: int) -> Tensor:
    """Returns (num_units,) mean frames that each unit lasts in `clips`; 1 if it never occurs."""
    frames, runs = torch.zeros(num_units), torch.zeros(num_units)
    for ids in clips:
        units, lengths = torch.unique_consecutive(ids, return_counts=True)
        frames.index_add_(0, units, lengths.float())
        runs.index_add_(0, units, torch.ones(len(units)))
    return torch.where(runs > 0, frames / runs.clamp(min=1), 1.0)
