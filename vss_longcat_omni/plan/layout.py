"""A run on a machine: whether it fits, and which others would.

The command makes a `Plan` of what was asked, `report.py` prints it beside its alternatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from vss_longcat_omni.plan.inputs import GPUS, OFFLOADS, Job, Machine, ModelSizes
from vss_longcat_omni.plan.memory import Memory, predict_memory, total
from vss_longcat_omni.plan.time import predict_times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vss_longcat_omni.plan.time import Times

NVME_BUFFERS = (5, 2e9)  # of ds_config_nvme.json
GPUS_OF_A_NODE = 8
COMPARED_GPUS, COMPARED_COUNTS = ("h200", "h100"), (8, 16)


def gb(num_bytes: float) -> str:
    digits = 4 if 0 < num_bytes < 1e8 else 1
    return f"{num_bytes / 1e9:,.{digits}f}"


@dataclass(frozen=True)
class Plan:
    job: Job
    sizes: ModelSizes
    machine: Machine

    @cached_property
    def memory(self) -> Memory:
        return predict_memory(self.job, self.sizes, self.machine)

    @cached_property
    def times(self) -> Times | None:
        return predict_times(self.job, self.sizes, self.machine)

    @property
    def host_needed(self) -> float:
        """Bytes of a node."""
        return total(self.memory.host)

    @property
    def problems(self) -> list[str]:
        """What would stop the run; empty: it fits."""
        return list(self.lacks.values())

    @cached_property
    def lacks(self) -> dict[str, str]:
        """What there is too little of, and the problem in words."""
        found, machine, zero = {}, self.machine, self.job.zero
        needed, has = self.memory.needed, machine.gpu_bytes
        if has is not None and needed > has:
            found["GPU memory"] = f"a GPU needs {gb(needed)} GB and has {gb(has)}"
        needed, has = self.host_needed, machine.host_bytes
        if has is not None and needed > has:
            found["host memory"] = f"a node needs {gb(needed)} GB of host memory and has {gb(has)}"
        if zero.offload == "nvme" and self.largest_part(machine) > zero.buffer_size:
            found["NVMe buffers"] = (
                f"{zero.source}: buffer_size={zero.buffer_size:g} is below the "
                f"{self.largest_part(machine):,} elements of {self.sizes.largest} that a GPU "
                "keeps: set it to that or more"
            )
        return found

    def largest_part(self, machine: Machine) -> int:
        """Elements that one GPU keeps of the largest tensor."""
        return math.ceil(math.prod(self.sizes.shapes[self.sizes.largest]) / machine.gpus)

    def with_tokens(self, max_tokens: int) -> Plan:
        return Plan(replace(self.job, max_tokens=max(max_tokens, 1)), self.sizes, self.machine)

    def changed(self, *, machine: Machine | None = None, **zero: object) -> Plan:
        """With other settings of DeepSpeed, or on another machine."""
        settings = replace(self.job.zero, **zero)  # pyright: ignore[reportArgumentType]
        return Plan(replace(self.job, zero=settings), self.sizes, machine or self.machine)


def options(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """What else could be asked for: settings here, then twice the nodes, then fewer tokens."""
    machine = plan.machine
    if plan.job.zero.stage == 3 and machine.gpu_bytes is not None:
        doubled = replace(machine, gpus=2 * machine.gpus, nodes=2 * machine.nodes)
        for where, words in ((machine, ""), (doubled, f" on {doubled.name}")):
            for offload in OFFLOADS:
                moved = offloaded(plan, offload, where)
                yield f"offload_param {offload}{words}", moved
                if not moved.job.zero.is_sequential:
                    label = f"offload_param {offload} and stage3_allgather_sequential{words}"
                    yield label, moved.changed(is_sequential=True)
    for tokens in (plan.job.max_tokens // 2, plan.job.max_tokens // 4):
        yield f"--max_tokens {tokens}", plan.with_tokens(tokens)


def layouts(plan: Plan) -> Iterator[Plan]:
    """The asked cards and the usual ones, by 8 and 16, with the weights in each of three places.

    Every machine has the host memory and the drives of the one asked.
    """
    asked = plan.machine
    if asked.gpu is None or plan.job.zero.stage != 3:
        return
    names = dict.fromkeys((asked.gpu.name, *COMPARED_GPUS))
    counts = sorted({asked.gpus, *COMPARED_COUNTS})
    for name in names:
        gpu = GPUS[name]
        has = asked.gpu_bytes if name == asked.gpu.name else gpu.num_bytes
        for count in counts:
            nodes = asked.nodes if count == asked.gpus else math.ceil(count / GPUS_OF_A_NODE)
            machine = replace(asked, gpus=count, nodes=nodes, gpu=gpu, gpu_bytes=has)
            for offload in OFFLOADS:
                yield offloaded(plan, offload, machine)


def offloaded(plan: Plan, offload: str, machine: Machine) -> Plan:
    """The weights in another place; on NVMe with buffers as large as they must be."""
    zero = plan.job.zero
    if offload != "nvme" or zero.offload == "nvme":
        return plan.changed(machine=machine, offload=offload)
    count, size = NVME_BUFFERS
    size = max(size, plan.largest_part(machine))
    return plan.changed(machine=machine, offload=offload, buffer_count=count, buffer_size=size)
