"""Predicts the peak of a GPU's memory from sizes alone.

A training step has a few phases in which memory can be highest. What is alive in each is counted
from the code that allocates it, without a fitted constant; the largest sum is the peak, to be
compared with `torch.cuda.max_memory_allocated`:

- weights, gradients and states by the dtypes of `training/parallel.py` and `training/optimizer.py`;
- FSDP2 gathers a unit's weights in the compute dtype, one more unit ahead on several GPUs, copies
  its gradients to a flat float32 input and reduces them into a float32 output. Its root unit (all
  that is in no layer) stays gathered from the forward until it is reduced, last of all;
- activations are what autograd saves in transformers' Llama layers and in Whisper's blocks, losses
  what PyTorch's cross-entropy and CTC keep.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_omni.model.sizes import count_parameters
from llama_omni.plan.inputs import batch_size

if TYPE_CHECKING:
    from llama_omni.dataset.lengths import Lengths
    from llama_omni.model.sizes import ModelSizes
    from llama_omni.options.config import TrainConfig

FP32 = 4
STATE_BYTES = {"fp32_master": 8, "bf16_stochastic": 4, "8bit": 2}
ZERO_BUCKET = 500_000_000  # elements, DeepSpeed's default reduce_bucket_size
ZERO3_LIVE = 1_000_000_000  # elements, stage3_max_live_parameters


@dataclass(frozen=True)
class Memory:
    """Names the phase in which a GPU holds most, and the bytes of what it holds then."""

    phase: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Returns the bytes allocated, without allocator slack and CUDA context."""
        return sum(self.parts.values())


