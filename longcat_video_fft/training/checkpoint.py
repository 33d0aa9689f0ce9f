"""Checkpoints that are whole or absent, written while the training runs, for any number of GPUs.

    OUT/checkpoint-500/state/              parameters, optimizer, EMA (torch distributed checkpoint)
    OUT/checkpoint-500/trainer_state.json  global_step, identity, size of each file; written last

A save copies the state to host memory, which is all that the training waits for; a thread of each
process then writes it to `checkpoint-500.partial`. Its collectives go over a group of their own, so
the main thread's never meet them. The main process's thread is done when all are: it alone then
renames the folder and removes the oldest. A kill at any time leaves the last good one. Noise and
data are functions of the step, so no random state is kept. Several nodes need a shared disk.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from longcat_video_fft.options.hub import check_free_disk

if TYPE_CHECKING:
    from longcat_video_fft.options.config import TrainConfig

logger = logging.getLogger(__name__)

# Bytes of a parameter in a checkpoint: weight and both of Adam's averages.
CHECKPOINT_BYTES = {"adamw": 12, "adamw_bf16": 6, "adamw_8bit": 4}
EMA_BYTES = 4
EXPORT_BYTES = 2
LONGEST_SAVE = timedelta(hours=2)


def check_disk(model: Any, config: TrainConfig, output_dir: Path) -> None:
    """Checks that the checkpoints that will be kept, one being written and the export find room.

    Raises:
        ValueError: they do not; both numbers are named.
    """
    copies, size = plan_disk(sum(p.numel() for p in model.parameters()), config, output_dir)
    check_free_disk(
        output_dir,
        size,
        what=f"{copies} checkpoint(s) and the exported transformer",
        remedy="Lower checkpoints_total_limit, raise checkpointing_steps, or give another "
        "output_dir.",
    )


def plan_disk(num_parameters: int, config: TrainConfig, output_dir: Path) -> tuple[int, int]:
    """Returns (checkpoints still to make room for, bytes of them and of the export)."""
    size = CHECKPOINT_BYTES[config.optimizer] + (EMA_BYTES if config.ema_decay is not None else 0)
    copies = math.ceil(config.max_train_steps / config.checkpointing_steps)
    if config.checkpoints_total_limit:
        copies = min(copies, config.checkpoints_total_limit + 1)
    copies = max(0, copies - len(finished_checkpoints(output_dir)))
    return copies, num_parameters * (size * copies + EXPORT_BYTES)


def checkpoint_step(folder: Path) -> int | None:
    """Returns a finished checkpoint's step, else None: also where a file is cut or missing."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if found is None:
        return None
    try:
        sizes = read_trainer_state(folder)["files"]
        if all((folder / name).stat().st_size == size for name, size in sizes.items()):
            return int(found.group(1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def read_trainer_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))


def finished_checkpoints(output_dir: Path) -> list[Path]:
    """Returns finished checkpoints, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if checkpoint_step(p) is not None]
    return sorted(found, key=lambda p: checkpoint_step(p) or 0)


def find_checkpoint(spec: str | None, output_dir: Path) -> Path | None:
    """Finds what `resume_from_checkpoint` names: "latest" (None when there is none yet) or a
    folder.

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
            "with trainer_state.json and the files that it lists). Finished ones in "
            f"{output_dir}: "
            f"{', '.join(p.name for p in finished_checkpoints(output_dir)) or 'none'}."
        )
    return Path(spec)


