"""What a run needs and what it will take, before anything is downloaded, loaded or changed.

    python -m longcat_video_fft.train --config FILE --dry-run [--num_gpus 8] [--gpu_memory_gib 80]

Needs no GPU. Files are looked at in inputs.py, the peak of memory is predicted in memory.py, times
come from time.py. The status is 1 when something would stop the run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from longcat_video_fft.model.flops import PEAK_FLOPS
from longcat_video_fft.model.loading import CheckpointReader, build_transformer, check_names
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.config_rules import (
    World,
    check_model,
    check_world,
    validate_config,
)
from longcat_video_fft.options.hub import check_free_disk
from longcat_video_fft.plan.inputs import Report, Samples, find_weights, read_samples
from longcat_video_fft.plan.memory import (
    GIB,
    Memory,
    ModelSizes,
    model_sizes,
    predict_memory,
    shard_size,
)
from longcat_video_fft.plan.time import HOPPER, step_seconds, step_work, time_lines
from longcat_video_fft.training.checkpoint import find_checkpoint, plan_disk

if TYPE_CHECKING:
    from longcat_video_fft.options.config import TrainConfig
    from longcat_video_fft.options.data_config import DataConfig

# Not measured: CUDA's context and NCCL's buffers, and what the allocator cannot use of its blocks.
CONTEXT_BYTES, SLACK = int(0.8 * GIB), 0.03


class Machine(NamedTuple):
    """The GPUs that the plan is for; `kinds` are names in flops.PEAK_FLOPS."""

    count: int
    local: int  # of them on this machine
    gpu_bytes: float
    kinds: list[str]
    text: str


def dry_run(config: TrainConfig, data: DataConfig, num_gpus: int | None = None) -> int:
    """Prints the plan; returns the exit status: 1 when something would stop the run."""
    report = Report()
    with report.noting():
        write_plan(config, data, num_gpus, report)
    if report.unchecked:
        report.lines += ["", f"Not checked: {'; '.join(report.unchecked)}."]
    verdicts = [f"STOPS THE RUN: {problem}" for problem in report.problems]
    verdicts = verdicts or ["Nothing was found that would stop the run."]
    sys.stdout.write("\n".join([*report.lines, "", *verdicts]) + "\n")
    return int(bool(report.problems))


def write_plan(config: TrainConfig, data: DataConfig, num_gpus: int | None, report: Report) -> None:
    """Adds all sections to the report.

    Raises:
        ValueError: sizes that do not divide, no such checkpoint, no such model.
    """
    machine = find_machine(config, num_gpus)
    world = check_world(config, machine.count)
    output_dir = Path(config.output_dir)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    report.lines += machine_lines(config, machine, world)
    report.lines += [f"Resumes from {checkpoint}"] * bool(checkpoint)
    dit = find_weights(config, data, report)
    with torch.device("meta"):
        released = None if dit else LongCatVideoTransformer3DModel(text_tokens_zero_pad=True)
    model: Any = build_transformer(dit) if dit else released
    check_model(config, model.config)
    if dit and config.transformer_init != "random":
        with report.noting():  # names and shapes, by the files' heads alone
            check_names(CheckpointReader(dit), dict(model.named_parameters()))
    sizes = model_sizes(model)
    count, block = sizes.num_parameters(), sizes.block
    report.lines.append(
        f"  {count:,} parameters, all trained; {sizes.depth} blocks of {shard_size(block, 1):,}, "
        f"{shard_size(block, world.shard_size):,} a GPU each"
    )
    if data.placeholders:
        fields = ", ".join(data.placeholders)
        report.unchecked.append(f"{data.source}, where {fields} is still a placeholder")
    samples = read_samples(config, data, report)
    memory = predict_memory(config, sizes, world, samples.largest)
    write_memory(memory, config, samples, machine, report)
    copies, size = plan_disk(count, config, output_dir)
    report.section(f"Disk: {size / 1e9:,.2f} GB, for {copies} more checkpoints and the transformer")
    with report.noting():
        remedy = "Lower checkpoints_total_limit, or give another disk."
        check_free_disk(output_dir, size, what=f"output_dir={output_dir}", remedy=remedy)
    work = step_work(config, sizes.config, samples, world)
    times = time_lines(config, work, samples, world, gpus=machine.kinds, depth=sizes.depth)
    report.section("Time", *times)
    title = f"Other settings that fit (GiB, GiB of host memory, samples/s on {machine.kinds[0]})"
    report.section(title, *alternative_lines(config, sizes, world, samples, machine))


def find_machine(config: TrainConfig, num_gpus: int | None) -> Machine:
    """What the options say, else what is here, else eight A100."""
    here = torch.cuda.device_count()
    count = num_gpus or config.num_gpus or here or 8
    text, memory, kinds = "no GPU here: memory of an A100 of 80 GB", 79.2 * GIB, []
    if here:
        properties = torch.cuda.get_device_properties(0)
        text, memory = f"{properties.name}, as here", properties.total_memory
        kinds = [kind for kind in PEAK_FLOPS if kind in properties.name][-1:]
    if config.gpu_memory_gib is not None:
        text, memory = "gpu_memory_gib", config.gpu_memory_gib * GIB
    return Machine(count, min(here, count), memory, kinds or ["A100", "H100", "H200"], text)


def machine_lines(config: TrainConfig, machine: Machine, world: World) -> list[str]:
    """The GPUs, how they share the model, and the samples of a step."""
    shards = f"parameters cut over {world.shard_size}"
    if world.replicate_size > 1:
        shards += f", {world.replicate_size} copies"
    if world.context_size > 1:
        shards += f", {world.context_size} GPUs share one sample's tokens"
    return [
        f"{machine.count} GPUs of {machine.gpu_bytes / GIB:.1f} GiB ({machine.text}); {shards}",
        f"Global batch: train_batch_size {config.train_batch_size} x gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} x {world.dp_size} GPUs or groups of GPUs = "
        f"{world.global_batch} samples a step",
    ]


def needed_gib(memory: Memory) -> float:
    """What a GPU must have for a peak."""
    return (memory.peak * (1 + SLACK) + CONTEXT_BYTES) / GIB


def write_memory(
    memory: Memory, config: TrainConfig, samples: Samples, machine: Machine, report: Report
) -> None:
    """Part by part at the peak, what is needed, and host memory."""
    has, needed, peak = machine.gpu_bytes / GIB, needed_gib(memory), memory.peak / GIB
    rows = [(name, size / GIB, "") for name, size in memory.parts.items()]
    rows += [
        ("predicted peak", peak, "  compare with the log's speed/peak_mem_gib"),
        ("allocator slack, CUDA context", needed - peak, "  a rule of thumb, not measured"),
        ("needed", needed, f"  of {has:.1f}: " + ("fits" if needed <= has else "DOES NOT FIT")),
    ]
    rows += [(name, size / GIB, "  of host memory") for name, size in memory.host.items()]
    micro_batch = f"{config.train_batch_size} x {samples.largest}"
    report.section(
        f"Memory of a GPU (GiB) with micro-batches of {micro_batch}, highest in: {memory.phase}",
        *(f"{name:<34}{size:>9.2f}{text}" for name, size, text in rows if size),
    )
    if needed > has:
        report.problems.append(f"{needed:.1f} GiB a GPU are needed and there are {has:.1f}")
    report.problems += host_problems(memory, machine.local)


def host_problems(memory: Memory, local_gpus: int) -> list[str]:
    """Whether the processes of this machine's GPUs find the host memory that they need."""
    needed, has = local_gpus * sum(memory.host.values()), host_memory()
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


