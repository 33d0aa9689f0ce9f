"""Holds what the plan computes from: cards, and a run on a machine.

Nothing is loaded or downloaded, and neither DeepSpeed nor the Trainer is imported.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vss_longcat_omni.model.sizes import ModelSizes
    from vss_longcat_omni.options.run_arguments import RunArguments
    from vss_longcat_omni.options.zero_settings import ZeroSettings

GIB = 2**30


class Gpu(NamedTuple):
    """A card of a server with NVLink; rates in bytes a second, each in one direction."""

    name: str
    num_bytes: float  # as torch reports them, a little less than on the box
    flops: float = 0  # a second, bfloat16, dense; 0: no rates are known
    memory_rate: float = 0
    host_rate: float = 0  # PCIe
    link_rate: float = 0  # NVLink


# Peaks by NVIDIA's datasheets of the SXM modules; time.py says what is reached of them.
GPUS = {
    "h200": Gpu("h200", 139.8 * GIB, 989e12, 4.8e12, 64e9, 450e9),
    "h100": Gpu("h100", 79.1 * GIB, 989e12, 3.35e12, 64e9, 450e9),
    "a100-80": Gpu("a100-80", 79.2 * GIB, 312e12, 2.04e12, 32e9, 300e9),
    "b200": Gpu("b200", 178.0 * GIB, 2250e12, 8.0e12, 64e9, 900e9),
}


def find_gpu(name: str, num_bytes: float | None = None) -> Gpu:
    """Find the card of that name, or torch's ("NVIDIA H200"), with `num_bytes` if given."""
    parts = re.findall(r"\w+", name.lower())
    gpu = next((g for g in GPUS.values() if g.name.partition("-")[0] in parts), Gpu(name, 0))
    return gpu._replace(num_bytes=num_bytes or gpu.num_bytes)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run on a machine. Raises ValueError for GPUs that the nodes cannot share."""

    sizes: ModelSizes
    run: RunArguments
    zero: ZeroSettings
    # Of OmniTrainingArguments, slow to import, by name and default.
    gradient_accumulation_steps: int = 32
    gradient_checkpointing: bool = True
    bf16: bool = True
    dataloader_num_workers: int = 2
    save_total_limit: int | None = 3
    # The machine.
    gpus: int  # of all nodes together
    nodes: int = 1
    gpu: Gpu | None = None  # None: the processes run on CPUs
    host_bytes: float  # of one node
    nvme_rate: float = 7e9  # bytes a second of all drives of a node
    network_rate: float = 400e9  # of a node

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(
                f"gpus={self.gpus}, nodes={self.nodes}: give the GPUs of all nodes together, as "
                "many on each node."
            )

    @property
    def itemsize(self) -> int:
        """Return the bytes of a weight and of an activation."""
        return 2 if self.bf16 else 4

    @property
    def largest_part(self) -> int:
        """Return the elements that one GPU keeps of the largest tensor under ZeRO-3."""
        return math.ceil(max(map(math.prod, self.sizes.shapes.values())) / self.gpus)

    def __str__(self) -> str:
        zero, kind = self.zero, self.gpu.name if self.gpu else "processes on CPUs"
        parts = [f"{self.gpus} {kind}" + f" on {self.nodes} nodes" * (self.nodes > 1)]
        parts += [f"--max_tokens {self.run.max_tokens}"]
        parts += [f"--gradient_accumulation_steps {self.gradient_accumulation_steps}"]
        parts += ["--gradient_checkpointing false"] * (not self.gradient_checkpointing)
        parts += [f"offload_param {zero.device}"] * (zero.stage == 3)
        parts += [f"buffer_size {zero.buffer_size:g}"] * (zero.device == "nvme")
        return ", ".join(parts + ["stage3_allgather_sequential"] * zero.stage3_allgather_sequential)
