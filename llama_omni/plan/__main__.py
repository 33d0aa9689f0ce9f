"""Predicts memory, disk and time of a run on a named machine, before anything is downloaded.

    python -m llama_omni.plan --machine h200x8                  (both stages, as shipped)
    python -m llama_omni.plan configs/stage1_config.json --machine a100-80x4
    python -m llama_omni.plan configs/stage1_config.json configs/stage2_config.json --data DATA

Needs no GPU and no weights. Options of train.py can be given as there. The exit status is 1 when a
stage does not fit the GPUs' memory, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from dataclasses import replace
from itertools import product, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_omni.dataset.lengths import Lengths, read_lengths
from llama_omni.model.flops import PEAK_FLOPS, forward_flops, step_flops
from llama_omni.model.sizes import ModelSizes, count_parameters, load_sizes
from llama_omni.options.config import TrainConfig, load_config
from llama_omni.options.rules import OPTIMIZER_PRECISIONS, validate_config
from llama_omni.plan.inputs import GIB, Machine, batch_size, parse_machine
from llama_omni.plan.memory import STATE_BYTES, predict_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"
# Not measured: CUDA's context and NCCL's buffers, and what the allocator cannot use of its blocks.
CONTEXT_BYTES, SLACK = int(0.8 * GIB), 0.03
# Model FLOPs utilization of each stage with 8 and 32 samples a device on one H200 with gradient
# checkpointing, and the share of it that LoRA reaches with 8 (README.md, "Measured").
MFU_OF_8_AND_32, LORA_SHARE = {1: (0.190, 0.284), 2: (0.218, 0.350)}, 0.094 / 0.190


class Plan:
    """Holds what one stage of a run needs on a machine: bytes of a GPU, and hours."""

    def __init__(
        self, config: TrainConfig, sizes: ModelSizes, lengths: Lengths, machine: Machine
    ) -> None:
        self.config, self.sizes, self.lengths, self.machine = config, sizes, lengths, machine
        self.memory = predict_memory(config, sizes, lengths, machine.count)
        self.needed = int(self.memory.peak * (1 + SLACK)) + CONTEXT_BYTES
        self.fits = self.needed <= machine.gpu_bytes
        accum = config.grad_accum_steps(machine.count)
        self.global_batch = config.per_device_train_batch_size * machine.count * accum
        self.num_steps = config.max_steps
        if config.max_steps < 0:
            per_epoch = math.ceil(lengths.num_samples / self.global_batch)
            self.num_steps = math.ceil(per_epoch * config.num_train_epochs)
        # A micro-batch takes a fixed time and one in proportion to its samples, so that 1 / MFU is
        # linear in 1 / samples, through the two measured points.
        at_8, at_32 = (1 / mfu for mfu in MFU_OF_8_AND_32[config.stage])
        slope = (at_8 - at_32) / (1 / 8 - 1 / 32)
        self.mfu = 1 / (at_8 + slope * (1 / config.per_device_train_batch_size - 1 / 8))
        self.mfu *= LORA_SHARE if config.lora_enable else 1
        self.seconds = self.step_flops() * accum / (self.mfu * PEAK_FLOPS[machine.gpu])
        self.hours = self.seconds * self.num_steps / 3600

    def step_flops(self) -> float:
        """Counts the model FLOPs of a micro-batch of expected lengths; without checkpointing, as
        many fewer as the forward that the measured utilization has twice makes up."""
        config, batch = self.config, batch_size(self.lengths, self.config, is_largest=False)
        flops = step_flops(self.sizes, batch, config)
        if config.gradient_checkpointing:
            return flops
        stack = "llm" if config.stage == 1 else "speech_generator"
        return flops**2 / (flops + forward_flops(self.sizes, batch)[stack])


def describe(plan: Plan) -> str:
    """Formats the whole report of one stage."""
    config, machine, memory = plan.config, plan.machine, plan.memory
    counts = count_parameters(config, plan.sizes)
    strategy = config.choose_strategy(has_gpu=True, world_size=machine.count)
    is_measured = (machine.gpu, machine.count) == ("H200", 1)
    lines = [
        f"Stage {config.stage} on {machine.name}x{machine.count}: "
        f"{config.batch_arithmetic(machine.count)}; {strategy}",
        f"Parameters ({plan.sizes.source})",
        *(f"  {name:<28}{total / 1e6:>9.1f}M, {trained / 1e6:.1f}M trained"
          for name, (total, trained) in counts.items()),
        f"Memory of a GPU (GiB), highest at: {memory.phase}",
        *(f"  {name:<28}{size / GIB:>9.2f}" for name, size in memory.parts.items()),
        f"  {'predicted peak':<28}{memory.peak / GIB:>9.2f}  speed/peak_mem_gib in the log",
        f"  {'needed':<28}{plan.needed / GIB:>9.2f}  of {machine.gpu_bytes / GIB:.1f}, with the "
        f"CUDA context and {SLACK:.0%} slack: {'fits' if plan.fits else 'DOES NOT FIT'}",
        *disk_lines(plan),
        f"Time ({plan.lengths.source}; {plan.lengths.num_samples} samples)",
        f"  {plan.seconds:.2f} s a step, {plan.global_batch / plan.seconds:.1f} samples/s by MFU "
        f"{plan.mfu:.3f} of one H200{'' if is_measured else '; not measured on this machine'}",
        f"  {plan.num_steps} steps: {plan.hours:.1f} h, {plan.hours * machine.count:.1f} GPU-hours",
        f"Settings that {'fit and are faster' if plan.fits else 'fit'} (GiB needed, hours)",
        *(other_settings(plan) or ["  none"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def disk_lines(plan: Plan) -> Iterator[str]:
    """Yields the lines of what is to be written, against what is free where output_dir will be."""
    config, sizes, precision = plan.config, plan.sizes, plan.config.optimizer_precision
    counts = count_parameters(config, sizes).values()
    total, trained = (sum(part) for part in zip(*counts, strict=True))
    kept = math.ceil(config.num_train_epochs)
    if config.save_strategy == "steps":
        kept = math.ceil(plan.num_steps / config.save_steps)
    kept = min(kept, config.save_total_limit or kept) * (config.save_strategy != "no")
    each = STATE_BYTES[precision] + (4 if precision == "fp32_master" else 2)
    each += 2 * bool(config.deepspeed)  # its bf16 weights beside the masters
    merged = total - (trained - sizes.projector) * config.lora_enable
    parts = {
        "downloads": sizes.download_bytes,
        f"checkpoints ({kept}, one more while it is written)": each * trained * (kept + (kept > 0)),
        "final model": merged * (2 if config.bf16 else 4),
    }
    folder = Path(config.output_dir or ".").resolve()
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, sum(parts.values())
    verdict = "enough" if needed <= free else "TOO LITTLE: lower save_total_limit, or another disk"
    yield "Disk (GB): " + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    yield f"  {'all':<28}{needed / 1e9:>9.1f}  of {free / 1e9:.1f} free here: {verdict}"


def other_settings(plan: Plan) -> list[str]:
    """Lists settings that fit, each faster than those before, beginning with what changes the
    training least: batch size and recomputation, then precision, then LoRA, then more GPUs."""
    config, count = plan.config, plan.machine.count
    precisions = [config.optimizer_precision]
    if config.bf16 and not config.deepspeed:
        precisions += [name for name in OPTIMIZER_PRECISIONS if name not in precisions]
    loras = [config.lora_enable, True] if config.trains_backbone else [config.lora_enable]
    tries = [(count, *setting) for setting in product(loras, precisions, (True, False))]
    if not plan.fits:
        tries += [(more, loras[0], precisions[0], True) for more in (2, 4, 8) if more > count]
    lines, fastest = [], plan.hours if plan.fits else math.inf
    for gpus, lora, precision, recomputes in tries:
        changes: dict[str, Any] = {"gradient_checkpointing": recomputes, "lora_enable": lora,
                                   "optimizer_precision": precision}  # fmt: skip
        if not config.deepspeed and (gpus > count or lora):
            changes["parallel"] = "fsdp2" if gpus > 1 else "ddp"
        at_once, rest = divmod(plan.global_batch, gpus)  # samples a GPU of a step
        machine = replace(plan.machine, count=gpus)
        found: list[Plan] = []
        for size in [] if rest else [n for n in range(1, at_once + 1) if at_once % n == 0]:
            changes["per_device_train_batch_size"] = size
            if config.gradient_accumulation_steps is not None:
                changes["gradient_accumulation_steps"] = at_once // size
            found.append(Plan(replace(config, **changes), plan.sizes, plan.lengths, machine))
        best = min((p for p in found if p.fits), key=lambda p: p.hours, default=None)
        if best is not None and best.hours < 0.99 * fastest:
            fastest = best.hours
            options = [f"--{name} {str(value).lower()}" for name, value in vars(best.config).items()
                     if value != getattr(config, name)]  # fmt: skip
            options[:0] = [f"{gpus} GPUs:"] * (gpus > count)
            lines.append(f"  {best.needed / GIB:>7.1f}{best.hours:>8.1f}  {' '.join(options)}")
    return lines


def make_plan(argv: list[str], machine: Machine, data: str, stage1: ModelSizes | None) -> Plan:
    """Plans one stage; raises ValueError for a config that cannot work on the machine."""
    config = load_config(argv)
    # The run itself will ask for its paths; a plan can be made before they exist.
    stand_ins = {"data_path": str(Path.cwd()), "stage1_model_path": "org/stage1"}
    for name in ("output_dir", "kmeans_model_path"):
        stand_ins[name] = getattr(config, name) or "not given yet"
    validate_config(replace(config, **stand_ins))
    sizes = load_sizes(config, stage1=stage1)
    return Plan(config, sizes, read_lengths(config, data or config.data_path), machine)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    configs = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    parser = argparse.ArgumentParser(
        prog="python -m llama_omni.plan", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--machine", default="h200x1", help="GPUxCOUNT")
    parser.add_argument("--data", default="", help="dataset file or folder, for its lengths")
    plans: list[Plan] = []
    try:
        args, options = parser.parse_known_args(argv[len(configs) :])
        machine = parse_machine(args.machine)
        for path in configs or sorted(map(str, SHIPPED_CONFIGS.glob("stage?_config.json"))):
            stage1 = plans[-1].sizes if plans else None
            plans.append(make_plan([path, *options], machine, args.data, stage1))
    except (ValueError, FileNotFoundError, argparse.ArgumentError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("\n".join(map(describe, plans)))
    return 0 if all(plan.fits for plan in plans) else 1


if __name__ == "__main__":
    sys.exit(main())
