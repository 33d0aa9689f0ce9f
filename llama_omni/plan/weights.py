"""Bytes of weights, gradients and optimizer states on a GPU under each way to spread them.

The half of `memory.py` that does not depend on the batch. Neither has a fitted constant:

- dtypes: `set_dtypes` of `training/parallel.py`, and `training/optimizer.py`;
- FSDP2 (torch/distributed/fsdp/_fully_shard): a unit's weights are gathered in the compute dtype,
  a copy even on one GPU, and one more unit is fetched ahead on several; a unit's gradients are
  copied to a flat float32 input and reduced into a float32 output. The root unit (embeddings, head,
  projector, convolutions) stays gathered from the forward until it is reduced, last of all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_omni.options.config import parse_decoder_shape
from llama_omni.plan.sizes import INNER_SIZE

if TYPE_CHECKING:
    from llama_omni.options.config import TrainConfig
    from llama_omni.plan.sizes import Lengths, ModelSizes

FP32 = 4
STATE_BYTES = {"fp32_master": 8, "bf16_stochastic": 4, "8bit": 2}
CHUNK = 1 << 25  # optimizer.CHUNK: elements that LowPrecisionAdamW updates at once
ZERO_BUCKET = 500_000_000  # elements, DeepSpeed's default reduce_bucket_size
ZERO3_LIVE = 1_000_000_000  # elements, stage3_max_live_parameters


@dataclass(frozen=True)
class Part:
    name: str
    num_bytes: int
    formula: str


def count_parameters(config: TrainConfig, sizes: ModelSizes) -> dict[str, tuple[int, int]]:
    """(all, trained) elements of each part; the names are those of train.py's log."""
    language_model, lora = sizes.language_model, 0
    if config.stage == 1 and config.lora_enable:
        lora = sizes.num_hidden_layers * sizes.lora_layer(config.lora_r)
    trained = lora or language_model * config.trains_backbone
    counts = {
        "language model": (language_model + lora, trained),
        "speech_encoder": (sizes.encoder, sizes.encoder * config.tune_speech_encoder),
        "speech_projector": (sizes.projector, sizes.projector * (config.stage == 1)),
    }
    if config.stage == 2:
        counts["speech_generator"] = (sizes.generator, sizes.generator)
    return counts