def predict_memory(config: TrainConfig, sizes: ModelSizes, lengths: Lengths, gpus: int) -> Memory:
    """Predicts the peak on one of `gpus` GPUs, from the second step on (states exist by then)."""
    run = _Run(config, sizes, lengths, gpus)
    fsdp, c, layer = run.is_fsdp, run.compute, run.layer_trained
    all_layers = {"kept for backward": run.depth * run.kept}
    at_loss = run.persistent(0) | run.encoder | run.gathered() | all_layers
    phases = {name: at_loss | parts for name, parts in run.losses().items()}
    backward = run.encoder | run.gathered(run.layer) | {
        "a layer in its backward": run.in_backward,
        "its gradients or casts": c * layer * (fsdp or run.is_autocast),
        "root unit's gradients": c * run.after * fsdp,
    }  # fmt: skip
    done = run.after * (not fsdp)
    phases["backward of the last layer"] = run.persistent(done) | backward | all_layers
    last = {"kept for backward": run.kept, "reduction of the layer before": FP32 * layer * fsdp}
    done += (run.depth - 1) * layer
    phases["backward of the first layer"] = run.persistent(done) | backward | last
    root = run.root_trained * fsdp
    cast = run.master if run.master < FP32 else 0
    phases["reduction of the root unit's gradients"] = run.persistent(run.trained - root) | {
        "reduction input": FP32 * root,
        "reduction output": max((FP32 + cast) * root // gpus, c * root),
    }
    phases["optimizer step"] = run.persistent(run.trained)
    highest = max(phases, key=lambda name: sum(phases[name].values()))
    return Memory(highest, {name: size for name, size in phases[highest].items() if size})


class _Run:
    """Counts what all phases share: elements, and bytes of the largest micro-batch."""

    def __init__(self, config: TrainConfig, sizes: ModelSizes, lengths: Lengths, gpus: int) -> None:
        self.config, self.sizes, self.gpus = config, sizes, gpus
        self.strategy = config.choose_strategy(has_gpu=True, world_size=gpus)
        self.is_fsdp = self.strategy == "fsdp2"
        self.compute = 2 if config.bf16 else FP32
        self.master = FP32 if config.optimizer_precision == "fp32_master" else 2
        # DDP computes in bf16 by autocast, which casts float32 weights as it goes.
        self.is_autocast = self.strategy == "ddp" and self.compute < self.master
        counts = count_parameters(config, sizes).values()
        self.total, self.trained = (sum(part) for part in zip(*counts, strict=True))
        self.batch = batch_size(lengths, config, is_largest=True)
        self.longest_units = max(sample.units for sample in lengths.samples)
        lora = sizes.lora_layer(config.lora_r) * config.lora_enable
        is_whole = config.trains_backbone or config.stage == 2
        # The stack of equal layers that gradients pass through, and what is trained after it.
        if config.stage == 1:
            self.depth, self.width = sizes.num_hidden_layers, sizes.hidden_size
            q = sizes.num_attention_heads * sizes.head_dim
            kv, ffn = sizes.num_key_value_heads * sizes.head_dim, sizes.intermediate_size
            self.layer, self.after = sizes.llama_layer + lora, sizes.embedding * is_whole
            self.layer_trained = lora or sizes.llama_layer * is_whole
            self.positions = self.batch.sequences * self.batch.tokens
        else:
            self.depth, self.width, _, ffn = config.decoder_shape
            q = kv = self.width
            self.layer = self.layer_trained = sizes.generator_layer
            self.after = sizes.generator - self.depth * self.layer
            self.positions = self.batch.sequences * self.batch.unit_frames
        # FSDP2's root unit: all that is in no layer.
        blocks = sizes.speech_encoder_layers * sizes.encoder_block
        frozen = sizes.num_hidden_layers * sizes.llama_layer * (config.stage == 2)
        self.root = self.total - self.depth * self.layer - blocks - frozen
        self.root_trained = self.trained - self.depth * self.layer_trained
        self.root_trained -= blocks * config.tune_speech_encoder
        self._set_activations(q, kv, ffn, is_whole=is_whole)

    def _set_activations(self, q: int, kv: int, ffn: int, *, is_whole: bool) -> None:
        """Counts what a layer keeps for its backward and holds beside in it, and the encoder's.

        A layer saves two RMSNorms (a float32 copy; the normalized values too when their weight is
        trained), inputs of the linears (by autocast one cast each, else shared), q, k, v and the
        attention's output, gate, SiLU, up and their product. LoRA: dropped-out input and dropout
        mask of each of 7 linears, and what is between its two matrices.
        """
        c, width, config = self.compute, self.width, self.config
        has_fp32_input = config.stage == 1 and self.is_autocast and is_whole  # the token table's
        self.residual = FP32 if has_fp32_input else c
        saved = 2 * FP32 * width + c * (2 * q + 2 * kv + 3 * ffn)
        if is_whole:
            saved += 2 * self.residual * width + c * (ffn + (5 if self.is_autocast else 2) * width)
        if config.lora_enable:
            saved += (c + (config.lora_dropout > 0)) * (5 * width + q + ffn) + 7 * c * config.lora_r
        # In the backward of gate times up: two more of the feed-forward width than are freed by
        # then, and the gradient of the layer's output.
        gradients = 2 * c * ffn + self.residual * width
        recomputes = config.gradient_checkpointing
        self.kept = self.positions * (self.residual * width if recomputes else saved)
        self.in_backward = self.positions * (gradients + saved * recomputes)
        # Stage 1's backward needs the projector's input, and the encoder's own if it is trained.
        blocks = self.sizes.speech_encoder_layers * config.tune_speech_encoder
        saved = self.sizes.speech_encoder_hidden_size * (1 + blocks * (1 if recomputes else 16))
        states = self.batch.clips * (self.batch.mel_frames // 2) * (config.stage == 1)
        self.encoder = {"encoder activations": c * states * saved}

    def persistent(self, done: int) -> dict[str, int]:
        """Counts what is held all the time, with the gradients of `done` parameters, or of all
        where they accumulate over micro-batches."""
        if self.strategy == "deepspeed":
            return self._zero()
        count = self.trained if self.config.grad_accum_steps(self.gpus) > 1 else done
        shards = self.gpus if self.is_fsdp else 1
        state = STATE_BYTES[self.config.optimizer_precision]
        has_buckets = self.strategy == "ddp" and self.gpus > 1
        return {
            "trained weights": self.master * self.trained // shards,
            "frozen weights": self.compute * (self.total - self.trained) // shards,
            "gradients": self.master * count // shards,
            "optimizer states": state * self.trained // shards,
            "DDP's copy of gradients": self.master * self.trained * has_buckets,
        }

    def _zero(self) -> dict[str, int]:
        """Counts ZeRO's by DeepSpeed's paper and documented defaults; not measured here."""
        path = Path(str(self.config.deepspeed))
        try:
            section = json.loads(path.read_text("utf-8")).get("zero_optimization", {})
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable DeepSpeed JSON file ({error}).") from None
        stage, c = section.get("stage", 2), self.compute
        on_gpu = section.get("offload_optimizer", {}).get("device", "none") == "none"
        return {
            "weights": c * self.total // (self.gpus if stage == 3 else 1),
            "gradients": c * self.trained // (self.gpus if stage >= 2 else 1),
            "master weights and states": on_gpu * 12 * self.trained // self.gpus,
            "gradients in float32": on_gpu * FP32 * self.trained // self.gpus,
            "gathered weights": c * min(self.total, ZERO3_LIVE) * (stage == 3),
            "reduce buckets": 2 * c * ZERO_BUCKET,
        }

    def gathered(self, layer: int = 0) -> dict[str, int]:
        """Counts FSDP2's whole weights of the root unit, of a layer, and of the next one."""
        layers = layer * (2 if self.gpus > 1 else 1)
        sizes = {"gathered root unit": self.root, "gathered layers": layers}
        return {name: self.compute * size * self.is_fsdp for name, size in sizes.items()}

    def losses(self) -> dict[str, dict[str, int]]:
        """Counts what is alive at the loss beside the layers' activations, phase by phase.

        Text: the last norm (its float32 input and the normalized values), logits, log-softmax and
        two gradients in float32; by autocast, also before these gradients. Units, in the backward
        of CTC: log-probabilities, and the lattice of alpha and beta, two units and one a frame.
        """
        c, hidden = self.compute, self.positions * self.width
        if self.config.stage == 1:
            logits = self.batch.answer_tokens * self.sizes.vocab_size
            norm = {"last norm": hidden * (self.residual + FP32)}
            phases = {"loss": norm | {"logits and cross-entropy": 12 * logits}}
            if self.is_autocast:
                casts = {"autocast's bf16 weights": c * self.trained}
                phases["end of forward"] = norm | casts | {"logits and cross-entropy": 8 * logits}
            return phases
        classes = self.positions * (self.sizes.unit_vocab_size + 1)
        lattice = FP32 * self.positions * (2 * self.longest_units + 1)
        casts = self.after if self.config.gradient_checkpointing else self.sizes.generator
        parts = {
            "last layer's output": c * hidden,
            "autocast's bf16 weights": c * casts * self.is_autocast,
            "CTC log-probabilities": 8 * classes,
            "CTC lattice": max(2 * lattice, FP32 * classes),
        }
        return {"CTC backward": parts}
