"""The loop: fetch, forward, backward, check, step, log, evaluate, save."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from longcat_video_fft.model.flow_matching import apply_caption_dropout, prepare
from longcat_video_fft.model.loss import sample_losses
from longcat_video_fft.training.distributed import (
    StopRequest,
    all_sum,
    ignore_sigterm,
    is_main_process,
)
from longcat_video_fft.training.meter import Meter
from longcat_video_fft.training.optimizer import lr_scale, set_lr

if TYPE_CHECKING:
    from collections.abc import Callable

    from longcat_video_fft.dataset.latents import Batch, LatentDataset
    from longcat_video_fft.model.flow_matching import Noised
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.training.checkpoint import Checkpointer
    from longcat_video_fft.training.parallel import Engine
    from longcat_video_fft.training.tracker import Tracker

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; every process stops before the step."""


def train(
    engine: Engine,
    dataset: LatentDataset,
    config: TrainConfig,
    *,
    checkpointer: Checkpointer,
    tracker: Tracker,
    evaluate: Callable[[int], dict[str, float]],
    start_step: int = 0,
) -> bool:
    """Trains to max_train_steps; returns False when a SIGTERM stopped it, after a checkpoint.

    `evaluate` makes the validation of a step; every process calls it.

    Raises:
        NonFiniteError: on every process, before the step that would have used the values.
    """
    last_step = config.max_train_steps
    batches = iter(_loader(engine, dataset, start_step, last_step))
    empty_embeds, empty_mask = dataset.empty_caption()
    empty = empty_embeds.to(engine.device), empty_mask.to(engine.device)
    meter = Meter(engine)
    stop = StopRequest()
    bar = tqdm(
        total=last_step, initial=start_step, desc="training", unit="step",
        disable=not is_main_process(), dynamic_ncols=True, mininterval=1.0,
    )  # fmt: skip
    global_step = start_step
    while global_step < last_step:
        meter.start_fetch()
        micro_batches = [next(batches) for _ in range(config.gradient_accumulation_steps)]
        meter.end_fetch()
        scale = lr_scale(
            global_step,
            total_steps=last_step,
            warmup_steps=config.lr_warmup_steps,
            kind=config.lr_scheduler,
        )
        lr = set_lr(engine.optimizer, scale)
        sums = train_step(engine, micro_batches, empty, global_step=global_step)
        global_step += 1
        bar.update()
        meter.add(micro_batches, sums)
        if global_step % config.logging_steps == 0 or global_step == last_step:
            metrics = meter.flush(lr, global_step)
            tracker.log(metrics, step=global_step)
            bar.set_postfix({"loss": f"{metrics['train/loss']:.3f}"})
        is_last = global_step == last_step
        must_stop = stop.is_requested()
        is_due = global_step % config.checkpointing_steps == 0
        if is_due or is_last or must_stop:
            stall = checkpointer.save(global_step)
            tracker.log({"speed/checkpoint_stall_s": stall}, step=global_step)
        checkpointer.poll()
        if must_stop:
            logger.warning(
                "stopped by a signal after step %d; resume with --resume_from_checkpoint latest",
                global_step,
            )
            break
        if global_step % config.validation_step_interval == 0 or is_last:
            metrics = evaluate(global_step)
            if metrics:
                tracker.log(metrics, step=global_step)
            meter.restart()
    bar.close()
    checkpointer.wait()
    return global_step == last_step


def train_step(
    engine: Engine,
    micro_batches: list[tuple[Batch, Noised]],
    empty: tuple[torch.Tensor, torch.Tensor],
    *,
    global_step: int,
) -> torch.Tensor:
    """Makes one optimizer step; returns the global (sum of losses, samples) as float64.

    A sample counts the same whatever its length: the loss is the mean over the global batch of
    each sample's mean, so that any split into processes and micro-batches gives one gradient.
    """
    samples = sum(len(batch.names) for batch, _ in micro_batches)
    sums = torch.tensor([0.0, float(samples)], dtype=torch.float64)
    count = all_sum(sums.clone())[1].item() / engine.config.context_parallel_size
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch, noised in micro_batches:
        noised = noised.to(engine.device)
        embeds, mask = apply_caption_dropout(batch, noised.keeps_caption, empty)
        with engine.attention():
            prediction = engine.module(
                noised.hidden_states, noised.timestep, embeds[:, None], mask,
                noised.num_cond_latents,
            )  # fmt: skip
            losses = sample_losses(prediction, noised)
            engine.backward(losses.sum() / count)
        total += losses.detach().sum()
    norm = engine.clip()
    sums[0] = total.item()  # the host waits here, and in clip, once a step
    sums = all_sum(sums) / engine.config.context_parallel_size
    where = f"at step {global_step + 1}"
    if not math.isfinite(sums[0].item()):
        raise NonFiniteError(
            f"the loss is {sums[0].item()} {where}; nothing was stepped. Lower the learning rate, "
            "or look at the data of this step; resume with --resume_from_checkpoint latest."
        )
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"the gradient norm is {norm} {where}; nothing was stepped. Lower the learning rate; "
            "resume with --resume_from_checkpoint latest."
        )
    engine.step()
    return sums


def with_noise(batch: Batch, config: TrainConfig) -> tuple[Batch, Noised]:
    """Adds the noise to a micro-batch in a loader's worker: the batch and its noise, on the CPU."""
    return batch, prepare(batch, config, torch.device("cpu"))


def _loader(
    engine: Engine, dataset: LatentDataset, start_step: int, stop_step: int
) -> DataLoader[Any]:
    config = engine.config
    # Accumulation step, then process: a global batch is the same on any number of devices.
    per_step = config.gradient_accumulation_steps * engine.dp_size
    first = start_step * per_step + engine.dp_rank
    return DataLoader(
        dataset,
        batch_size=None,  # an item is a micro-batch
        sampler=range(first, stop_step * per_step, engine.dp_size),
        collate_fn=partial(with_noise, config=config),  # pyright: ignore[reportArgumentType]
        num_workers=config.dataloader_num_workers,
        worker_init_fn=ignore_sigterm,
        generator=torch.Generator(),  # the default one's state must not depend on a resume
        pin_memory=engine.device.type == "cuda",
        persistent_workers=False,
    )
