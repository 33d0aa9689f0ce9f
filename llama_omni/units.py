"""Speech -> discrete units, the targets of stage 2: an offline step before training.

    python -m llama_omni.units fit DATA OUT.safetensors --num_units 100
    python -m llama_omni.units extract DATA --kmeans_model_path K --cache_dir DIR [--hubert H]
    python -m llama_omni.units convert IN.bin OUT.safetensors

`fit` makes the embedded log-mel units from the answers' speech of DATA (a dataset file or folder);
`extract` writes the units of those answers to a cache, which stage 2 reads: it goes on where it
was stopped, and takes several processes. Features come from `speech/hubert.py` or
`speech/log_mel.py`, centres from `speech/kmeans.py`, the cache is `speech/unit_cache.py`'s.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llama_omni.options.hub import resolve_artifact
from llama_omni.speech.audio import load_audio
from llama_omni.speech.hubert import MHUBERT_URL, full_float32, load_hubert
from llama_omni.speech.kmeans import KMeans, fit_log_mel, read_kmeans, save_kmeans
from llama_omni.speech.log_mel import LogMelFeatures
from llama_omni.speech.unit_cache import UnitCache, load_unit_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Quantizer", "extract_units", "load_quantizer", "load_unit_cache"]

logger = logging.getLogger("llama_omni.units")

SHOWN_FILES = 5


class Features(Protocol):
    """What `hubert.HubertFeatures` and `log_mel.LogMelFeatures` have in common."""

    dim: int
    identity: str

    def __call__(self, waveform: Tensor) -> Tensor:
        """(num_samples,) at 16 kHz -> (T, dim), 50 a second."""
        ...


class Quantizer:
    """Waveform -> units. `num_units` is the size of their vocabulary."""

    def __init__(self, features: Features, kmeans: KMeans) -> None:
        self.features = features
        self.kmeans = kmeans
        self.num_units = kmeans.num_units
        # What makes units comparable; a cache of units made otherwise is refused.
        self.identity = {
            "num_units": kmeans.num_units,
            "kmeans_sha256": kmeans.digest,
            "features": features.identity,
        }

    @torch.no_grad()
    def assign(self, waveform: Tensor) -> Tensor:
        """(num_samples,) at 16 kHz -> (T,) unit of every frame, on the CPU."""
        with full_float32():
            return self.kmeans.assign(self.features(waveform)).cpu()

    def extract(self, waveform: Tensor) -> list[int]:
        """(num_samples,) at 16 kHz -> its units, equal neighbours merged.

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
    """Centres with the features they were fitted on.

    Args:
        kmeans_path: the released .bin or any joblib file of scikit-learn's k-means, or our
            .safetensors of either kind.
        hubert_path: a Hugging Face folder or fairseq .pt, for centres over mHuBERT.
        unit_backend: "fairseq" runs fairseq's own network, to compare.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no mHuBERT for centres that need it, or one of another width.
    """
    kmeans = read_kmeans(kmeans_path)
    if kmeans.features == "log_mel":
        features, source = LogMelFeatures(device=device), "the log-mel frames of this program"
    else:
        if hubert_path is None:
            raise ValueError(
                f"{kmeans_path}: these centres are over mHuBERT features, so hubert_model_path "
                f"(--hubert) is needed: a folder, or the file {MHUBERT_URL}. For units without it, "
                "fit your own: `python -m llama_omni.units fit`."
            )
        features = load_hubert(hubert_path, device=device, unit_backend=unit_backend)
        source = str(hubert_path)
    width = kmeans.centroids.shape[1]
    if width != features.dim:
        raise ValueError(
            f"{kmeans_path}: its centres are {width} wide, but the features of {source} are "
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

    Each of `world_size` processes calls it with the same `paths`. It may be killed at any moment
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
            f"{cache_dir}; mend or leave out these and run again."
        )