def alternative_lines(
    config: TrainConfig, sizes: ModelSizes, world: World, samples: Samples, machine: Machine
) -> list[str]:
    """Other settings that fit, the fastest first: smaller ones, and such as use what is left."""
    kind, depth, unchecked = machine.kinds[0], sizes.depth, "uncheckpointed_blocks"
    tries: list[dict[str, Any]] = [
        *({"gradient_checkpointing_mode": mode} for mode in ("full", "selective", "selective_ffn")),
        *({"optimizer": name} for name in ("adamw", "adamw_bf16", "adamw_8bit")),
        {"activation_offload_blocks": depth}, {"musubi_blocks_to_swap": min(8, depth)},
        {"gradient_checkpointing": not config.gradient_checkpointing},
        {"context_parallel_size": 2}, {"fp8_linears": kind in HOPPER},
        *({unchecked: number} for number in range(depth, 0, -1)),
        # As many as PCIe moves meanwhile (training/offload.py).
        *({"activation_offload_blocks": depth // 3, unchecked: n} for n in range(depth, 0, -1)),
    ]  # fmt: skip
    work = cache(lambda other: step_work(config, sizes.config, samples, other))
    found: dict[str, tuple[float, float, str]] = {}
    for changes in tries:
        changed = replace(config, **changes)
        if changed == config:
            continue
        try:
            validate_config(changed)
            check_model(changed, sizes.config)
            other = check_world(changed, world.world_size)
        except ValueError:
            continue
        memory = predict_memory(changed, sizes, other, samples.largest)
        gib, host = needed_gib(memory), sum(memory.host.values()) / GIB
        fits = gib * GIB <= machine.gpu_bytes and not host_problems(memory, machine.local)
        argv = [f"--{key} {str(value).lower()}" for key, value in changes.items()]
        name = " ".join(argv[:-1] if unchecked in changes else argv)
        if fits and name not in found:  # the most uncheckpointed blocks
            speed = other.global_batch / step_seconds(changed, work(other), kind, depth)
            row = f"{' '.join(argv):<60}{gib:>8.2f} {host:>8.1f} {speed:>9.3g}"
            found[name] = (-speed, gib, row)
    return [text for *_, text in sorted(found.values())] or ["none"]
