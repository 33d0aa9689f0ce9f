"""Runs the loop of both stages: fetch, forward, backward, check, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from llama_omni.dataset.sampler import MicroBatches, steps_per_epoch
from llama_omni.training.checkpoint import save_checkpoint
from llama_omni.training.distributed import (
    StopRequest,
    all_sum,
    ignore_sigterm,
    is_main_process,
)
from llama_omni.training.meter import Meter, NonFiniteError
from llama_omni.training.optimizer import lr_scale, set_lr

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llama_omni.dataset.batch import Batch
    from llama_omni.options.config import TrainConfig
    from llama_omni.training.meter import Objective
    from llama_omni.training.tracker import Tracker

logger = logging.getLogger(__name__)


def total_steps(config: TrainConfig, num_samples: int, world_size: int) -> tuple[int, int]:
    """Returns (steps of the run, steps an epoch)."""
    global_batch = config.per_device_train_batch_size * world_size
    global_batch *= config.grad_accum_steps(world_size)
    per_epoch = steps_per_epoch(num_samples, global_batch, drop_last=config.dataloader_drop_last)
    if per_epoch == 0:
        raise ValueError(
            f"{num_samples} samples are fewer than a global batch of {global_batch}, and "
            "dataloader_drop_last=true drops it. Set it to false or lower the batch size."
        )
    if config.max_steps > 0:
        return config.max_steps, per_epoch
    return math.ceil(per_epoch * config.num_train_epochs), per_epoch


def train(
    engine: Any,
    objective: Objective,
    train_set: Any,
    eval_set: Any | None,
    config: TrainConfig,
    *,
    collate: Callable[[list[Any]], Batch],
    output_dir: Path,
    tracker: Tracker,
    start_step: int = 0,
) -> bool:
    """Trains to the end of the schedule; False when a SIGTERM stopped it, after a checkpoint.

    Raises:
        NonFiniteError: on every process, before the step that would have used the values.
    """
    world_size = dist.get_world_size()
    accum_steps = config.grad_accum_steps(world_size)
    last_step, per_epoch = total_steps(config, len(train_set), world_size)
    sampler = MicroBatches(
        len(train_set),
        micro_batch_size=config.per_device_train_batch_size,
        accum_steps=accum_steps,
        rank=dist.get_rank(),
        world_size=world_size,
        start_step=start_step,
        stop_step=last_step,
        seed=config.seed,
        drop_last=config.dataloader_drop_last,
    )
    batches = iter(_load_batches(train_set, sampler, config, collate))
    meter = Meter(engine, config, objective)
    stop = StopRequest()
    bar = tqdm(
        total=last_step, initial=start_step, desc=f"stage {config.stage}", unit="step",
        disable=not is_main_process(), dynamic_ncols=True, mininterval=1.0,
    )  # fmt: skip
    global_step = start_step
    while global_step < last_step:
        meter.start_fetch()
        micro_batches = [next(batches).to(engine.device) for _ in range(accum_steps)]
        meter.end_fetch()
        scale = lr_scale(
            global_step,
            total_steps=last_step,
            warmup_steps=math.ceil(last_step * config.warmup_ratio),
            kind=config.lr_scheduler_type,
        )
        lr = set_lr(engine.optimizer, scale)
        sums = train_step(engine, objective, micro_batches, global_step=global_step)
        global_step += 1
        bar.update()
        meter.add(micro_batches, sums)
        is_last = global_step == last_step
        if global_step % config.logging_steps == 0 or is_last:
            metrics = meter.flush(lr)
            tracker.log(metrics, step=global_step)
            bar.set_postfix({"loss": f"{metrics['train/loss']:.3f}"})
        place = {"ends_epoch": global_step % per_epoch == 0, "is_last": is_last}
        if eval_set is not None and _is_due(
            config.evaluation_strategy, global_step, config.eval_steps, **place
        ):
            metrics = evaluate(engine, objective, eval_set, config, collate=collate)
            tracker.log(metrics, step=global_step)
        must_stop = stop.is_requested()
        if must_stop or _is_due(config.save_strategy, global_step, config.save_steps, **place):
            save_checkpoint(engine, output_dir, global_step, keep_last=config.save_total_limit)
        if must_stop:
            logger.warning(
                "stopped by a signal after step %d; continue with --resume_from_checkpoint latest",
                global_step,
            )
            break
    bar.close()
    return global_step == last_step


def train_step(
    engine: Any, objective: Objective, micro_batches: list[Batch], *, global_step: int
) -> torch.Tensor:
    """Takes an optimizer step; returns global (loss sum, count, correct, predicted) in float64.

    The loss is divided by the global count, so that any split of the global batch into processes
    and micro-batches gives the same gradient.
    """
    count = sum(objective.count(batch) for batch in micro_batches)
    global_count = all_sum(torch.tensor([float(count)], dtype=torch.float64))[0].item()
    sums = torch.zeros(4, dtype=torch.float64)
    sums[1] = count
    for i, batch in enumerate(micro_batches):
        with engine.autocast():
            out = engine.model(batch, objective.task)
        scaled = out.loss * (objective.weight / max(global_count, 1.0))
        engine.backward(scaled, is_last=i == len(micro_batches) - 1)
        sums[0] += out.loss.detach().double().cpu()
        sums[2] += out.num_correct.cpu()
        sums[3] += out.num_predicted.cpu()
    sums = all_sum(sums)
    where = f"at step {global_step + 1}"
    if not math.isfinite(sums[0].item()):
        raise NonFiniteError(
            f"the loss is {sums[0].item()} {where}; nothing was stepped. Lower the learning rate, "
            "or look at the data of this step; resume with --resume_from_checkpoint latest."
        )
    # A zero loss alone may be an overfit set; with answers that have no path it is not.
    impossible = float(sum(objective.infeasible(batch)[1] for batch in micro_batches))
    if sums[0].item() == 0 and all_sum(torch.tensor([impossible])).item() > 0:
        raise ValueError(
            f"every loss {where} was exactly zero: no {objective.unit} can be learned (targets "
            "longer than their frames?). Run `python -m llama_omni.data_utils check DATA`."
        )
    engine.grad_norm = engine.clip_and_step()
    if not math.isfinite(engine.grad_norm):
        raise NonFiniteError(
            f"the gradient norm is {engine.grad_norm} {where}; nothing was stepped. Lower the "
            "learning rate; resume with --resume_from_checkpoint latest."
        )
    return sums


@torch.no_grad()
def evaluate(
    engine: Any, objective: Objective, eval_set: Any, config: TrainConfig, *, collate: Any
) -> dict[str, float]:
    """Returns mean loss and ratio over the whole evaluation set; all processes call it."""
    world_size, size = dist.get_world_size(), config.per_device_eval_batch_size
    sampler = MicroBatches(
        len(eval_set),
        micro_batch_size=size,
        accum_steps=1,
        rank=dist.get_rank(),
        world_size=world_size,
        start_step=0,
        stop_step=steps_per_epoch(len(eval_set), size * world_size, drop_last=False),
        seed=0,
        shuffle=False,
    )
    sums = torch.zeros(4, dtype=torch.float64)
    engine.module.eval()
    for batch in _load_batches(eval_set, sampler, config, collate):
        with engine.autocast():
            out = engine.model(batch.to(engine.device), objective.task)
        sums[0] += out.loss.double().cpu()
        sums[1] += objective.count(batch)
        sums[2] += out.num_correct.cpu()
        sums[3] += out.num_predicted.cpu()
    engine.module.train()
    sums = all_sum(sums)
    return {
        "eval/loss": (sums[0] / sums[1].clamp(min=1)).item(),
        f"eval/{objective.ratio}": (sums[2] / sums[3].clamp(min=1)).item(),
    }


def _is_due(strategy: str, step: int, every: int, *, ends_epoch: bool, is_last: bool) -> bool:
    """Returns whether to evaluate or save after `step`; the last step counts with either."""
    is_due = {"no": False, "steps": step % every == 0, "epoch": ends_epoch}[strategy]
    return is_due or (is_last and strategy != "no")


def _load_batches(
    dataset: Any, sampler: MicroBatches, config: TrainConfig, collate: Any
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,  # pyright: ignore[reportArgumentType]
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=ignore_sigterm,
        generator=torch.Generator(),  # the default one's state must not depend on a resume
        pin_memory=config.dataloader_pin_memory and torch.cuda.is_available(),
    )
