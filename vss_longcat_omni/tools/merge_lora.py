"""Merges a LoRA adapter into the released folder: the same files, with the trained weights in them.

    python -m vss_longcat_omni.tools.merge_lora --base DIR --adapter ADAPTER --out OUT

It follows a training. What it makes is a base folder like the first one, for generate.py or a
further training. It writes one file after the other, atomically, with the adapter and one shard's
changed tensors in memory; a merge that was cut off continues when run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vss_longcat_omni.model.adapter import Change, apply_change, compute_digest, read_adapter
from vss_longcat_omni.model.loading import PART_FILES
from vss_longcat_omni.model.saving import find_part
from vss_longcat_omni.options.hub import check_free_disk, resolve_artifact

RECORD = "merged_from.json"  # in the merged folder: of what it was made, or is being made
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Job(NamedTuple):
    """Describes one file of the merged folder."""

    source: Path
    name: str  # within the merged folder
    keys: dict[str, str]  # of what changes: key in the file -> name in the model
    is_linked: bool  # to the source, in place of a copy
    num_bytes: int  # when written, but for a file's header


def merge(
    base: Path, adapter: Path, out: Path, *, dtype: torch.dtype | None = None, link: bool = False
) -> list[Job]:
    """Write the merged folder `out`, or what is still missing of it; return all its files.

    Changed weights are W + scale * B @ A in float32, rounded to `dtype` (None: as W is stored).
    Hidden files of the base are left out.

    Args:
        link: shards in which nothing changes become hard links to those of the base.

    Raises:
        ValueError: the adapter is no plain LoRA, does not fit the base, or has a tensor that the
            base has not, or has twice; `out` holds something else; the disk is too small.
    """
    if out.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"--out {out}: lies in the base folder. Choose one beside it.")
    changes = read_adapter(adapter)
    jobs = plan_jobs(base, changes, dtype=dtype, link=link)
    record = {
        "base": str(base.resolve()),
        "adapter_sha256": compute_digest(adapter),
        "dtype": str(dtype or "as stored"),
    }
    _check_record(out, record)
    todo = [job for job in jobs if not (out / job.name).is_file()]
    needed = sum(job.num_bytes for job in todo if not job.is_linked)
    check_free_disk(out, needed, what="the merged model")

    _write_record(out, record)
    total = sum(job.num_bytes for job in jobs)
    done = total - sum(job.num_bytes for job in todo)
    with tqdm(total=total, initial=done, desc="merging", unit="B", unit_scale=True) as bar:
        for job in todo:
            _run(job, changes, out, dtype=dtype)
            bar.update(job.num_bytes)
    return jobs


def plan_jobs(
    base: Path, changes: dict[str, Change], *, dtype: torch.dtype | None = None, link: bool = False
) -> list[Job]:
    """List every file of the merged folder and what changes in it; read no weights yet."""
    keys = find_keys(base, changes)
    jobs = []
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        is_hidden = any(part.startswith(".") for part in name.parts)
        # A pickle is left out where its part file is written as safetensors.
        is_replaced = name.suffix == ".pt" and path.with_suffix(".safetensors") in keys
        if not path.is_file() or is_hidden or is_replaced or name.name == RECORD:
            continue
        if path in keys:
            written = str(name.with_suffix(".safetensors"))
            num_bytes = _count_bytes(path, keys[path], dtype)
            jobs.append(Job(path, written, keys[path], False, num_bytes))
        else:
            is_linked = link and name.suffix == ".safetensors" and path.parent == base
            jobs.append(Job(path, str(name), {}, is_linked, path.stat().st_size))
    return jobs


def find_keys(base: Path, changes: dict[str, Change]) -> dict[Path, dict[str, str]]:
    """Find the files that change; for each, key in the file -> name in the model.

    Raises:
        ValueError: a changed tensor is in none of the base's files, or in two; or does not fit.
    """
    prefixes = dict.fromkeys(sorted(base.glob("*.safetensors")), "")
    if not prefixes:
        raise ValueError(f"{base}: no *.safetensors file: not a LongCat-Flash-Omni folder.")
    for part in {part for name in changes if (part := find_part(name)) is not None}:
        written = (base / part).with_suffix(".safetensors")  # counts where there are both
        prefixes[written if written.is_file() else base / part] = PART_FILES[part]
    places: dict[str, Path] = {}
    keys: dict[Path, dict[str, str]] = {}
    for path, prefix in prefixes.items():
        tensors = _read_tensors(path)[0] if path.is_file() else {}
        for key, tensor in tensors.items():
            name = prefix + key
            if name not in changes:
                continue
            if name in places:
                raise ValueError(f"{name} is in {places[name]} and again in {path}.")
            _check_fits(path, name, tensor, changes[name])
            places[name] = path
            keys.setdefault(path, {})[key] = name
    unused = sorted(changes.keys() - places.keys())
    if unused:
        raise ValueError(
            f"{base}: {len(unused)} tensors that the adapter changes are not there, first "
            f"{unused[0]}. The adapter is of another model, or the folder is incomplete."
        )
    return keys


def _check_fits(path: Path, name: str, stored: Tensor, change: Change) -> None:
    if tuple(stored.shape) != tuple(change.shape):
        raise ValueError(
            f"{path}: {name} has shape {tuple(stored.shape)}, but the adapter's is "
            f"{tuple(change.shape)}. The two are not of one model."
        )
    if stored.dtype not in DTYPES.values():
        raise ValueError(
            f"{path}: {name} is stored as {stored.dtype}. Merge into a folder with weights in "
            f"{', '.join(DTYPES)}."
        )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Map a weight file's tensors into memory, read when they are used; return its metadata too."""
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True), None
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path}: not readable ({error}). Download it again.") from error