class Run:
    """Bytes and counts that all moments share. Counts are elements, `largest` a micro-batch."""

    def __init__(
        self, config: TrainConfig, sizes: ModelSizes, lengths: Lengths, world_size: int
    ) -> None:
        self.config, self.sizes, self.world_size = config, sizes, world_size
        self.strategy = config.choose_strategy(has_gpu=True, world_size=world_size)
        self.is_fsdp = self.strategy == "fsdp2"
        self.compute = 2 if config.bf16 else FP32
        self.master = FP32 if config.optimizer_precision == "fp32_master" else 2
        # DDP computes in bf16 by autocast, which casts float32 weights as it goes.
        self.is_autocast = self.strategy == "ddp" and self.compute < self.master
        counts = count_parameters(config, sizes)
        self.total = sum(total for total, _ in counts.values())
        self.trained = sum(trained for _, trained in counts.values())
        self.has_all_gradients = config.grad_accum_steps(world_size) > 1
        self.largest = lengths.batch(config, is_largest=True)
        self.longest_units = max(sample.units for sample in lengths.samples)
        self.tokens = self.largest.sequences * self.largest.tokens
        self.frames = self.largest.sequences * self.largest.unit_frames
        self.states = self.largest.clips * (self.largest.mel_frames // 2)
        self.lora = sizes.lora_layer(config.lora_r) * config.lora_enable
        self.layer_trained = self.lora or sizes.llama_layer * config.trains_backbone

    @property
    def root(self) -> tuple[int, int]:
        """(all, trained) elements of FSDP2's root unit: all that is in no layer."""
        sizes, is_stage2 = self.sizes, self.config.stage == 2
        generator = (
            parse_decoder_shape(sizes.ctc_decoder_config)[0] * sizes.generator_layer * is_stage2
        )
        blocks = sizes.speech_encoder_layers * sizes.encoder_block
        layers, own = sizes.num_hidden_layers, sizes.llama_layer + self.lora
        trained = self.trained - layers * self.layer_trained - generator
        return (
            self.total - layers * own - blocks - generator,
            trained - blocks * self.config.tune_speech_encoder,
        )

    def lasting(self, done: int | None = None) -> list[Part]:
        """What is there all the time, with the gradients of `done` parameters (None: of all)."""
        if self.strategy == "deepspeed":
            return self._lasting_zero()
        count = self.trained if done is None or self.has_all_gradients else done
        shard = self.world_size if self.is_fsdp else 1
        frozen = self.total - self.trained
        state = STATE_BYTES[self.config.optimizer_precision]
        per = f" / {shard} GPUs" if shard > 1 else ""
        parts = [
            Part("trained weights", self.master * self.trained // shard,
                 f"{millions(self.trained)} x {self.master} B{per}"),
            Part("frozen weights", self.compute * frozen // shard,
                 f"{millions(frozen)} x {self.compute} B{per}"),
            Part("gradients", self.master * count // shard,
                 f"{millions(count)} x {self.master} B{per}"),
            Part("optimizer states", state * self.trained // shard,
                 f"{millions(self.trained)} x {state} B{per} (AdamW, "
                 f"{self.config.optimizer_precision})"),
        ]  # fmt: skip
        if self.strategy == "ddp" and self.world_size > 1:
            size = self.master * self.trained
            parts.append(Part("DDP buckets", size, "a second copy of all gradients"))
        return parts

    def _lasting_zero(self) -> list[Part]:
        """ZeRO by DeepSpeed's paper and documented defaults; not measured here."""
        path = Path(str(self.config.deepspeed))
        try:
            section = json.loads(path.read_text("utf-8")).get("zero_optimization", {})
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable DeepSpeed JSON file ({error}).") from None
        stage, gpus = section.get("stage", 2), self.world_size
        on_gpu = section.get("offload_optimizer", {}).get("device", "none") == "none"
        weights = self.compute * self.total // (gpus if stage == 3 else 1)
        gradients = self.compute * self.trained // (gpus if stage >= 2 else 1)
        live = min(self.total, ZERO3_LIVE) * self.compute * (stage == 3)
        bucket = 2 * ZERO_BUCKET * self.compute
        return [
            Part("weights", weights, f"ZeRO-{stage}: {millions(self.total)} x {self.compute} B"),
            Part("gradients", gradients, f"{millions(self.trained)} x {self.compute} B"),
            Part("master weights and states", on_gpu * 12 * self.trained // gpus,
                 f"{millions(self.trained)} x 12 B / {gpus} GPU(s)"),
            Part("gradients in float32", on_gpu * 4 * self.trained // gpus, "at the step"),
            Part("gathered weights", live, "stage3_max_live_parameters"),
            Part("reduce buckets", bucket, "2 x reduce_bucket_size (default 5e8)"),
        ]  # fmt: skip

    def gathered(self, *units: int) -> list[Part]:
        """FSDP2's whole weights of the root and of `units`, in the compute dtype."""
        if not self.is_fsdp:
            return []
        ahead = 2 if self.world_size > 1 else 1
        root = self.root[0]
        parts = [Part("gathered root unit", self.compute * root,
                      f"{millions(root)} x {self.compute} B, until backward ends")]  # fmt: skip
        for unit in units:
            note = ", and the next one fetched ahead" if ahead > 1 else ""
            parts.append(
                Part("gathered layer", ahead * self.compute * unit, f"{millions(unit)}{note}")
            )
        return parts

    def root_reduction(self) -> dict[str, list[Part]]:
        """FSDP2 reduces the root's gradients last: flat float32 input and output."""
        trained = self.root[1]
        if not self.is_fsdp or not trained:
            return {}
        reduce = FP32 if self.compute < FP32 else self.compute
        cast = self.master if self.master != reduce else 0
        after = (reduce + cast) * trained // self.world_size
        return {
            "reduction of the root unit's gradients": [
                *self.lasting(self.trained - trained),
                Part("reduction input", reduce * trained, f"{millions(trained)} x {reduce} B"),
                Part("reduction output", max(after, self.compute * trained),
                     f"{reduce} B{f' + {cast} B cast' if cast else ''} / {self.world_size} GPU(s), "
                     f"or the {self.compute} B gradients before"),
            ]
        }  # fmt: skip

    def optimizer_step(self) -> dict[str, list[Part]]:
        scratch = 0
        if self.config.optimizer_precision != "fp32_master":
            shard = self.world_size if self.is_fsdp else 1
            scratch = 7 * FP32 * min(CHUNK, self.largest_matrix() // shard)
        formula = "7 float32 tensors of the largest matrix, or of 2^25 elements of it"
        return {"optimizer step": [*self.lasting(), Part("optimizer scratch", scratch, formula)]}

    def largest_matrix(self) -> int:
        """Elements of the largest trained weight."""
        sizes = self.sizes
        if self.config.stage == 2:
            _, width, _, ffn = parse_decoder_shape(sizes.ctc_decoder_config)
            return width * max(ffn, width, sizes.hidden_size)
        joined = sizes.speech_encoder_ds_rate * sizes.speech_encoder_hidden_size
        largest = INNER_SIZE * max(joined, sizes.hidden_size)
        if self.config.trains_backbone:
            ffn = sizes.hidden_size * sizes.intermediate_size
            largest = max(largest, sizes.embedding, ffn)
        if self.lora:
            widest = max(sizes.hidden_size, sizes.intermediate_size)
            largest = max(largest, self.config.lora_r * widest)
        return largest


def millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"
