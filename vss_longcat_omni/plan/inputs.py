"""What the plan reckons with: GPUs, DeepSpeed's settings, the model's shapes, the run's options.

Shapes come from the model's own classes on the meta device. Nothing is loaded or downloaded, and
neither DeepSpeed nor the Trainer is imported.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vss_longcat_omni.model.config import LongcatOmniConfig
from vss_longcat_omni.model.loading import load_config
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vss_longcat_omni.options.run_arguments import RunArguments
    from vss_longcat_omni.options.training_arguments import OmniTrainingArguments

    Shape = tuple[int, ...]

GIB = 2**30
RELEASED = "meituan-longcat/LongCat-Flash-Omni"
OFFLOADS = ("none", "cpu", "nvme")
AUTO = "auto"
LANGUAGE_MODEL = ("model.", "lm_head.")
AUDIO_TABLES = ("audio_embedding.", "speech_heads.")
PROJECTORS = ("vision_projector.", "audio_projector.")
# The linear layers that adapters are put on, but that `lora_target_modules` may name some of them.
LORA_PLACES = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlps)\.\d\.(\w+)\.weight")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card of a server with NVLink; rates in bytes a second, each in one direction."""

    name: str
    num_bytes: float  # as torch reports them, a little less than on the box
    flops: float  # bfloat16, dense
    memory_rate: float
    host_rate: float  # PCIe
    link_rate: float  # NVLink


# Peaks by NVIDIA's datasheets of the SXM modules; time.py says what is reached of them.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h200", num_bytes=139.8 * GIB, flops=989e12, memory_rate=4.8e12,
            host_rate=64e9, link_rate=450e9),
        Gpu(name="h100", num_bytes=79.1 * GIB, flops=989e12, memory_rate=3.35e12,
            host_rate=64e9, link_rate=450e9),
        Gpu(name="a100-80", num_bytes=79.2 * GIB, flops=312e12, memory_rate=2.04e12,
            host_rate=32e9, link_rate=300e9),
        Gpu(name="b200", num_bytes=178.0 * GIB, flops=2250e12, memory_rate=8.0e12,
            host_rate=64e9, link_rate=900e9),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Machine:
    """`gpu_bytes` None: processes on CPUs. `host_bytes` is of one node; None: not looked at."""

    gpus: int  # of all nodes together
    nodes: int = 1
    gpu: Gpu | None = None  # None: a card that GPUS does not know; no times then
    gpu_bytes: float | None = None
    host_bytes: float | None = None
    nvme_rate: float = 7e9  # of all drives of a node
    network_rate: float = 400e9  # of a node

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(
                f"gpus={self.gpus}, nodes={self.nodes}: give the GPUs of all nodes together, as "
                "many on each node."
            )

    @property
    def per_node(self) -> int:
        return self.gpus // self.nodes

    @property
    def name(self) -> str:
        kind = "processes on CPUs" if self.gpu_bytes is None else "GPUs"
        if self.gpu is not None:
            kind = self.gpu.name
        return f"{self.gpus} {kind}" + (f" on {self.nodes} nodes" if self.nodes > 1 else "")


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """A DeepSpeed config's part that decides where weights are; numbers count elements."""

    source: str = ""  # empty: no DeepSpeed
    stage: int = 0
    offload: str = "none"
    pin_memory: bool = True
    buffer_count: int = 5
    buffer_size: float = 1e8
    offload_optimizer: bool = False
    max_live: float = 1e9
    prefetch_bucket: float = 5e7
    persistence_threshold: float = 1e5
    reduce_bucket: float = 5e8
    is_sequential: bool = False  # stage3_allgather_sequential


def read_zero_settings(config: str | dict[str, Any] | None, hidden_size: int) -> ZeroSettings:
    """From a DeepSpeed config; "auto" becomes what transformers puts there.

    Raises:
        ValueError: no such file, no JSON, or a value that is none.
    """
    if not config:
        return ZeroSettings()
    source, values = ("the given dict", config) if isinstance(config, dict) else _read_json(config)
    zero = values.get("zero_optimization", {})
    offload = zero.get("offload_param") or {}
    autos = {
        "stage3_prefetch_bucket_size": 0.9 * hidden_size**2,
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "reduce_bucket_size": hidden_size**2,
    }

    def number(where: dict[str, Any], name: str, default: float) -> float:
        value = where.get(name, default)
        value = autos.get(name, value) if value == AUTO else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"{source}: {name}={value!r}: give a number.")
        return value

    device = offload.get("device", "none")
    if device not in OFFLOADS:
        raise ValueError(
            f"{source}: offload_param.device={device!r}: choose one of {', '.join(OFFLOADS)}."
        )
    optimizer = (zero.get("offload_optimizer") or {}).get("device", "none")
    stage = int(number(zero, "stage", 0))
    return ZeroSettings(
        source=source,
        stage=stage,
        offload=device if stage == 3 else "none",
        pin_memory=bool(offload.get("pin_memory", True)),
        buffer_count=int(number(offload, "buffer_count", 5)),
        buffer_size=number(offload, "buffer_size", 1e8),
        offload_optimizer=optimizer != "none",
        max_live=number(zero, "stage3_max_live_parameters", 1e9),
        prefetch_bucket=number(zero, "stage3_prefetch_bucket_size", 5e7),
        persistence_threshold=number(zero, "stage3_param_persistence_threshold", 1e5),
        reduce_bucket=number(zero, "reduce_bucket_size", 5e8),
        is_sequential=bool(zero.get("stage3_allgather_sequential", False)),
    )


