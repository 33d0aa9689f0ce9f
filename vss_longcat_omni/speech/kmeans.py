"""k-means centres of points, for the books of `fit_codec.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

ASSIGN_ROWS = 16_384  # rows of the distance matrix made at a time
MAX_ROUNDS = 30
MIN_GAIN = 1e-3  # a round that lowers the error by less is the last


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """(N, D), (K, D) -> (N,) index of the nearest centre.

    ||x - c||^2 without its ||x||^2, which is the same for all centres.
    """
    offsets = centroids.square().sum(1)
    rows = [
        torch.addmm(offsets, part, centroids.T, alpha=-2).argmin(1)
        for part in points.split(ASSIGN_ROWS)
    ]
    return torch.cat(rows)


def fit_kmeans(
    points: Tensor, num_centroids: int, *, seed: int = 0, label: str = "k-means"
) -> Tensor:
    """(N, D) -> (num_centroids, D) by Lloyd's iteration from k-means++ starts, which `seed` fixes.

    Raises:
        ValueError: fewer points than centres.
    """
    if len(points) < num_centroids:
        raise ValueError(f"{len(points)} points cannot make {num_centroids} centres")
    centroids = _spread_starts(points, num_centroids, torch.Generator().manual_seed(seed))
    last_error = float("inf")
    for _ in tqdm(range(MAX_ROUNDS), desc=f"{label}, {num_centroids} entries", unit="round"):
        ids = assign(points, centroids)
        distances = (points - centroids[ids]).square().sum(1)
        counts = torch.bincount(ids, minlength=num_centroids)
        sums = torch.zeros_like(centroids).index_add_(0, ids, points)
        centroids = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        # A centre that lost all its points goes where the fit is worst.
        centroids[empty] = points[distances.topk(len(empty)).indices]
        error = float(distances.double().mean())
        if not len(empty) and error > last_error * (1 - MIN_GAIN):
            break
        last_error = error
    return centroids


def _spread_starts(points: Tensor, num_starts: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each start is drawn in proportion to the squared
    distance from the nearest one so far. Plain draws would mostly be silence."""
    norms = points.square().sum(1)
    starts = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = torch.full_like(norms, torch.inf)
    while True:
        distances = norms + norms[starts[-1]] - 2 * points @ points[starts[-1]]
        nearest = torch.minimum(nearest, distances.clamp(min=0))
        nearest[starts[-1]] = 0  # exactly, so that it is not drawn again
        if len(starts) == num_starts:
            return points[starts]
        edges = nearest.double().cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * edges[-1]
        starts.append(int(torch.searchsorted(edges, draw, right=True).clamp(max=len(points) - 1)))
