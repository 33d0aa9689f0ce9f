"""k-means centres, which make units of features: reading, writing, fitting.

`quantizer.py` and `mel_voice.py` use them. Two kinds: the released centres over mHuBERT features
(the file at KM1000_URL, sha256 KM1000_SHA256; nothing is downloaded here), and the embedded kind
over log-mel frames, fitted on the user's own audio by `python -m llama_omni.units fit`.

Our format is safetensors: "centroids" (K, D) float32; for log-mel also "durations" (K,), the mean
number of frames that a unit lasts; metadata "features" says which kind, and "frames" how the
log-mel frames were made.
"""

from __future__ import annotations

import hashlib
import logging
import math
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

ASSIGN_ROWS = 16_384  # rows of the distance matrix made at a time


@dataclass(frozen=True, eq=False)
class KMeans:
    """Centres of one kind. `durations` (mean frames a run) exist for log-mel alone."""

    features: str  # "mhubert" or "log_mel"
    centroids: Tensor  # (K, D) float32
    durations: Tensor | None = None  # (K,) float32

    @property
    def num_units(self) -> int:
        return len(self.centroids)

    @property
    def digest(self) -> str:
        """sha256 of the centres' values, the same for a .bin and its conversion."""
        return hashlib.sha256(self.centroids.cpu().contiguous().numpy().tobytes()).hexdigest()

    def assign(self, features: Tensor) -> Tensor:
        """(T, D) -> (T,) index of the nearest centre, in float32 on the centres' device.

        ||x - c||^2 without its ||x||^2, which is the same for all centres.
        """
        offsets = self.centroids.square().sum(1)
        rows = [
            (offsets - 2 * part @ self.centroids.T).argmin(1)
            for part in features.split(ASSIGN_ROWS)
        ]
        return torch.cat(rows)


def read_kmeans(path: Path) -> KMeans:
    """Centres from our safetensors, or from a joblib file of scikit-learn (nothing in it is run).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not k-means centres, or a damaged copy of the released ones.
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
        raise ValueError(f"{path}: the centres are not a finite matrix: {list(centroids.shape)}")
    if kmeans.durations is not None and len(kmeans.durations) != len(centroids):
        raise ValueError(
            f"{path}: {len(kmeans.durations)} durations for {len(centroids)} centres; fit it again"
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
    """Centres and durations over the log-mel frames of `paths`, or of a sample of `max_hours`.

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


def fit_kmeans(
    features: Tensor, num_units: int, *, seed: int = 0, max_iterations: int = 50
) -> Tensor:
    """(N, D) -> (num_units, D) by Lloyd's iteration from k-means++ starts, which `seed` fixes.

    Raises:
        ValueError: fewer distinct rows than units.
    """
    num_distinct = len(features.unique(dim=0)) if len(features) < 100 * num_units else num_units
    if num_distinct < num_units:
        raise ValueError(
            f"{num_distinct} distinct frames cannot make {num_units} units: give more audio, or a "
            "smaller --num_units"
        )
    centroids = _spread_starts(features, num_units, torch.Generator().manual_seed(seed))
    last_error = float("inf")
    for _ in tqdm(range(max_iterations), desc=f"k-means, {num_units} centres", unit="round"):
        ids = KMeans("", centroids).assign(features)
        distances = (features - centroids[ids]).square().sum(1)
        counts = torch.bincount(ids, minlength=num_units)
        sums = torch.zeros(num_units, features.shape[1], dtype=torch.float64)
        sums.index_add_(0, ids, features.double())
        centroids = (sums / counts.clamp(min=1)[:, None]).float()
        empty = (counts == 0).nonzero().flatten()
        # A centre that lost all its frames goes where the fit is worst.
        centroids[empty] = features[distances.topk(len(empty)).indices]
        error = float(distances.double().mean())
        if not len(empty) and error > last_error * (1 - 1e-4):
            break
        last_error = error
    return centroids


def _spread_starts(features: Tensor, num_units: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii, 2007): candidates are drawn in proportion to the
    squared distance from the nearest start so far; the one that lessens it most is the next."""
    num_candidates = 2 + int(math.log(num_units))
    norms = features.square().sum(1)
    starts = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = (features - features[starts[0]]).square().sum(1)
    for _ in range(num_units - 1):
        edges = nearest.double().cumsum(0)
        draws = torch.rand(num_candidates, generator=generator, dtype=torch.float64) * edges[-1]
        drawn = torch.searchsorted(edges, draws, right=True).clamp(max=len(features) - 1)
        products = features[drawn] @ features.T  # (num_candidates, N)
        distances = (norms[drawn, None] + norms - 2 * products).clamp(min=0)
        remaining = torch.minimum(distances, nearest)
        best = int(remaining.double().sum(1).argmin())
        starts.append(int(drawn[best]))
        nearest = remaining[best]
        nearest[starts[-1]] = 0  # exactly, so that it is not drawn again
    return features[starts]


def mean_run_lengths(clips: Sequence[Tensor], num_units: int) -> Tensor:
    """(num_units,) mean number of frames that each unit lasts in `clips`; 1 if it never occurs."""
    frames, runs = torch.zeros(num_units), torch.zeros(num_units)
    for ids in clips:
        units, lengths = torch.unique_consecutive(ids, return_counts=True)
        frames.index_add_(0, units, lengths.float())
        runs.index_add_(0, units, torch.ones(len(units)))
    return torch.where(runs > 0, frames / runs.clamp(min=1), 1.0)
