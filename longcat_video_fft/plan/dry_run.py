"""What a run needs and what it will take, before anything is downloaded, loaded or changed.

    python -m longcat_video_fft.train --config FILE --dry-run [--num_gpus 8] [--gpu_memory_gib 80]

Needs no GPU. The model is built on the meta device. Files are looked at in inputs.py, the peak of
memory is predicted in memory.py, times come from time.py. The status is 1 when something would stop
the run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longcat_video_fft.model.flops import PEAK_FLOPS
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.config_rules import World, check_model, check_world
from longcat_video_fft.plan.inputs import (
    Samples,
    check_weight_files,
    find_weights,
    plan_disk,
    read_cache,
)
from longcat_video_fft.plan.memory import (
    BF16,
    GIB,
    Memory,
    ModelSizes,
    model_sizes,
    predict_memory,
    shard_size,
)
from longcat_video_fft.plan.time import claim_lines, step_work, time_lines
from longcat_video_fft.training.checkpoint import find_checkpoint

if TYPE_CHECKING:
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.data_config import DataConfig

# Not measured: CUDA's context and NCCL's buffers, and what the allocator cannot use of its blocks.
CONTEXT_BYTES, SLACK = int(0.8 * GIB), 0.03
DEFAULT_GPUS, DEFAULT_GPU_GIB = 8, 79.2  # the source document's: 8 A100 of 80 GB
RELEASED_PARAMETERS = 13_581_071_424


@dataclass(frozen=True)
class Machine:
    count: int
    gpu_bytes: float
    kinds: list[str]  # names in flops.PEAK_FLOPS
    text: str


def dry_run(config: TrainConfig, data: DataConfig, num_gpus: int | None = None) -> int:
    """Prints the plan; returns the exit status: 1 when something would stop the run."""
    try:
        text, problems = lines(config, data, num_gpus)
    except ValueError as error:
        text, problems = [], [str(error)]
    for problem in problems:
        text.append(f"STOPS THE RUN: {problem}")
    if not problems:
        text.append("Nothing was found that would stop the run.")
    sys.stdout.write("\n".join(text) + "\n")
    return int(bool(problems))


def lines(
    config: TrainConfig, data: DataConfig, num_gpus: int | None = None
) -> tuple[list[str], list[str]]:
    """(the plan, what would stop the run).

    Raises:
        ValueError: sizes that do not divide, no such checkpoint, no such model.
    """
    machine = find_machine(config, num_gpus)
    world = check_world(config, machine.count)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, Path(config.output_dir))
    weights = find_weights(config, data)
    with torch.device("meta"):
        model: Any = LongCatVideoTransformer3DModel.from_config(weights.config)
    check_model(config, model.config)
    check_weight_files(config, weights, model)
    sizes = model_sizes(model)
    samples = read_cache(config, data)
    memory = predict_memory(config, sizes, world, samples.largest)
    work = step_work(config, sizes.config, samples, world)
    disk = plan_disk(config, sizes, weights)
    times = time_lines(config, work, world, gpus=machine.kinds, depth=len(sizes.blocks))
    text = [
        *batch_lines(config, machine, world, samples),
        *([f"Resumes from {checkpoint}"] if checkpoint else []),
        *("", "Model", *(f"  {line}" for line in weights.lines)),
        *sharding_lines(config, sizes, world),
        *("", f"Caches ({data.source})", *(f"  {line}" for line in samples.lines)),
        *("", *memory_lines(config, sizes, world, samples, memory, machine)),
        *("", "Disk (GB)", *disk.lines),
        *("", "Time", *times),
    ]  # fmt: skip
    if sizes.num_parameters == RELEASED_PARAMETERS:
        text += claim_lines(work, world)
    problems = [*samples.problems, *weights.problems, *disk.problems]
    needed = needed_bytes(memory)
    if needed > machine.gpu_bytes:
        problems.append(
            f"{needed / GIB:.1f} GiB a GPU are needed and there are {machine.gpu_bytes / GIB:.1f}"
        )
    problems += host_problems(memory, min(torch.cuda.device_count(), machine.count))
    return [*text, ""], problems


def host_problems(memory: Memory, local_gpus: int) -> list[str]:
    """Whether the processes of this machine's GPUs find the host memory that they need."""
    needed, has = local_gpus * sum(part.num_bytes for part in memory.host), host_memory()
    if needed <= has:
        return []
    return [
        f"{needed / GIB:.1f} GiB of host memory are needed for {local_gpus} GPUs here and there "
        f"are {has / GIB:.1f}; lower activation_offload_blocks or musubi_blocks_to_swap"
    ]


def host_memory() -> int:
    """Bytes that this machine or its container has."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        has = min(has, int(text))
    return has


def find_machine(config: TrainConfig, num_gpus: int | None) -> Machine:
    """What the options say, else what is here, else the source document's."""
    here = torch.cuda.device_count()
    count = num_gpus or config.num_gpus or here or DEFAULT_GPUS
    if here:
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
        text, kinds = f"{name}, as here", [kind for kind in PEAK_FLOPS if kind in name][-1:]
    else:
        text, memory, kinds = "no GPU here: memory of an A100 of 80 GB", DEFAULT_GPU_GIB * GIB, []
    if config.gpu_memory_gib is not None:
        text, memory = "gpu_memory_gib", config.gpu_memory_gib * GIB
    return Machine(count, memory, kinds or ["A100", "H100", "H200"], text)