def _count_bytes(path: Path, keys: dict[str, str], dtype: torch.dtype | None) -> int:
    sizes = 0
    for key, tensor in _read_tensors(path)[0].items():
        written = dtype if dtype is not None and key in keys else tensor.dtype
        sizes += tensor.numel() * written.itemsize
    return sizes


def _run(job: Job, changes: dict[str, Change], out: Path, *, dtype: torch.dtype | None) -> None:
    """Write one file atomically."""
    target = out / job.name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)  # perhaps a link to the base: nothing may be written into it
    if job.keys:
        tensors, metadata = _read_tensors(job.source)
        if job.source.suffix == ".pt":  # tensors of a pickle may share their memory
            tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        for key, name in job.keys.items():
            tensors[key] = apply_change(tensors[key], changes[name], dtype)
        save_file(tensors, partial, metadata)
    elif job.is_linked:
        try:
            os.link(job.source.resolve(), partial)
        except OSError as error:
            raise ValueError(f"--link: {error}. Leave it out: shards are copied then.") from error
    else:
        shutil.copyfile(job.source, partial)
    partial.replace(target)


def _check_record(out: Path, record: dict[str, str]) -> None:
    """Raise ValueError where `out` holds another merge, or anything else."""
    path = out / RECORD
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        other = sorted(key for key in record if found.get(key) != record[key])
        if other:
            raise ValueError(
                f"--out {out}: holds a merge with another {', '.join(other)} ({RECORD}). Remove "
                "the folder, or choose another."
            )
    elif out.exists() and not (out.is_dir() and all(p.suffix == ".partial" for p in out.iterdir())):
        raise ValueError(f"--out {out}: is there and holds no merge. Choose a new folder.")


def _write_record(out: Path, record: dict[str, str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(out / RECORD)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="merge a LoRA adapter into its base folder")
    parser.add_argument("--base", required=True, help="folder or hub id of the model trained on")
    parser.add_argument(
        "--adapter", required=True, help="output_dir of a training, or a checkpoint"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="the folder to make, or to continue"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of the changed tensors (default: as in the base)"
    )
    parser.add_argument(
        "--link", action="store_true", help="hard links in place of copies of unchanged shards"
    )
    options = parser.parse_args(argv)
    try:
        base = resolve_artifact(options.base, field="base")
        adapter = resolve_artifact(options.adapter, field="adapter")
        dtype = DTYPES.get(options.dtype)
        jobs = merge(base, adapter, options.out, dtype=dtype, link=options.link)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    num_changed = sum(len(job.keys) for job in jobs)
    sys.stdout.write(f"{options.out}: {len(jobs)} files, {num_changed} tensors changed\n")


if __name__ == "__main__":
    main()
