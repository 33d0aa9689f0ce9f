"""The metrics of the steps between two log lines: loss, speed, memory. `loop.py` feeds it."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from longcat_video_fft.model.flops import forward_flops, peak_flops
from longcat_video_fft.training.distributed import all_sum

if TYPE_CHECKING:
    from longcat_video_fft.dataset.latents import Batch
    from longcat_video_fft.model.flow_matching import Noised
    from longcat_video_fft.training.parallel import Engine


class Meter:
    """Sums losses and speed between two log lines."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        name = torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu"
        self.peak = peak_flops(name)
        self.seconds_per_step = float("nan")
        self.sums = torch.zeros(2, dtype=torch.float64)
        self.restart()

    def restart(self) -> None:
        """Forgets the time since the last flush: it went elsewhere (validation)."""
        self.started = time.perf_counter()
        self.data_seconds = self.flops = 0.0
        self.sums.zero_()
        self.steps_since = 0

    def start_fetch(self) -> None:
        self.fetch_started = time.perf_counter()

    def end_fetch(self) -> None:
        self.data_seconds += time.perf_counter() - self.fetch_started

    def add(self, micro_batches: list[tuple[Batch, Noised]], sums: torch.Tensor) -> None:
        self.sums += sums
        self.steps_since += 1
        for batch, noised in micro_batches:
            frames, height, width = batch.latents.shape[2:]
            self.flops += 3 * len(batch.names) * forward_flops(
                self.engine.module.config,
                frames_latent=frames,
                height_latent=height,
                width_latent=width,
                text_tokens=batch.caption_embeds.shape[1],
                num_cond_latents=noised.num_cond_latents,
            )  # fmt: skip

    def flush(self, lr: float, global_step: int) -> dict[str, float]:
        """Returns metrics since the last flush, over all processes; times of this one."""
        engine = self.engine
        seconds = time.perf_counter() - self.started  # train_step has waited for the device
        loss_sum, samples = self.sums.tolist()
        flops = all_sum(torch.tensor([self.flops]).double()).item()
        flops /= engine.config.context_parallel_size
        step_s = seconds / self.steps_since
        # The first steps compile: an average that forgets them says when the run ends.
        settled = math.isnan(self.seconds_per_step) or step_s < self.seconds_per_step
        weight = 1.0 if settled else 0.1
        last = 0.0 if math.isnan(self.seconds_per_step) else self.seconds_per_step
        self.seconds_per_step = weight * step_s + (1 - weight) * last
        left = engine.config.max_train_steps - global_step
        metrics = {
            "train/loss": loss_sum / samples,
            "train/grad_norm": engine.grad_norm,
            "train/lr": lr,
            "speed/step_s": step_s,
            "speed/data_s": self.data_seconds / self.steps_since,
            "speed/compute_s": (seconds - self.data_seconds) / self.steps_since,
            "speed/samples_per_sec": samples / seconds,
            "speed/tflops_per_device": flops / seconds / dist.get_world_size() / 1e12,
            "speed/hours_left": left * self.seconds_per_step / 3600,
        }
        if self.peak is not None:
            metrics["speed/mfu"] = flops / seconds / (self.peak * dist.get_world_size())
            metrics["speed/peak_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
            metrics["speed/reserved_mem_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self.restart()
        return metrics