class StateWriter(FileSystemWriter):
    """Names the disk's own error: torch's archive writer covers it with one of its own."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


class Checkpointer:
    """Saves without stopping the training. All processes call every method, at the same step.

    Args:
        keep_last: finished checkpoints to keep; None or 0: all.
        identity: the transformer's config, which a resumed run must share.
    """

    def __init__(
        self, engine: Any, output_dir: Path, *, keep_last: int | None, identity: dict[str, Any]
    ) -> None:
        self.engine = engine
        self.output_dir = output_dir
        self.keep_last = keep_last
        self.identity = make_identity(engine, identity)
        self.is_main = dist.get_rank() == 0
        self.group: Any = dist.new_group(backend="gloo", timeout=LONGEST_SAVE)
        self.has_gpu = engine.device.type == "cuda"
        # Pinned buffers that are kept from save to save, which torch 2.11's DefaultStager does not.
        self.stager = StateDictStager(pin_memory=self.has_gpu)
        if engine.optimizer.state:  # the buffers now, so that no save waits for them
            self._stage()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.step = -1  # of the last save
        if self.is_main:
            for left in output_dir.glob("checkpoint-*.partial"):
                shutil.rmtree(left)

    def save(self, global_step: int) -> float:
        """Begins to write OUT/checkpoint-STEP; returns the seconds that the training waited.

        Waits for the previous save first, and raises its error. Does nothing when the last save
        was of this step.
        """
        if global_step == self.step:
            return 0.0
        started = time.perf_counter()
        self.wait()
        self.step = global_step
        partial = self.output_dir / f"checkpoint-{global_step}.partial"
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier(group=self.group)
        staged = self._stage()
        self.pending = self.executor.submit(self._write, staged, partial, global_step)
        return time.perf_counter() - started

    def _stage(self) -> dict[str, Any]:
        """Copies the state to host memory."""
        staged = self.stager.stage(engine_state(self.engine), non_blocking=self.has_gpu)
        if self.has_gpu:
            torch.cuda.synchronize()
        return staged

    def poll(self) -> None:
        """Notes when the save under way is done, and raises its error; call it each step.

        Raises:
            OSError: on every process, at the same step.
        """
        if self.pending is not None:
            self._settle(is_done=self.pending.done())

    def wait(self) -> None:
        """Returns when the save under way is done; raises as `poll` does."""
        if self.pending is not None:
            self.pending.exception()  # waits
            self._settle(is_done=True)

    def drain(self) -> None:
        """Waits without a collective: for a run that ends by an error."""
        if self.pending is not None:
            self.pending.exception()

    def _settle(self, *, is_done: bool) -> None:
        """Ends the pending save on all processes, or on none."""
        assert self.pending is not None
        error = self.pending.exception() if is_done else None
        # The default group's: only the saving thread uses self.group while a save is under way.
        counts = torch.tensor([float(is_done), float(error is not None)])
        dist.all_reduce(counts)
        if counts[0] < dist.get_world_size():
            return
        self.pending = None
        if counts[1] > 0:
            texts: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(texts, None if error is None else explain(error))
            if self.is_main:
                partial = self.output_dir / f"checkpoint-{self.step}.partial"
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(self._describe_failure([text for text in texts if text is not None]))

    def _describe_failure(self, texts: list[str]) -> str:
        full = next((text for text in texts if "No space left" in text), None)
        remedy = "Look at the disk"
        if full is not None:
            remedy = "Free some space there or lower checkpoints_total_limit"
        good = finished_checkpoints(self.output_dir)
        last = f"the last good one is {good[-1]}" if good else "there is no earlier one"
        return (
            f"checkpoint-{self.step} could not be written to {self.output_dir}: "
            f"{full or texts[0]}; {last}. {remedy}, and resume with "
            "--resume_from_checkpoint latest."
        )

    def _write(self, staged: Any, partial: Path, global_step: int) -> None:
        """Writes in a thread, as torch's async_save, which in torch 2.11 gives up the buffers each
        time.

        The main process's return from `save` stands for all, since DCP collects what each has
        written: without another collective it makes the folder final.
        """
        writer = StateWriter(partial / "state", sync_files=True)
        save(staged, storage_writer=writer, process_group=self.group)
        if not self.is_main:
            return
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        state = {
            "global_step": global_step,
            "world_size": dist.get_world_size(),
            "identity": self.identity,
            "files": {str(path.relative_to(partial)): path.stat().st_size for path in files},
        }
        (partial / "trainer_state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        sync_to_disk(partial / "trainer_state.json", partial / "state", partial)
        folder = self.output_dir / f"checkpoint-{global_step}"
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_to_disk(self.output_dir)
        if self.keep_last:
            for old in finished_checkpoints(self.output_dir)[: -self.keep_last]:
                # No half-removed folder passes for a checkpoint: this file goes first.
                (old / "trainer_state.json").unlink()
                shutil.rmtree(old)
        logger.info("saved %s", folder)


def load_checkpoint(engine: Any, folder: Path, identity: dict[str, Any]) -> int:
    """Restores parameters, optimizer and EMA; returns the global step. All processes call it.

    Raises:
        ValueError: the checkpoint is another model's, or cannot be read.
    """
    state = read_trainer_state(folder)
    differences = compare(state["identity"], make_identity(engine, identity))
    if differences:
        raise ValueError(
            f"resume_from_checkpoint: {folder} is of another run: {'; '.join(differences)}. Resume "
            "with the options that wrote it, or start again in another output_dir."
        )
    tensors = engine_state(engine)
    try:
        load(tensors, checkpoint_id=folder / "state")  # in place
    except (RuntimeError, ValueError, KeyError, OSError, CheckpointException) as error:
        raise ValueError(
            f"{folder} cannot be read ({explain(error)}). Resume from an earlier checkpoint."
        ) from error
    return state["global_step"]


def engine_state(engine: Any) -> dict[str, Any]:
    """Returns the sharded tensors themselves by official names: what is read into them is
    loaded."""
    model, optimizer = get_state_dict(engine.module, engine.optimizer)
    # Without the optimizer's options, which are the config's. Torch makes states that are not there
    # yet, but not where someone has touched them: nothing would be read.
    states: Any = optimizer["state"]
    assert states
    assert all(states.values())
    state: dict[str, Any] = {"model": model, "optimizer": states}
    if engine.ema is not None:
        state["ema"] = engine.ema.state_dict()
    return state


def make_identity(engine: Any, transformer: dict[str, Any]) -> dict[str, Any]:
    """Returns what two runs must share, as JSON gives it back."""
    options = {key: value for key, value in transformer.items() if not key.startswith("_")}
    identity = {
        "transformer": options,
        "optimizer": engine.config.optimizer,
        "has_ema": engine.ema is not None,
    }
    return json.loads(json.dumps(identity, default=str))


def compare(there: Any, here: Any, path: str = "") -> list[str]:
    """Lists what differs between two JSON values, as `depth is 4 there, but 2 in this run`."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(name for name in here if name not in there)]
        found = [compare(there.get(n), here.get(n), f"{path}.{n}" if path else n) for n in names]
        return [line for lines in found for line in lines]
    return [] if there == here else [f"{path} is {there!r} there, but {here!r} in this run"]


def explain(error: BaseException) -> str:
    """Returns the first cause, in one line; DCP wraps it by process."""
    failures = getattr(error, "failures", None)
    if isinstance(error, CheckpointException) and failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"process {rank}: {explain(cause)}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def sync_to_disk(*paths: Path) -> None:
    """Flushes files and folders, so that no rename can outrun what is in them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