def _read_json(name: str) -> tuple[str, dict[str, Any]]:
    """A file of this folder where the current one has none of that name."""
    path = Path(name)
    beside = Path(__file__).parents[1] / path.name
    if not path.is_file() and path.parent == Path() and beside.is_file():
        path = beside
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such DeepSpeed config.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: not readable as JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name}: not a DeepSpeed config: it must be a JSON object.")
    return name, values


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on how much at once."""

    zero: ZeroSettings
    tuning: str = "lora"
    lora_r: int = 32
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] | None = None  # None: all places
    train_projectors: bool = False
    train_audio_heads: bool = False
    max_tokens: int = 8192  # of a micro-batch on one GPU
    grad_accum_steps: int = 32
    is_checkpointed: bool = True
    is_bf16: bool = True
    num_workers: int = 2
    num_checkpoints: int = 3

    @property
    def itemsize(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.is_bf16 else 4


def job_of(run: RunArguments, training: OmniTrainingArguments, hidden_size: int) -> Job:
    """Raises ValueError as `read_zero_settings` does."""
    return Job(
        zero=read_zero_settings(training.deepspeed, hidden_size),
        tuning=run.tuning,
        lora_r=run.lora_r,
        lora_dropout=run.lora_dropout,
        lora_targets=tuple(run.lora_target_modules),
        train_projectors=run.train_projectors,
        train_audio_heads=run.train_audio_heads,
        max_tokens=run.max_tokens,
        grad_accum_steps=training.gradient_accumulation_steps,
        is_checkpointed=training.gradient_checkpointing,
        is_bf16=training.bf16,
        num_workers=training.dataloader_num_workers,
        num_checkpoints=training.save_total_limit or 1,
    )


@dataclass(frozen=True)
class ModelSizes:
    """Every parameter's shape by name."""

    config: LongcatOmniConfig
    shapes: dict[str, Shape]

    @cached_property
    def expert_shapes(self) -> list[Shape]:
        """The fused tensors of one layer."""
        prefix = "model.layers.0.mlp.experts."
        return [shape for name, shape in self.shapes.items() if name.startswith(prefix)]

    @property
    def experts(self) -> int:
        """Elements of one layer's experts."""
        return sum(map(math.prod, self.expert_shapes))

    @property
    def largest(self) -> str:
        return max(self.shapes, key=lambda name: math.prod(self.shapes[name]))

    def count(self, *prefixes: str) -> int:
        """Elements of the parameters whose names begin so; of all without prefixes."""
        return sum(math.prod(s) for n, s in self.shapes.items() if n.startswith(prefixes or ""))

    def count_lora(self, r: int, targets: Iterable[str] | None = None) -> int:
        """Elements of the adapters: r rows of each input, r columns of each output."""
        wanted = None if targets is None else set(targets)
        matrices = (
            (LORA_PLACES.fullmatch(name), sum(shape))
            for name, shape in self.shapes.items()
            if len(shape) == 2
        )
        return sum(r * n for match, n in matrices if match and (not wanted or match[1] in wanted))

    def count_layer_tensors(self, *, lora: bool) -> int:
        """Of the language model's layers, with the two of each adapter."""
        layers = {n: shape for n, shape in self.shapes.items() if n.startswith("model.layers.")}
        matrices = (name for name, shape in layers.items() if len(shape) == 2)
        return len(layers) + 2 * lora * sum(bool(LORA_PLACES.fullmatch(n)) for n in matrices)

    def count_trained(self, job: Job) -> int:
        if job.tuning == "full":
            return self.count()
        trained = self.count_lora(job.lora_r, job.lora_targets)
        trained += self.count(*PROJECTORS) * job.train_projectors
        return trained + self.count(*AUDIO_TABLES) * job.train_audio_heads


def load_sizes(config: LongcatOmniConfig) -> ModelSizes:
    with torch.device("meta"):
        model = LongcatOmniForCausalLM(config)
    return ModelSizes(config, {name: tuple(p.shape) for name, p in model.named_parameters()})


def released_config() -> LongcatOmniConfig:
    """Of RELEASED: the defaults of the classes."""
    return LongcatOmniConfig(vision_config={}, audio_config={})


def find_config(name: str) -> LongcatOmniConfig | None:
    """Of a folder or of RELEASED, without the hub; None for another hub id."""
    if Path(name).expanduser().is_dir():
        return load_config(Path(name).expanduser())
    return released_config() if name.partition("@")[0] == RELEASED else None


def parse_bytes(text: str, field: str) -> float:
    """ "512G" -> bytes; K, M, G and T are powers of 1024, with or without "iB" or "B" behind.

    Raises:
        ValueError: another form, or 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"--{field} {text}: give a size as 80G, 512G or 1.5T.")
    return float(match[1]) * 1024 ** (1 + "KMGT".index(match[2].upper()))


def find_gpu(name: str) -> Gpu | None:
    """By its name in GPUS, or by what torch calls a card, as "NVIDIA H200"."""
    for gpu in GPUS.values():
        if re.search(rf"\b{gpu.name.partition('-')[0]}\b", name.lower()):
            return gpu
    return None
