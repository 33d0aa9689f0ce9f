"""Memory, disk and time of a run on a named machine, before anything is downloaded or loaded.

    python -m llama_omni.plan --machine h200x8                  (both stages, as shipped)
    python -m llama_omni.plan configs/stage1_config.json --machine a100-80x4
    python -m llama_omni.plan configs/stage1_config.json configs/stage2_config.json --data DATA

Needs no GPU and no weights. Options of train.py can be given as there. Sizes and lengths come from
sizes.py, the peak of memory from memory.py, the work of a step from model/flops.py.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_omni.model.flops import PEAK_FLOPS, step_flops
from llama_omni.options.config import load_config
from llama_omni.options.rules import validate_config
from llama_omni.plan.lengths import read_lengths
from llama_omni.plan.memory import predict_memory
from llama_omni.plan.sizes import (
    GIB,
    Lengths,
    Machine,
    ModelSizes,
    load_sizes,
    parse_machine,
)
from llama_omni.plan.weights import count_parameters

if TYPE_CHECKING:
    from llama_omni.options.config import TrainConfig
    from llama_omni.plan.memory import Memory

DEFAULT_MACHINE = "h200x1"
# Not measured: CUDA's context and NCCL's buffers, and what the allocator cannot use of its blocks.
CONTEXT_BYTES, SLACK = int(0.8 * GIB), 0.03
# Model FLOPs utilisation by stage and samples a device, on one H200 (README.md, "Measured").
MEASURED_MFU = {1: {8: 0.190, 32: 0.284}, 2: {8: 0.218, 32: 0.350}}
SHIPPED_CONFIGS = [
    str(Path(__file__).parents[1] / "configs" / f"stage{stage}_config.json") for stage in (1, 2)
]
UNIT_CACHE_BYTES = 4.0  # a unit in the cache's jsonl: up to three digits and a comma
CACHE_LINE_BYTES = 150  # its path, size and time


@dataclass(frozen=True)
class Plan:
    config: TrainConfig
    sizes: ModelSizes
    lengths: Lengths
    machine: Machine

    def memory(self, **changes: object) -> Memory:
        """The predicted peak, with other values of the config if given."""
        config = replace(self.config, **changes)  # pyright: ignore[reportArgumentType]
        return predict_memory(config, self.sizes, self.lengths, self.machine.count)

    def needed(self, memory: Memory) -> int:
        """Bytes of a GPU that a peak asks for."""
        return int(memory.peak * (1 + SLACK)) + CONTEXT_BYTES

    @property
    def num_steps(self) -> int:
        c = self.config
        at_once = c.per_device_train_batch_size * self.machine.count
        global_batch = at_once * c.grad_accum_steps(self.machine.count)
        per_epoch = math.ceil(self.lengths.num_samples / global_batch)
        return c.max_steps if c.max_steps > 0 else math.ceil(per_epoch * c.num_train_epochs)


def plan_text(plan: Plan) -> str:
    """All sections of one stage."""
    config, machine = plan.config, plan.machine
    sections = [
        f"Stage {config.stage} on {machine.name}: {config.batch_arithmetic(machine.count)}; "
        f"{strategy_of(plan)}",
        parameter_lines(plan),
        memory_lines(plan),
        disk_lines(plan),
        time_lines(plan),
    ]
    return "\n\n".join(sections) + "\n"


def parameter_lines(plan: Plan) -> str:
    counts = count_parameters(plan.config, plan.sizes)
    lines = [f"Parameters ({plan.sizes.source})"]
    lines += [
        f"  {name:<20}{total / 1e6:>10.1f}M, {trained / 1e6:.1f}M trained"
        for name, (total, trained) in counts.items()
    ]
    return "\n".join(lines)


def memory_lines(plan: Plan) -> str:
    """Line by line at the peak, then the other moments and settings."""
    memory = plan.memory()
    needed, has = plan.needed(memory), plan.machine.gpu_bytes
    lines = [f"Memory of a GPU (GiB), highest at: {memory.moment}"]
    lines += [f"  {p.name:<32}{gib(p.num_bytes)}  {p.formula}" for p in memory.parts]
    lines += [
        f"  {'predicted peak':<32}{gib(memory.peak)}  compare with speed/peak_mem_gib in the log",
        f"  {'allocator slack, CUDA context':<32}{gib(needed - memory.peak)}  "
        f"{SLACK:.0%} + {CONTEXT_BYTES / GIB:.1f} GiB (rule of thumb, not measured)",
        f"  {'needed':<32}{gib(needed)}  of {has / GIB:.1f}: "
        + ("fits" if needed <= has else "DOES NOT FIT"),
        "  other moments: "
        + ", ".join(f"{k} {v / GIB:.1f}" for k, v in memory.moments.items() if k != memory.moment),
    ]
    other = not plan.config.gradient_checkpointing
    switched = plan.memory(gradient_checkpointing=other)
    word = "with" if other else "without"
    lines.append(f"  {word} gradient_checkpointing: peak {switched.peak / GIB:.1f}")
    if needed > has:
        lines += ["What to change, what changes the training least first:", *remedies(plan)]
    return "\n".join([*lines, *small_gpu_lines(plan)])


def remedies(plan: Plan) -> list[str]:
    """Changes with the memory that each needs: first those that leave the training as it is, then
    the states' precision, then LoRA."""
    config = plan.config
    one: dict[str, object] = {"per_device_train_batch_size": 1}
    spread = one if config.deepspeed else {**one, "parallel": "fsdp2"}
    lines = [remedy_line(plan, one)]
    if not config.gradient_checkpointing:
        lines.append(remedy_line(plan, {"gradient_checkpointing": True}))
    for count in (2, 4, 8):
        if count > plan.machine.count:
            more = replace(plan, machine=replace(plan.machine, count=count))
            lines.append(remedy_line(more, spread, f"{count} GPUs, "))
    if not config.deepspeed:
        for precision in ("bf16_stochastic", "8bit"):
            lines.append(remedy_line(plan, {"optimizer_precision": precision}))
            lines.append(remedy_line(plan, {"optimizer_precision": precision, **one}))
    if config.stage == 1 and config.trains_backbone:
        alone: dict[str, object] = {"lora_enable": True, "deepspeed": None}
        lines.append(remedy_line(plan, alone))
        lines.append(remedy_line(plan, {**alone, "parallel": "ddp", **one}))
    return lines


