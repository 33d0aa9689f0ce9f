"""Reads from a DeepSpeed config where weights are; the plan computes with it.

DeepSpeed, slow to import, is not imported: a value that cannot be is reported before anything is
loaded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vss_longcat_omni.options.run_arguments import read_json

OFFLOADS = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class ZeroSettings:
    """Decides where weights are, by the names in a DeepSpeed config, with its defaults."""

    stage: float = 0  # 0 also without DeepSpeed
    device: str = "none"  # of offload_param, as the next three
    pin_memory: bool = True
    buffer_count: float = 5
    buffer_size: float = 1e8  # elements
    optimizer_device: str = "none"
    reduce_bucket_size: float = 5e8  # elements
    stage3_allgather_sequential: bool = False


def read_zero_settings(config: str | dict[str, Any] | None, hidden_size: int) -> ZeroSettings:
    """Return the settings in a DeepSpeed config, or in one of that name in this folder; "auto"
    becomes what transformers puts there. Raises ValueError: no such file, no JSON, a bad value."""
    source, values = "the given dict", config or {}
    if isinstance(values, str):
        beside = Path(__file__).parents[1] / values
        is_beside = beside.is_file() and not Path(values).is_file()
        source, values = values, read_json(beside if is_beside else Path(values), name=values)
    zero = values.get("zero_optimization", {})
    given = zero | ((zero.get("offload_param") or {}) if zero.get("stage") == 3 else {})
    given["optimizer_device"] = (zero.get("offload_optimizer") or {}).get("device", "none")
    if given.get("reduce_bucket_size") == "auto":
        given["reduce_bucket_size"] = hidden_size**2
    found = {name: given.get(name, default) for name, default in asdict(ZeroSettings()).items()}
    for name in ("stage", "buffer_count", "buffer_size", "reduce_bucket_size"):
        if type(found[name]) not in (int, float) or found[name] < 0:
            raise ValueError(f"{source}: {name}={found[name]!r}: give a number.")
    if (device := found["device"]) not in OFFLOADS:
        choices = ", ".join(OFFLOADS)
        raise ValueError(f"{source}: offload_param.device={device!r}: choose one of {choices}.")
    return ZeroSettings(**found)
