"""Speed and memory of the training at the released config, on the GPUs at hand.

    python -m tests.benchmarks.longcat_video_fft.measure_training --depth 4 --steps 4 [--key value]
    torchrun --nproc_per_node 2 -m tests.benchmarks.longcat_video_fft.measure_training --steps 20

Random weights, one random sample repeated, through the engine and `train_step` of the training;
each micro-batch of a step has noise of its own, the same for any layout of one global batch.
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
from longcat_video_fft.options.config import TYPES, TrainConfig
from longcat_video_fft.options.config_rules import check_world
from longcat_video_fft.options.parsing import check_values, parse_argv, parse_text
from longcat_video_fft.plan.memory import model_sizes, predict_memory
from longcat_video_fft.training.checkpoint import Checkpointer, load_checkpoint
from longcat_video_fft.training.distributed import init_processes, is_main_process
from longcat_video_fft.training.loop import train_step
from longcat_video_fft.training.optimizer import set_lr
from longcat_video_fft.training.parallel import Engine
from tests.demos.longcat_video_fft.end_to_end import say

if TYPE_CHECKING:
    from collections.abc import Callable

PEAK = 989e12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, default=48)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, default=93)
    parser.add_argument("--profile", default=None, help="tables of kernels: PROFILE-rankN.txt")
    parser.add_argument("--checkpoint", default=None, help="save and resume in this folder")
    parser.add_argument("--resume", default=None, help="begin at this checkpoint, of any layout")
    args, rest = parser.parse_known_args()
    given = {key: parse_text(key, text, TYPES) for key, text in parse_argv(rest).items()}
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
        load_weights=lambda m: load_weights(m, None, seed=0, init="random"),
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
    accum_steps = config.gradient_accumulation_steps
    batches = [
        make_batch(args.frames, position=i * engine.dp_size + engine.dp_rank)
        for i in range(accum_steps)
    ]
    empty = (batches[0].caption_embeds[:1] * 0, batches[0].caption_mask[:1])
    frames_latent = batches[0].latents.shape[2]
    flops = accum_steps * 3 * forward_flops(
        engine.module.config, frames_latent=frames_latent, height_latent=60, width_latent=104
    )  # fmt: skip
    losses: list[float] = []
    seconds: list[float] = []

    def do_step(step: int) -> None:
        set_lr(engine.optimizer, min(1.0, (step + 1) / 5))
        micro_batches = [(batch, prepare(batch, config, torch.device("cpu"))) for batch in batches]
        torch.cuda.synchronize()
        started = time.perf_counter()
        sums = train_step(engine, micro_batches, empty, global_step=step)
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - started, 3))
        losses.append(round(sums[0].item() / sums[1].item(), 6))
        if is_main_process():  # a run that is stopped has shown what it did
            peak = torch.cuda.max_memory_allocated() / 2**30
            say(f"step {step}: {seconds[-1]} s, loss {losses[-1]}, peak {peak:.2f} GiB\n")

    first = 0
    if args.resume:
        first = load_checkpoint(engine, Path(args.resume), dict(engine.module.config))
    for step in range(first, first + args.steps):
        do_step(step)
    step_s = sorted(seconds[1:])[len(seconds[1:]) // 2]
    flops_per_gpu = flops / config.context_parallel_size / step_s
    result |= {
        "step_s": step_s, "all_step_s": seconds, "loss": losses,
        "sample_s": round(step_s / accum_steps, 3),  # of a GPU, or of those that share a sample
        "mfu": round(flops_per_gpu / PEAK, 4), "tflops_per_gpu": round(flops_per_gpu / 1e12, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "grad_norm": engine.grad_norm,
    }  # fmt: skip
    if args.checkpoint:
        folder = Path(args.checkpoint)
        result["checkpoint"] = measure_checkpoint(engine, folder, args.steps, do_step)
        result["losses_before_and_after_resume"] = losses[args.steps :]
    if args.profile:
        result["exchange_s"] = profile_step(lambda: do_step(first + args.steps), args.profile)


def profile_step(do_step: Callable[[], None], name: str) -> dict[str, float]:
    """Profiles one more step; its kernels go to NAME-rankN.txt."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        do_step()
    table = profiler.key_averages().table(
        sort_by="cuda_time_total", row_limit=40, max_name_column_width=100
    )
    Path(f"{name}-rank{dist.get_rank()}.txt").write_text(table, encoding="utf-8")
    return exchange_seconds(profiler)


def exchange_seconds(profiler: torch.profiler.profile) -> dict[str, float]:
    """Returns seconds of a step in NCCL's kernels, and those of them without other work on the
    GPU."""
    exchanges: dict[str, list[tuple[float, float]]] = {"all": [], "gathers": []}
    work: list[tuple[float, float]] = []
    for event in profiler.events() or ():
        if "CUDA" not in str(event.device_type) or getattr(event, "is_user_annotation", False):
            continue
        interval = (event.time_range.start / 1e6, event.time_range.end / 1e6)
        if "nccl" not in event.name.lower():
            work.append(interval)
            continue
        exchanges["all"].append(interval)
        if "AllGather" in event.name:
            exchanges["gathers"].append(interval)
    result = {}
    for name, intervals in exchanges.items():
        result[name] = round(union_seconds(intervals), 3)
        waited = union_seconds(intervals + work) - union_seconds(work)
        result[f"{name}_waited_for"] = round(waited, 3)
    return result


def union_seconds(intervals: list[tuple[float, float]]) -> float:
    """Returns the length of all that at least one interval covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def measure_checkpoint(
    engine: Engine, folder: Path, step: int, do_step: Callable[[int], None]
) -> dict[str, float]:
    """Saves, continues for two steps meanwhile, resumes, and does the two steps again."""
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
    """Makes one random sample of 480x832."""
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
