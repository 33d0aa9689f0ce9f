"""Makes discrete units of speech, the targets of stage 2: an offline step before training.

    python -m llama_omni.units fit DATA OUT.safetensors --num_units 100
    python -m llama_omni.units extract DATA --kmeans_model_path K --cache_dir DIR [--hubert H]
    python -m llama_omni.units convert IN.bin OUT.safetensors

`fit` makes the embedded log-mel units from the answers' speech of DATA (a dataset file or folder);
`extract` writes the units of those answers to a cache, which stage 2 reads: it continues where it
was stopped, and takes several processes. `speech/quantizer.py` makes the units, `speech/kmeans.py`
the centroids, the cache is `speech/unit_cache.py`'s.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from llama_omni.options.hub import resolve_artifact
from llama_omni.speech.kmeans import fit_log_mel, read_kmeans, save_kmeans
from llama_omni.speech.quantizer import SHOWN_FILES, extract_units, load_quantizer
from llama_omni.speech.unit_cache import load_unit_cache

logger = logging.getLogger("llama_omni.units")


def read_answer_paths(data_path: Path) -> list[Path]:
    """Lists the speech files of all answers of a dataset; bad records are logged and left out.

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
    """Runs one process of `extract`."""
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
    return f"{count} centroids, {width} wide, over {kmeans.features}, in {args.out}"


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