def remedy_line(plan: Plan, changes: dict[str, object], prefix: str = "") -> str:
    needed, has = plan.needed(plan.memory(**changes)), plan.machine.gpu_bytes
    words = prefix + " ".join(
        f"--{key} {str(value).lower()}" for key, value in changes.items() if value is not None
    )
    return f"  {words:<76}{gib(needed)}  {'fits' if needed <= has else 'does not fit'}"


def small_gpu_lines(plan: Plan) -> list[str]:
    """What one 24 GB card can do, which the source document names as the minimum."""
    small = replace(plan, machine=parse_machine("rtx3090x1"))
    one: dict[str, object] = {"per_device_train_batch_size": 1, "deepspeed": None}
    if plan.config.stage == 1:
        one |= {"freeze_backbone": False, "tune_speech_projector": False}
        full = {**one, "lora_enable": False, "parallel": "fsdp2", "optimizer_precision": "8bit"}
        tries = {
            "all weights, even with --optimizer_precision 8bit": full,
            "--lora_enable true --parallel ddp": {**one, "lora_enable": True, "parallel": "ddp"},
        }
    else:
        tries = {
            f"--optimizer_precision {precision}": {
                **one, "parallel": "ddp", "optimizer_precision": precision
            }
            for precision in ("fp32_master", "bf16_stochastic", "8bit")
        }  # fmt: skip
    lines = ["One 24 GB card (the source document's minimum), at 1 a device:"]
    for name, changes in tries.items():
        needed, has = small.needed(small.memory(**changes)), small.machine.gpu_bytes
        verdict = "fits" if needed <= has else "does not fit"
        lines.append(f"  {name:<52}{gib(needed)}  of {has / GIB:.1f}: {verdict}")
    return lines


def strategy_of(plan: Plan) -> str:
    return plan.config.choose_strategy(has_gpu=True, world_size=plan.machine.count)


def disk_lines(plan: Plan) -> str:
    """Bytes to be written, against what is free where output_dir will be."""
    config, sizes = plan.config, plan.sizes
    counts = count_parameters(config, sizes).values()
    total, trained = sum(t for t, _ in counts), sum(t for _, t in counts)
    each = {"fp32_master": 12, "bf16_stochastic": 6, "8bit": 4}[config.optimizer_precision]
    each += 2 * (strategy_of(plan) == "deepspeed")  # its bf16 weights beside the masters
    kept = num_checkpoints(plan)
    merged = total - (trained - sizes.projector if config.lora_enable else 0)
    rows = [
        ("downloads", sizes.download_bytes, "safetensors into the hub's cache; local folders: 0"),
        ("checkpoints", each * trained * (kept + (kept > 0)),
         f"({kept} kept + 1 being written) x {trained / 1e6:.1f}M x {each} B"),
        ("final model", merged * (2 if config.bf16 else 4), "every weight, LoRA merged"),
    ]  # fmt: skip
    if config.stage == 2:
        units = sum(s.units for s in plan.lengths.samples) / len(plan.lengths.samples)
        size = plan.lengths.num_samples * (units * UNIT_CACHE_BYTES + CACHE_LINE_BYTES)
        rows.append(("unit cache", int(size), "0 with has_tgt_units and units in the records"))
    needed = sum(num_bytes for _, num_bytes, _ in rows)
    folder = Path(config.output_dir or ".").resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    lines = ["Disk (GB)"]
    lines += [f"  {name:<32}{size / 1e9:>9.2f}  {formula}" for name, size, formula in rows]
    verdict = "enough" if needed <= free else "TOO LITTLE: lower save_total_limit, or another disk"
    lines.append(f"  {'all':<32}{needed / 1e9:>9.2f}  of {free / 1e9:.1f} free here: {verdict}")
    return "\n".join(lines)


