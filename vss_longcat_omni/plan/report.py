"""The plan in words: every number with what it is computed from. Printed by the plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vss_longcat_omni.plan.inputs import AUDIO_TABLES, GIB, GPUS, LANGUAGE_MODEL, Machine
from vss_longcat_omni.plan.layout import gb, layouts, offloaded, options
from vss_longcat_omni.plan.memory import CONTEXT_BYTES, SLACK

if TYPE_CHECKING:
    from vss_longcat_omni.plan.layout import Plan
    from vss_longcat_omni.plan.memory import Part

FULL = 0.85  # of a GPU's memory
DOCUMENT_RAM = 512 * GIB  # of the source document's machine
ESTIMATES = (
    "GB are 10^9 bytes. Nothing was downloaded or loaded. All memory and times are estimates; on "
    "two H200 the peaks of 3 and 4 layers were 1.6 % and 1.4 % above theirs (README). What rates "
    "and rules they rest on is said beside them."
)


def describe(plan: Plan) -> str:
    """All sections; the last line is the verdict."""
    sections = [
        header(plan),
        parameter_lines(plan),
        gpu_lines(plan),
        host_lines(plan),
        disk_lines(plan),
        time_lines(plan),
        known_lines(plan),
        option_lines(plan),
        layout_lines(plan),
        "\n".join(f"DOES NOT FIT: {problem}" for problem in plan.problems) or "It fits.",
    ]
    return "\n\n".join(section for section in sections if section)


def header(plan: Plan) -> str:
    job, zero = plan.job, plan.job.zero
    how = f"LoRA r={job.lora_r}" if job.tuning == "lora" else "all weights trained"
    where = "no DeepSpeed: every process has the whole model"
    if zero.source:
        place = "offload_param " + zero.offload if zero.offload != "none" else "no offload"
        where = f"{zero.source}: ZeRO-{zero.stage}, {place}"
    return (
        f"{plan.machine.name}, {how}, {job.max_tokens} tokens a GPU and micro-step, {where}\n"
        + ESTIMATES
    )


def parameter_lines(plan: Plan) -> str:
    sizes, size = plan.sizes, plan.job.itemsize
    experts = sizes.experts * sizes.config.num_layers
    counts = {
        "language model": sizes.count(*LANGUAGE_MODEL),
        "  of it experts": experts,
        "audio tables, heads": sizes.count(*AUDIO_TABLES),
        "encoders, projectors": sizes.count() - sizes.count(*LANGUAGE_MODEL, *AUDIO_TABLES),
        "all": sizes.count(),
        "trained": sizes.count_trained(plan.job),
    }
    lines = ["Parameters (shapes of the model's classes, built without memory)"]
    lines += [
        f"  {name:<22}{count / 1e6:>13,.1f}M  {gb(count * size):>8} GB at {size} B each"
        for name, count in counts.items()
    ]
    shape = " x ".join(map(str, sizes.shapes[sizes.largest]))
    numel = math.prod(sizes.shapes[sizes.largest])
    lines.append(
        f"  largest tensor: {sizes.largest}, {shape} = {numel:,} elements, {gb(numel * size)} GB"
    )
    return "\n".join(lines)


def gpu_lines(plan: Plan) -> str:
    """Line by line at the peak, then the other moments."""
    memory, has = plan.memory, plan.machine.gpu_bytes
    what = "a process (host memory: no GPU)" if has is None else "a GPU"
    lines = [f"Memory of {what} in GB, highest at: {memory.moment}", *part_lines(memory.parts)]
    lines.append(
        f"  {'predicted peak':<30}{gb(memory.peak):>9}  {memory.peak / GIB:.1f} GiB: compare with "
        "the log's peak_mem_gib"
    )
    if has is not None:
        verdict = "fits" if memory.needed <= has else "DOES NOT FIT"
        lines += [
            f"  {'allocator slack, CUDA context':<30}{gb(memory.needed - memory.peak):>9}  "
            f"{SLACK:.0%} + {CONTEXT_BYTES / GIB:.1f} GiB, a rule of thumb",
            f"  {'needed':<30}{gb(memory.needed):>9}  of {gb(has)}: {verdict}",
        ]
        if FULL * has < memory.needed <= has:
            lines.append(
                f"  more than {FULL:.0%} of it: PyTorch's allocator may give memory back and take "
                "it anew in every step (measured at 91 %: 12.5 s a step where 8.6 are due)"
            )
    others = {name: size for name, size in memory.moments.items() if name != memory.moment}
    lines.append("  other moments: " + ", ".join(f"{k} {gb(v)}" for k, v in others.items()))
    return "\n".join(lines)


def part_lines(parts: tuple[Part, ...]) -> list[str]:
    return [f"  {part.name:<30}{gb(part.num_bytes):>9}  {part.formula}" for part in parts]


def host_lines(plan: Plan) -> str:
    has, machine = plan.machine.host_bytes, plan.machine
    lines = [
        f"Host memory of a node in GB ({machine.per_node} processes)",
        *part_lines(plan.memory.host),
    ]
    verdict = ""
    if has is not None:
        verdict = f"  of {gb(has)}: " + ("fits" if plan.host_needed <= has else "DOES NOT FIT")
    return "\n".join([*lines, f"  {'needed':<30}{gb(plan.host_needed):>9}{verdict}"])


def disk_lines(plan: Plan) -> str:
    return "\n".join(["Disk in GB", *part_lines(plan.memory.disk)])


def time_lines(plan: Plan) -> str:
    times = plan.times
    if times is None:
        return ""
    accumulated = times.grad_accum_steps
    lines = ["Seconds a micro-step (rates: see time.py; those of an H200 measured 2026-11-21)"]
    lines += [f"  {term.name:<30}{term.seconds:>9.2f}  {term.formula}" for term in times.terms]
    step = times.slowest * accumulated
    lines += [
        f"  {'one after the other':<30}{times.slowest:>9.2f}  as it is to be expected: a prefetch "
        "that would overlap stops at stage3_max_live_parameters",
        f"  {'all at once':<30}{times.fastest:>9.2f}  no arrangement is faster than its slowest "
        "part",
        f"  a step of {accumulated} micro-steps: {step:,.0f} s ({times.fastest * accumulated:,.0f} "
        f"to {step:,.0f}); {times.tokens_per_sec:,.0f} tokens/s of all GPUs",
    ]
    if len(times.terms) > 1:
        lines.append(
            "  The weights travel once a micro-step whatever is in it: more tokens a micro-step "
            "cost less than more micro-steps a step."
        )
    return "\n".join(lines)


def known_lines(plan: Plan) -> str:
    """What the source document has wrong, and what one of its settings does."""
    sizes, zero = plan.sizes, plan.job.zero
    lines = []
    size = sizes.count() * plan.job.itemsize
    if size > DOCUMENT_RAM:
        machine = Machine(gpus=8, gpu=GPUS["h200"], gpu_bytes=GPUS["h200"].num_bytes)
        settings = plan.changed(stage=3, pin_memory=True)
        host, memory = (offloaded(settings, where, machine) for where in ("cpu", "none"))
        rounded = host.memory["rounded up to powers of two"]
        low, high = (host.host_needed - rounded) / 1e12, host.host_needed / 1e12
        lines += [
            f"  512 GB of host memory cannot hold the offloaded weights: they are {gb(size)} GB, "
            f"and a node of 8 GPUs needs {low:.1f} to {high:.1f} TB",
            "  (the more where torch rounds each pinned tensor up to a power of two).",
            f"  8 H200 without offload: {gb(memory.memory['weights'])} GB of weights a GPU, "
            f"{gb(memory.memory.needed)} GB with all the rest, of {gb(GPUS['h200'].num_bytes)}: "
            + ("that fits." if not memory.problems else "that does not fit either."),
        ]
    numel, experts = math.prod(sizes.shapes[sizes.largest]), sizes.experts * plan.job.itemsize
    if zero.stage == 3 and numel > zero.max_live:
        lines += [
            f"  stage3_max_live_parameters {zero.max_live / 1e9:g}e9 does not bound the gathered "
            f"weights: {sizes.largest.rpartition('.')[2]} of a layer has {numel / 1e9:.2f}e9 "
            "elements and is gathered whole,",
            f"  together with down_proj {sizes.experts / 1e9:.2f}e9, {gb(experts)} GB. While they "
            "are there, nothing else is fetched ahead: nothing overlaps.",
        ]
        if not zero.is_sequential:
            lines.append(
                '  "stage3_allgather_sequential": true gathers them in place; without it DeepSpeed '
                "gathers into a buffer and copies out of it, twice the memory."
            )
    return "\n".join(["Worth knowing", *lines]) if lines else ""


def option_lines(plan: Plan) -> str:
    """But for those that are among the layouts."""
    known = [(other.job, other.machine) for other in layouts(plan)]
    rows = [
        f"  {label:<76}{columns(other)}"
        for label, other in options(plan)
        if (other.job, other.machine) not in known
    ]
    return "\n".join(["Other settings", *rows])


def layout_lines(plan: Plan) -> str:
    rows = []
    for other in layouts(plan):
        label = f"{other.machine.name}, offload {other.job.zero.offload}"
        is_asked = (other.job, other.machine) == (plan.job, plan.machine)
        rows.append(f"  {label:<76}{columns(other)}" + "  <- asked" * is_asked)
    if not rows:
        return ""
    return "\n".join(["Layouts, each with the host memory that was asked", *rows])


def columns(plan: Plan) -> str:
    """Needed memory, speed and verdict in a few words."""
    machine, memory, times = plan.machine, plan.memory, plan.times
    text = f"GPU {gb(memory.needed):>7}"
    if machine.gpu_bytes is not None:
        text += f" of {gb(machine.gpu_bytes)}"
    text += f", host {gb(plan.host_needed):>7}"
    if machine.host_bytes is not None:
        text += f" of {gb(machine.host_bytes)}"
    if times is not None:
        text += f", {times.slowest:>6.1f} s, {times.tokens_per_sec:>6,.0f} tokens/s"
    return f"{text}: " + (f"does not fit ({', '.join(plan.lacks)})" if plan.lacks else "fits")
