"""Centroids: read from every file kind as scikit-learn would, and fitted as well as it does."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans, MiniBatchKMeans

from llama_omni.speech import kmeans as kmeans_module
from llama_omni.speech.kmeans import fit_kmeans, mean_run_lengths, read_kmeans

if TYPE_CHECKING:
    from pathlib import Path


def fit_sklearn(points: np.ndarray, num_units: int, *, kind: Any = KMeans, seed: int = 0) -> Any:
    return kind(num_units, n_init=1, random_state=np.random.RandomState(seed)).fit(points)


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(9, 6)) * 4
    return (centers[generator.integers(9, size=400)] + generator.normal(size=(400, 6))).astype("f4")


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)])
@pytest.mark.parametrize("kind", [KMeans, MiniBatchKMeans])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_joblib_file_equals_sklearn(
    tmp_path: Path, points: np.ndarray, kind: Any, compress: Any, dtype: str
) -> None:
    points = points.astype(dtype)
    model = fit_sklearn(points, 9, kind=kind)
    path = tmp_path / "km.bin"
    joblib.dump(model, path, compress=compress)
    kmeans = read_kmeans(path)
    assert kmeans.features == "mhubert"
    assert kmeans.centroids.dtype == torch.float32
    assert np.array_equal(kmeans.centroids.numpy(), model.cluster_centers_.astype("f4"))
    assert (
        kmeans.assign(torch.from_numpy(points).float()).tolist() == model.predict(points).tolist()
    )


def test_joblib_file_of_the_released_age(
    tmp_path: Path, points: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """joblib before 1.2 did not align arrays, and its notes lack the attribute."""
    from joblib.numpy_pickle import NumpyArrayWrapper

    original = NumpyArrayWrapper.__init__

    def without_alignment(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        del self.numpy_array_alignment_bytes

    model = fit_sklearn(points, 9)
    model.cluster_centers_ = np.asfortranarray(model.cluster_centers_)
    with monkeypatch.context() as patch:
        patch.setattr(NumpyArrayWrapper, "__init__", without_alignment)
        joblib.dump(model, tmp_path / "km.bin", protocol=3)
    assert b"numpy_array_alignment_bytes" not in (tmp_path / "km.bin").read_bytes()
    kmeans = read_kmeans(tmp_path / "km.bin")
    assert np.array_equal(kmeans.centroids.numpy(), model.cluster_centers_)


@pytest.mark.parametrize("protocol", range(2, 6))  # 0 and 1 build objects through copyreg
def test_plain_pickle(tmp_path: Path, points: np.ndarray, protocol: int) -> None:
    model = fit_sklearn(points, 9)
    (tmp_path / "km.pkl").write_bytes(pickle.dumps(model, protocol))
    kmeans = read_kmeans(tmp_path / "km.pkl")
    assert np.array_equal(kmeans.centroids.numpy(), model.cluster_centers_)


def test_kmeans_files_with_clear_messages(tmp_path: Path, points: np.ndarray) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.bin: no such k-means file.*units fit"):
        read_kmeans(tmp_path / "absent.bin")
    path = tmp_path / "km.bin"
    joblib.dump({"a": points}, path)
    with pytest.raises(ValueError, match=r"km.bin: .*holds a dict without cluster_centers_"):
        read_kmeans(path)
    joblib.dump(fit_sklearn(points, 3), path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"km.bin: not readable as k-means centroids"):
            read_kmeans(path)
    named = tmp_path / kmeans_module.KM1000_FILE
    named.write_bytes(whole)
    with pytest.raises(ValueError, match="the released file of that name has c70f5416"):
        read_kmeans(named)
    safe = tmp_path / "k.safetensors"
    save_file({"x": torch.ones(2)}, safe)
    with pytest.raises(ValueError, match=r'k.safetensors: has no tensor "centroids"'):
        read_kmeans(safe)
    save_file({"centroids": torch.ones(2, 80)}, safe, {"features": "log_mel", "frames": "other"})
    with pytest.raises(ValueError, match="fitted over 'other'"):
        read_kmeans(safe)
    save_file({"centroids": torch.full((2, 80), torch.nan)}, safe)
    with pytest.raises(ValueError, match="not a finite matrix"):
        read_kmeans(safe)


def test_fit_is_as_good_as_sklearn_and_repeats(points: np.ndarray) -> None:
    features = torch.from_numpy(points)

    def error(centroids: torch.Tensor) -> float:
        return float(torch.cdist(features, centroids).min(1).values.square().sum())

    ours = [error(fit_kmeans(features, 9, seed=seed)) for seed in range(5)]
    theirs = [fit_sklearn(points, 9, seed=seed).inertia_ for seed in range(5)]
    assert min(ours) < min(theirs) * 1.02
    assert sorted(ours)[2] < max(theirs) * 1.1
    assert torch.equal(fit_kmeans(features, 9, seed=3), fit_kmeans(features, 9, seed=3))
    assert not torch.equal(fit_kmeans(features, 9, seed=3), fit_kmeans(features, 9, seed=4))
    few = features[:5].repeat(3, 1)
    assert len(fit_kmeans(few, 5).unique(dim=0)) == 5
    with pytest.raises(ValueError, match="5 distinct frames cannot make 6 units"):
        fit_kmeans(few, 6)


def test_run_lengths_by_hand() -> None:
    clips = [torch.tensor([0, 0, 0, 2, 0]), torch.tensor([2, 2, 2])]
    assert mean_run_lengths(clips, 4).tolist() == [2.0, 1.0, 2.0, 1.0]