def batch_lines(config: TrainConfig, machine: Machine, world: World, samples: Samples) -> list[str]:
    shards = f"parameters cut over {world.shard_size}"
    if world.replicate_size > 1:
        shards += f", {world.replicate_size} copies"
    if world.context_size > 1:
        shards += f", {world.context_size} GPUs share one sample's tokens"
    text = [
        f"{machine.count} GPUs of {machine.gpu_bytes / GIB:.1f} GiB ({machine.text}); {shards}",
        f"Global batch: train_batch_size {config.train_batch_size} x gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} x {world.dp_size} GPUs or groups of GPUs = "
        f"{world.global_batch} samples a step",
    ]
    number = samples.buckets.total()
    if samples.order is not None:
        steps = samples.order.epoch_length * config.train_batch_size / world.global_batch
        text.append(
            f"{number:,} samples: an epoch is {steps:,.1f} steps; {config.max_train_steps:,} steps "
            f"are {config.max_train_steps / steps:.2f} epochs"
        )
    if config.lr_warmup_steps >= config.max_train_steps and config.lr_scheduler != "constant":
        text.append(
            f"note: lr_warmup_steps={config.lr_warmup_steps} does not end within max_train_steps="
            f"{config.max_train_steps}: learning_rate is never reached"
        )
    return text


def sharding_lines(config: TrainConfig, sizes: ModelSizes, world: World) -> list[str]:
    """Each unit of sharding and what one GPU holds of it."""
    block, root = sizes.blocks[0], sizes.root
    total = ModelSizes(sizes.config, (), root).num_parameters
    per_block = ModelSizes(sizes.config, (), block).num_parameters
    shards = world.shard_size
    swapped = min(config.musubi_blocks_to_swap, len(sizes.blocks))
    gigabytes = sizes.num_parameters * BF16 / 1e9
    text = [
        f"  {sizes.num_parameters:,} parameters, all trained ({gigabytes:.2f} GB as bf16)",
        f"  {len(sizes.blocks)} blocks of {per_block:,}, {shard_size(block, shards):,} a GPU each; "
        f"embedders and final layer {total:,}, {shard_size(root, shards):,} a GPU",
    ]
    if swapped:
        text.append(f"  the last {swapped} blocks live in host memory (musubi_blocks_to_swap)")
    return text


def needed_bytes(memory: Memory) -> int:
    """Bytes of a GPU that a peak asks for."""
    return int(memory.peak * (1 + SLACK)) + CONTEXT_BYTES


def memory_lines(
    config: TrainConfig, sizes: ModelSizes, world: World, samples: Samples,
    memory: Memory, machine: Machine,
) -> list[str]:  # fmt: skip
    """Line by line at the peak, then the other moments and other settings."""
    needed = needed_bytes(memory)
    has = machine.gpu_bytes
    text = [
        f"Memory of a GPU (GiB) with micro-batches of {config.train_batch_size} x "
        f"{samples.largest}, highest at: {memory.moment}"
    ]
    text += [f"  {p.name:<32}{p.num_bytes / GIB:>9.2f}  {p.formula}" for p in memory.parts]
    text += [
        f"  {'predicted peak':<32}{memory.peak / GIB:>9.2f}  compare with the log's "
        "speed/peak_mem_gib",
        f"  {'allocator slack, CUDA context':<32}{(needed - memory.peak) / GIB:>9.2f}  {SLACK:.0%} "
        f"+ {CONTEXT_BYTES / GIB:.1f} GiB (rule of thumb, not measured)",
        f"  {'needed':<32}{needed / GIB:>9.2f}  of {has / GIB:.1f}: "
        + ("fits" if needed <= has else "DOES NOT FIT"),
        "  other moments: "
        + ", ".join(f"{k} {v / GIB:.1f}" for k, v in memory.moments.items() if k != memory.moment),
    ]  # fmt: skip
    for part in memory.host:
        text.append(f"  host memory a GPU: {part.name} {part.num_bytes / GIB:.1f}  {part.formula}")
    text.append("  other settings (needed):")
    for changes in other_settings(config, world, depth=len(sizes.blocks)):
        other = needed_bytes(predict_changed(config, sizes, world, samples, changes))
        words = " ".join(f"--{key} {str(value).lower()}" for key, value in changes.items())
        verdict = "fits" if other <= has else "does not fit"
        text.append(f"    {words:<50}{other / GIB:>9.2f}  {verdict}")
    return text


def predict_changed(
    config: TrainConfig, sizes: ModelSizes, world: World, samples: Samples, changes: dict[str, Any]
) -> Memory:
    changed = replace(config, **changes)
    return predict_memory(changed, sizes, check_world(changed, world.world_size), samples.largest)


def other_settings(config: TrainConfig, world: World, *, depth: int) -> list[dict[str, Any]]:
    """Levers worth knowing: those that leave the training as it is, then the states' precision."""
    tries: list[dict[str, Any]] = [
        {"gradient_checkpointing_mode": "full"},
        {"gradient_checkpointing_mode": "selective"},
        {"uncheckpointed_blocks": min(config.uncheckpointed_blocks + 4, depth)},
        {"activation_offload_blocks": depth},
        {"musubi_blocks_to_swap": min(config.musubi_blocks_to_swap + 8, depth)},
        {"optimizer": "adamw"},
        {"optimizer": "adamw_bf16"},
        {"optimizer": "adamw_8bit"},
    ]
    if not config.gradient_checkpointing:
        tries = [{"gradient_checkpointing": True}, *tries[3:]]
    if not config.compile:
        tries = [t for t in tries if "activation_offload_blocks" not in t]
    if not config.fsdp_enable:
        tries = [t for t in tries if "musubi_blocks_to_swap" not in t]
    if world.context_size == 1 and world.world_size % 2 == 0 and world.shard_size > 1:
        tries.insert(3, {"context_parallel_size": 2})
    return [t for t in tries if any(getattr(config, key) != value for key, value in t.items())]
