"""Writes checkpoints atomically, keeps the newest few, and resumes from them exactly.

    OUT/checkpoint-500/state/              parameters and optimizer (distributed checkpoint)
    OUT/checkpoint-500/rng-00000.pt        random state of each process
    OUT/checkpoint-500/trainer_state.json  global_step, written last

A checkpoint is written under `checkpoint-500.partial` and renamed when every process is done, so a
kill at any time leaves the last good one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from llama_omni.options.hub import check_free_disk
from llama_omni.training.distributed import is_main_process

if TYPE_CHECKING:
    from llama_omni.options.config import TrainConfig


# Bytes of a trained parameter in a checkpoint: weight and both moments.
CHECKPOINT_BYTES = {"fp32_master": 12, "bf16_stochastic": 6, "8bit": 4}


def check_disk(model: Any, config: TrainConfig, output_dir: Path) -> None:
    """Checks that there is room for the checkpoints kept, one being written and final_model.

    Raises:
        ValueError: they do not; both numbers are named.
    """
    counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, is_trained in counts if is_trained)
    copies = 0
    if config.save_strategy != "no":
        copies = (config.save_total_limit or 1) + 1 - len(finished_checkpoints(output_dir))
    needed = trained * CHECKPOINT_BYTES[config.optimizer_precision] * max(copies, 0)
    needed += sum(count for count, _ in counts) * (2 if config.bf16 else 4)
    check_free_disk(
        output_dir,
        needed,
        what=f"{max(copies, 0)} checkpoint(s) and final_model",
        remedy="Lower save_total_limit, set save_strategy to no, or give another output_dir.",
    )


def checkpoint_step(folder: Path) -> int | None:
    """Returns the step of a finished checkpoint folder, else None."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if found is None or not (folder / "trainer_state.json").is_file():
        return None
    return int(found.group(1))


def finished_checkpoints(output_dir: Path) -> list[Path]:
    """Lists finished checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if checkpoint_step(p) is not None]
    return sorted(found, key=lambda p: checkpoint_step(p) or 0)


def find_checkpoint(spec: str | None, output_dir: Path) -> Path | None:
    """Returns what `resume_from_checkpoint` names: "latest" (None without any) or a folder.

    Raises:
        ValueError: the folder is no finished checkpoint.
    """
    if spec is None:
        return None
    if spec == "latest":
        found = finished_checkpoints(output_dir)
        return found[-1] if found else None
    if checkpoint_step(Path(spec)) is None:
        raise ValueError(
            f"resume_from_checkpoint={spec!r}: not a finished checkpoint folder (checkpoint-STEP "
            f"with trainer_state.json). Finished ones in {output_dir}: "
            f"{', '.join(p.name for p in finished_checkpoints(output_dir)) or 'none'}."
        )
    return Path(spec)


def save_checkpoint(
    engine: Any, output_dir: Path, global_step: int, *, keep_last: int | None
) -> Path:
    """Writes OUT/checkpoint-STEP; all processes call it."""
    folder = output_dir / f"checkpoint-{global_step}"
    partial = output_dir / f"checkpoint-{global_step}.partial"
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save(partial)
    torch.save(rng_state(), partial / f"rng-{dist.get_rank():05d}.pt")
    dist.barrier()
    if is_main_process():
        state = {"global_step": global_step, "world_size": dist.get_world_size()}
        (partial / "trainer_state.json").write_text(json.dumps(state))
        sync_to_disk(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in finished_checkpoints(output_dir)[: -keep_last if keep_last else 0]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return folder


def load_checkpoint(engine: Any, folder: Path) -> int:
    """Restores parameters, optimizer and random state; returns the global step."""
    engine.load(folder)
    rng_file = folder / f"rng-{dist.get_rank():05d}.pt"
    if rng_file.is_file():  # absent when resumed on more processes than wrote it
        set_rng_state(torch.load(rng_file, weights_only=True))
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


def rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def sync_to_disk(folder: Path) -> None:
    """Flushes every file below `folder`, so that the rename cannot outrun the data."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
