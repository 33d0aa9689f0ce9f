"""Speed and memory of the training at the released config, on the GPUs at hand.

    python -m tests.benchmarks.longcat_video_fft.measure_training --depth 4 --steps 4 [--key value]
    torchrun --nproc_per_node 2 -m tests.benchmarks.longcat_video_fft.measure_training --steps 20

Random weights, one random sample repeated, through the engine and `train_step` of the training.
Options of training_config.json go through as `--key value`. A line a step, and one of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from longcat_video_fft.dataset.latents import Batch
from longcat_video_fft.model.flops import forward_flops
from longcat_video_fft.model.flow_matching import prepare
from longcat_video_fft.model.loading import load_weights
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.buckets import Bucket
from longcat_video_fft.options.config import (
    TYPES,
    TrainConfig,
    check_values,
    parse_text,
    parse_words,
)
from longcat_video_fft.options.config_rules import check_world
from longcat_video_fft.plan.memory import model_sizes, predict_memory
from longcat_video_fft.training.checkpoint import Checkpointer, load_checkpoint
from longcat_video_fft.training.loop import train_step
from longcat_video_fft.training.optimizer import set_lr
from longcat_video_fft.training.parallel import Engine, init_processes, is_main_process
from tests.demos.longcat_video_fft.trial import say

if TYPE_CHECKING:
    from collections.abc import Callable

PEAK = 989e12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, default=93)
    parser.add_argument("--profile", default=None, help="write a table of kernels here")
    parser.add_argument("--checkpoint", default=None, help="save and resume in this folder")
    args, rest = parser.parse_known_args()
    given = {key: parse_text(key, text) for key, text in parse_words(rest).items()}
    options = check_values(given, TYPES, "the command line")
    config = TrainConfig(
        **{"gradient_accumulation_steps": 1, "transformer_init": "random", **options}
    )
    device = init_processes()
    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = LongCatVideoTransformer3DModel(depth=args.depth, text_tokens_zero_pad=True)
    world = check_world(config, dist.get_world_size())
    memory = predict_memory(config, model_sizes(model), world, Bucket(args.frames, 480, 832))
    started = time.perf_counter()
    engine = Engine(
        model, config, device,
        fill=lambda m: load_weights(m, None, seed=0, init="random"),
    )  # fmt: skip
    torch.cuda.synchronize()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "gpus": dist.get_world_size(), "depth": args.depth,
        "options": options, "predicted_gib": round(memory.peak / 2**30, 2),
        "attention": engine.attention_mechanism, "init_s": round(time.perf_counter() - started, 1),
        "state_gib": round(torch.cuda.memory_allocated() / 2**30, 2),
    }  # fmt: skip
    measure(engine, config, args, result)
    if is_main_process():
        say(json.dumps(result) + "\n")
    dist.destroy_process_group()


def measure(engine: Engine, config: TrainConfig, args: Any, result: dict[str, Any]) -> None:
    batch = make_batch(args.frames, position=engine.dp_rank)
    empty = (batch.caption_embeds[:1] * 0, batch.caption_mask[:1])
    flops = 3 * forward_flops(
        engine.module.config,
        frames_latent=batch.latents.shape[2],
        height_latent=60,
        width_latent=104,
    )
    losses: list[float] = []
    seconds: list[float] = []

    def do_step(step: int) -> None:
        set_lr(engine.optimizer, min(1.0, (step + 1) / 5))
        noised = prepare(batch, config, torch.device("cpu"))
        torch.cuda.synchronize()
        started = time.perf_counter()
        sums = train_step(engine, [(batch, noised)], empty, global_step=step)
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - started, 3))
        losses.append(round(sums[0].item() / sums[1].item(), 6))
        if is_main_process():  # a run that is stopped has shown what it did
            peak = torch.cuda.max_memory_allocated() / 2**30
            say(f"step {step}: {seconds[-1]} s, loss {losses[-1]}, peak {peak:.2f} GiB\n")

    for step in range(args.steps):
        do_step(step)
    step_s = sorted(seconds[1:])[len(seconds[1:]) // 2]
    result |= {
        "step_s": step_s, "all_step_s": seconds, "loss": losses,
        "mfu": round(flops / config.context_parallel_size / step_s / PEAK, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "grad_norm": engine.grad_norm,
    }  # fmt: skip
    if args.checkpoint:
        folder = Path(args.checkpoint)
        result["checkpoint"] = measure_checkpoint(engine, folder, args.steps, do_step)
        result["losses_before_and_after_resume"] = losses[args.steps :]
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            do_step(args.steps)
        table = profiler.key_averages().table(
            sort_by="cuda_time_total", row_limit=40, max_name_column_width=100
        )
        Path(args.profile).write_text(table, encoding="utf-8")


def measure_checkpoint(
    engine: Engine, folder: Path, step: int, do_step: Callable[[int], None]
) -> dict[str, float]:
    """Saves, goes on for two steps meanwhile, resumes, and does the two steps again."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = dict(engine.module.config)
    checkpointer = Checkpointer(engine, folder, keep_last=1, identity=identity)
    started = time.perf_counter()
    stall = checkpointer.save(step)
    for later in range(step, step + 2):
        do_step(later)
    checkpointer.wait()
    written = time.perf_counter() - started
    started = time.perf_counter()
    load_checkpoint(engine, folder / f"checkpoint-{step}", identity)
    loaded = time.perf_counter() - started
    for later in range(step, step + 2):
        do_step(later)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "stall_s": round(stall, 2), "written_s": round(written, 1), "load_s": round(loaded, 1),
        "checkpoint_gb": round(size / 1e9, 2),
    }  # fmt: skip


def make_batch(frames: int, *, position: int) -> Batch:
    """One random sample of 480x832."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, 16, (frames - 1) // 4 + 1, 60, 104)
    return Batch(
        names=["sample"],
        bucket=Bucket(frames, 480, 832),
        latents=torch.randn(shape, generator=generator).bfloat16(),
        caption_embeds=torch.randn(1, 512, 4096, generator=generator).bfloat16(),
        caption_mask=torch.arange(512)[None] < 150,
        position=position,
    )


if __name__ == "__main__":
    main()