def num_checkpoints(plan: Plan) -> int:
    """Checkpoints that lie on disk in the end."""
    config = plan.config
    if config.save_strategy == "no":
        return 0
    written = math.ceil(config.num_train_epochs)
    if config.save_strategy == "steps":
        written = math.ceil(plan.num_steps / config.save_steps)
    return min(written, config.save_total_limit or written)


def time_lines(plan: Plan) -> str:
    """FLOPs of a step with the expected lengths, and the time they take at a measured MFU."""
    config, machine = plan.config, plan.machine
    size = plan.lengths.batch(config, is_largest=False)
    backbone = "full" if config.trains_backbone else "lora" if config.lora_enable else "frozen"
    flops = step_flops(
        plan.sizes, size, stage=config.stage, backbone=backbone, encoder=config.tune_speech_encoder
    )
    accum = config.grad_accum_steps(machine.count)
    measured = MEASURED_MFU[config.stage]
    nearest = min(measured, key=lambda size: abs(size - config.per_device_train_batch_size))
    mfu, how = measured[nearest], f"measured on one H200 with {nearest} a device, 2026-11-22"
    seconds = flops * accum / (mfu * PEAK_FLOPS[machine.gpu])
    global_batch = config.per_device_train_batch_size * machine.count * accum
    hours = seconds * plan.num_steps / 3600
    frames = f", {size.unit_frames} unit frames" if config.stage == 2 else ""
    caveats = []
    if config.stage == 1 and backbone != "full":
        caveats.append("the MFU is that of training all weights")
    if (machine.gpu, machine.count) != ("H200", 1):
        caveats.append(f"{machine.name} is not measured: slower links and smaller batches cost")
    lines = [
        f"Time ({plan.lengths.source}; {plan.lengths.num_samples} samples)",
        f"  a micro-batch: {size.sequences} x {size.tokens} tokens, {size.answer_tokens} of them "
        f"answers, {size.clips} clips of {size.mel_frames / 100:.1f} s{frames}, padded",
        f"  {flops * accum * machine.count:.3g} FLOPs a step; MFU {mfu:.3f} ({how})",
        f"  {seconds:.2f} s a step, {global_batch / seconds:.1f} samples/s",
        f"  {plan.num_steps} steps: {hours:.1f} h, {hours * machine.count:.1f} GPU-hours",
    ]
    lines += [f"  note: {caveat}" for caveat in caveats]
    return "\n".join(lines)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:>9.2f}"


def make_plan(
    argv: list[str], machine: Machine, *, data: str | None, stage1: ModelSizes | None
) -> Plan:
    """Raises ValueError for a config that cannot work on the machine."""
    config = load_config(argv)
    # The run itself will ask for its paths; a plan can be made before they exist.
    stand_ins = {"data_path": str(Path.cwd()), "stage1_model_path": "org/stage1"}
    for name in ("output_dir", "kmeans_model_path"):
        stand_ins[name] = getattr(config, name) or "not said yet"
    validate_config(replace(config, **stand_ins))
    config.grad_accum_steps(machine.count)
    sizes = load_sizes(config, stage1=stage1)
    return Plan(config, sizes, read_lengths(config, data or config.data_path), machine)


def split_arguments(argv: list[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """(config files, else the two shipped ones; --machine and --data; options of train.py)."""
    configs: list[str] = []
    own: dict[str, str] = {}
    options: list[str] = []
    words = list(argv)
    while words and not words[0].startswith("--"):
        configs.append(words.pop(0))
    while words:
        key, has_equals, value = words[0][2:].partition("=")
        if key in ("machine", "data"):
            if not has_equals and len(words) < 2:
                raise ValueError(f"--{key} needs a value.")
            own[key] = value if has_equals else words[1]
            words = words[1 if has_equals else 2 :]
        else:
            options.append(words.pop(0))
    return configs or SHIPPED_CONFIGS, own, options


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write(__doc__ or "")
        return 0
    try:
        configs, own, options = split_arguments(words)
        machine = parse_machine(own.get("machine", DEFAULT_MACHINE))
        texts, stage1 = [], None
        for path in configs:
            plan = make_plan([path, *options], machine, data=own.get("data"), stage1=stage1)
            stage1 = plan.sizes
            texts.append(plan_text(plan))
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
