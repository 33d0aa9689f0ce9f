"""Decides whether a run fits on a machine, and what would fit as well or better; writes both."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from vss_longcat_omni.options.zero_settings import OFFLOADS
from vss_longcat_omni.plan.inputs import GIB, Setup
from vss_longcat_omni.plan.memory import predict_memory
from vss_longcat_omni.plan.time import predict_times

NVME_BUFFER = 2e9  # elements, in ds_config_nvme.json
FULL = 0.85  # of a GPU's memory


def find_problems(setup: Setup) -> list[str]:
    """List what would stop the run; empty: it fits."""
    found, memory, buffer = [], predict_memory(setup), setup.zero.buffer_size
    has, host = setup.gpu and setup.gpu.num_bytes, sum(memory.host.values())
    if has and memory.needed > has:
        found.append(f"a GPU needs {gb(memory.needed)} GB and has {gb(has)}")
    if host > setup.host_bytes:
        found.append(f"a node needs {gb(host)} GB of host memory and has {gb(setup.host_bytes)}")
    if setup.zero.device == "nvme" and setup.largest_part > buffer:
        found.append(
            f"offload_param: buffer_size={buffer:g} is below the {setup.largest_part:,} elements "
            "that a GPU keeps of the largest tensor: set it to that or more"
        )
    return found


def alternatives(setup: Setup) -> list[Setup]:
    """List what fits, here before twice the nodes: for each place of the weights the micro-batch
    that is fastest (or largest, where no times are known), with about as many tokens in a step."""
    is_sharded, found = setup.zero.stage == 3, []
    machines = [setup, replace(setup, gpus=2 * setup.gpus, nodes=2 * setup.nodes)]
    devices = OFFLOADS if is_sharded else ("none",)
    for machine, device in product(machines[: 1 + is_sharded] if setup.gpu else [], devices):
        own = setup.zero.buffer_size if device == setup.zero.device else NVME_BUFFER
        buffer, fitting = max(own, machine.largest_part), []
        changed = {"buffer_size": buffer, "stage3_allgather_sequential": is_sharded}
        zero = replace(setup.zero, device=device, **changed)  # pyright: ignore[reportArgumentType]
        for factor, is_checkpointed in product((0.25, 0.5, 1, 2, 4), (True, False)):
            steps = setup.gradient_accumulation_steps * setup.gpus / machine.gpus / factor
            other = replace(
                machine,
                run=replace(setup.run, max_tokens=max(1, int(setup.run.max_tokens * factor))),
                zero=zero,
                gradient_accumulation_steps=max(1, round(steps)),
                gradient_checkpointing=is_checkpointed,
            )
            fitting += [other] * (not find_problems(other))
        found += sorted(fitting, key=speed)[-1:]
    found.sort(key=lambda other: (-other.nodes, speed(other)), reverse=True)
    return [other for other in found if str(other) != str(setup)]


def speed(setup: Setup) -> tuple[float, int]:
    """Return tokens a second of all GPUs, 0 where no times are known, and of a micro-batch."""
    seconds, tokens = sum(predict_times(setup).values()), setup.run.max_tokens
    return (tokens * setup.gpus / seconds if seconds else 0.0), tokens


def describe(setup: Setup) -> str:
    """Write the screen; its last line is the verdict."""
    memory, times, gpu = predict_memory(setup), predict_times(setup), setup.gpu
    parameters, trained = setup.sizes.count() / 1e9, setup.sizes.count_trained(setup.run) / 1e6
    tables = {
        f"GB of a GPU, {memory.phase} ({memory.peak / GIB:.1f} GiB: the log's peak_mem_gib)":
            memory.phases[memory.phase],
        f"GB of a node's host memory, which has {gb(setup.host_bytes)}": memory.host,
        "GB of disk": memory.disk,
        "seconds a micro-step": times,
    }  # fmt: skip
    lines = [
        f"{parameters:,.1f}B parameters, {trained:,.1f}M trained; estimates, GB are 10^9 bytes"
    ]
    for title, parts in tables.items():
        unit = 1 if parts is times else 1e9
        lines += [f"{sum(parts.values()) / unit:10,.1f} {title}"] * bool(parts)
        lines += [f"{n / unit:14,.1f} {name}" for name, n in parts.items() if n >= 0.05 * unit]
    if gpu:
        lines.append(f"{gb(memory.needed):>10} with the allocator's slack, of {gb(gpu.num_bytes)}")
        if FULL * gpu.num_bytes < memory.needed <= gpu.num_bytes:
            lines.append(
                f"Over {FULL:.0%} of it, PyTorch may give memory back and take it again each step: "
                "measured at 91 %, 12.5 s a step where 8.6 are due."
            )
    for title, others in (("This run", [setup]), ("What fits", alternatives(setup))):
        lines += [f"{title}, tokens/s:"] * bool(others)
        lines += [f"{speed(other)[0]:10,.0f} {other}" for other in others]
    problems = [f"DOES NOT FIT: {problem}." for problem in find_problems(setup)]
    return "\n".join([*lines, *(problems or ["It fits."])])


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f}"