def read_answer_paths(data_path: Path) -> list[Path]:
    """Speech files of all answers of a dataset; bad records are logged and left out.

    Raises:
        ValueError: no answer has speech.
    """
    from llama_omni.dataset.records import read_records

    records, bad = read_records(data_path, needs_units=None)
    for record in bad[:SHOWN_FILES]:
        logger.warning("left out: %s", record)
    if len(bad) > SHOWN_FILES:
        logger.warning("left out: %d more records", len(bad) - SHOWN_FILES)
    paths = {turn.answer_speech_path for record in records for turn in record.turns}
    found = sorted(path for path in paths if path is not None)
    if not found:
        raise ValueError(f"{data_path}: no record has answer speech (speech_response_path)")
    return found


def _extract_share(args: argparse.Namespace, paths: list[Path], rank: int) -> None:
    """One process of `extract`."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    device = args.device
    if device == "cuda":
        device = f"cuda:{rank % max(1, torch.cuda.device_count())}"
    elif args.num_processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.num_processes))
    quantizer = load_quantizer(
        args.kmeans_model_path,
        hubert_path=args.hubert,
        device=device,
        unit_backend=args.unit_backend,
    )
    extract_units(paths, quantizer, args.cache_dir, rank=rank, world_size=args.num_processes)


def _extract(args: argparse.Namespace) -> str:
    args.kmeans_model_path = resolve_artifact(args.kmeans_model_path, field="kmeans_model_path")
    args.hubert = args.hubert and resolve_artifact(args.hubert, field="hubert")
    paths = read_answer_paths(args.data)
    if args.num_processes == 1:
        _extract_share(args, paths, 0)
    else:
        with ProcessPoolExecutor(args.num_processes, mp_context=get_context("spawn")) as pool:
            shares = [
                pool.submit(_extract_share, args, paths, rank) for rank in range(args.num_processes)
            ]
        for share in shares:
            share.result()
    units = load_unit_cache(args.cache_dir)
    return f"{len(units)} clips, {sum(map(len, units.values()))} units in {args.cache_dir}"


def _fit(args: argparse.Namespace) -> str:
    paths = read_answer_paths(args.data)
    kmeans = fit_log_mel(paths, args.num_units, seed=args.seed, max_hours=args.max_hours)
    save_kmeans(args.out, kmeans)
    return f"{kmeans.num_units} log-mel units in {args.out}; set unit_vocab_size to that number"


def _convert(args: argparse.Namespace) -> str:
    kmeans = read_kmeans(args.source)
    save_kmeans(args.out, kmeans)
    count, width = kmeans.centroids.shape
    return f"{count} centres, {width} wide, over {kmeans.features}, in {args.out}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_omni.units", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True)

    def add(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    fit = add("fit", _fit, "log-mel units from the answers' speech of a dataset")
    fit.add_argument("data", type=Path, help="dataset file or folder")
    fit.add_argument("out", type=Path, help="the k-means file to write (.safetensors)")
    fit.add_argument("--num_units", type=int, default=100)
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--max_hours", type=float, default=1.0, help="speech to look at")
    extract = add("extract", _extract, "units of the answers' speech of a dataset, into a cache")
    extract.add_argument("data", type=Path, help="dataset file or folder")
    extract.add_argument("--kmeans_model_path", required=True, help="file, or hub id:file")
    extract.add_argument("--cache_dir", type=Path, required=True)
    extract.add_argument("--hubert", help="mHuBERT: folder, fairseq .pt, or hub id")
    extract.add_argument("--num_processes", type=int, default=1, help="shared among the GPUs")
    extract.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    extract.add_argument(
        "--unit_backend", choices=("transformers", "fairseq"), default="transformers"
    )
    convert = add("convert", _convert, "a joblib k-means file as safetensors")
    convert.add_argument("source", type=Path)
    convert.add_argument("out", type=Path)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        done = args.run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{done}\n")


if __name__ == "__main__":
    main()
