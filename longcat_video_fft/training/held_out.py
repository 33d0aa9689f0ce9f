"""The loss on samples that are not trained on, at fixed timesteps with fixed noise.

Called by the training loop beside validation. A training loss jumps with the timesteps that chance
draws; this one differs between two steps, or two runs, by the weights alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longcat_video_fft.model.flow_matching import (
    NUM_TIMESTEPS,
    Noised,
    add_noise,
    make_generator,
    to_device,
)
from longcat_video_fft.model.loading import reshard
from longcat_video_fft.model.loss import sample_losses
from longcat_video_fft.training.distributed import all_sum

if TYPE_CHECKING:
    from torch import Tensor

    from longcat_video_fft.dataset.latents import Batch, LatentDataset
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.training.parallel import Engine

# Evenly over the noise levels, whatever shift or sampling a run trains with, so that runs compare.
TIMESTEPS = (100, 300, 500, 700, 900)


@torch.no_grad()
def held_out_loss(engine: Engine, dataset: LatentDataset, config: TrainConfig) -> dict[str, float]:
    """Returns {"eval/loss": the mean, "eval/loss_t100": that at timestep 100, ...}; {} without
    samples.

    Text-to-video, each sample with its own caption. All processes take part, with the same number
    of forwards, since those of sharded weights are collective; all get the same numbers, which do
    not depend on how many there are.
    """
    items = [(i, t) for i in range(len(dataset.held_out)) for t in TIMESTEPS]
    if not items:
        return {}
    sums = torch.zeros(2, len(items), dtype=torch.float64)  # losses, and how often each was found
    for start in range(0, len(items), engine.dp_size):
        place = start + engine.dp_rank
        # Where items run out, a repeat keeps the processes in step; it is not counted.
        index, timestep = items[min(place, len(items) - 1)]
        loss = forward_loss(engine, dataset.held_out_sample(index), timestep, config)
        if place < len(items):
            sums[:, place] = torch.tensor([float(loss), 1.0])
    reshard(engine.module)
    # Each loss has its own place, so that no order of adding changes a bit. Processes of one
    # context-parallel group find the same loss, which their number divides out.
    totals, counts = all_sum(sums)
    losses = (totals / counts).view(-1, len(TIMESTEPS))  # (samples, timesteps)
    metrics = {"eval/loss": float(losses.mean())}
    for timestep, loss in zip(TIMESTEPS, losses.mean(dim=0).tolist(), strict=True):
        metrics[f"eval/loss_t{timestep}"] = loss
    return metrics


def forward_loss(engine: Engine, batch: Batch, timestep: int, config: TrainConfig) -> Tensor:
    """Computes the loss of a batch of one; its noise depends on (seed, name, timestep) alone."""
    noised = prepare_fixed(batch, timestep, config.seed, engine.device)
    with engine.attention():
        prediction = engine.module(
            noised.hidden_states,
            noised.timestep,
            to_device(batch.caption_embeds, engine.device)[:, None],
            to_device(batch.caption_mask, engine.device),
            noised.num_cond_latents,
        )
    return sample_losses(prediction, noised)


def prepare_fixed(batch: Batch, timestep: int, seed: int, device: torch.device) -> Noised:
    """Noises a batch as flow_matching.prepare, without chance and without condition frames."""
    rows = [
        torch.randn(
            batch.latents.shape[1:], generator=make_generator(seed, "held out", name, timestep)
        )
        for name in batch.names
    ]
    num_rows, _, num_frames, _, _ = batch.latents.shape
    timesteps = torch.full((num_rows, num_frames), float(timestep))
    hidden_states, target = add_noise(
        to_device(batch.latents, device),
        to_device(torch.stack(rows), device),
        to_device(timesteps / NUM_TIMESTEPS, device),
    )
    return Noised(
        hidden_states=hidden_states,
        timestep=to_device(timesteps, device),
        target=target,
        num_cond_latents=0,
        keeps_caption=torch.ones(num_rows, dtype=torch.bool, device=device),
    )
