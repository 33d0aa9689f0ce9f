"""Predicts the peak of a GPU's memory from sizes alone; `__main__.py` prints it.

A training step has a few moments at which memory can be highest. For each one, what is alive then
is counted from the code that allocates it; the largest is the peak, to be compared with
`torch.cuda.max_memory_allocated`. Weights and all that goes with them are in `weights.py`;
here are activations (what autograd saves in transformers' Llama layers and in Whisper's blocks) and
losses (what PyTorch's cross-entropy and CTC keep).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_omni.options.config import parse_decoder_shape
from llama_omni.plan.weights import FP32, Part, Run, millions

if TYPE_CHECKING:
    from llama_omni.options.config import TrainConfig
    from llama_omni.plan.sizes import Lengths, ModelSizes

Moments = dict[str, list[Part]]


@dataclass(frozen=True)
class Memory:
    """What a GPU holds at the moment of its peak, and the sums at the other moments."""

    strategy: str
    moment: str
    parts: tuple[Part, ...]
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes allocated, without allocator slack and CUDA context."""
        return sum(part.num_bytes for part in self.parts)

    def __getitem__(self, name: str) -> int:
        """Bytes of the part of that name at the peak; 0 when it is not alive then."""
        return sum(part.num_bytes for part in self.parts if part.name == name)


def predict_memory(
    config: TrainConfig, model_sizes: ModelSizes, lengths: Lengths, world_size: int
) -> Memory:
    """The peak on one of `world_size` GPUs, from the second step on (states exist by then)."""
    run = Run(config, model_sizes, lengths, world_size)
    moments = stage1_moments(run) if config.stage == 1 else stage2_moments(run)
    sums = {name: sum(part.num_bytes for part in parts) for name, parts in moments.items()}
    highest = max(sums, key=lambda name: sums[name])
    parts = tuple(part for part in moments[highest] if part.num_bytes)
    return Memory(run.strategy, highest, parts, sums)


@dataclass(frozen=True)
class Layers:
    """Activations of a stack of equal layers for one micro-batch, in bytes a layer."""

    saved: int  # for its backward
    boundary: int  # its input
    gradients: int  # in its backward: of the output, and two more of the feed-forward width than
    # are freed by then, in the backward of gate times up
    is_recomputed: bool
    text: str

    def kept(self, alive: int) -> Part:
        """What `alive` layers hold, none of them recomputed yet."""
        text = f"{self.text} x {alive} layers"
        if self.is_recomputed:
            return Part("layer inputs", alive * self.boundary, text)
        return Part("layer activations", alive * self.saved, text)

    def in_backward(self) -> Part:
        """What one layer holds beside that."""
        if self.is_recomputed:
            size = self.saved + self.gradients
            return Part("one layer recomputed", size, "its activations and gradients")
        return Part("gradients of activations", self.gradients, "output, 2 x feed-forward")


def layer_activations(
    run: Run, *, width: int, q: int, kv: int, ffn: int, residual: int, is_trained: bool, lora: int
) -> int:
    """Bytes a token that autograd saves in one Llama layer of transformers.

    Two RMSNorms (a float32 copy; the normalised values too when their weight is trained), inputs of
    the linears (by autocast one cast each, else shared), q, k, v and the attention's output, gate,
    SiLU, up and their product. LoRA: dropped-out input and dropout mask of each of 7 linears.
    """
    compute = run.compute
    saved = 2 * FP32 * width + compute * (2 * q + 2 * kv + 3 * ffn)
    if is_trained:
        saved += 2 * residual * width + compute * (ffn + (5 if run.is_autocast else 2) * width)
    if lora:
        inputs = 5 * width + q + ffn
        saved += (compute + (run.config.lora_dropout > 0)) * inputs + 7 * compute * lora
    return saved


def language_model_layers(run: Run) -> Layers:
    config, sizes = run.config, run.sizes
    is_whole = config.trains_backbone
    # A float32 embedding table makes the residual stream float32 under autocast.
    residual = FP32 if run.is_autocast and is_whole else run.compute
    saved = run.tokens * layer_activations(
        run,
        width=sizes.hidden_size,
        q=sizes.num_attention_heads * sizes.head_dim,
        kv=sizes.num_key_value_heads * sizes.head_dim,
        ffn=sizes.intermediate_size,
        residual=residual,
        is_trained=is_whole,
        lora=config.lora_r * config.lora_enable,
    )
    boundary = run.tokens * sizes.hidden_size * residual
    gradients = 2 * run.compute * run.tokens * sizes.intermediate_size + boundary
    text = f"{run.largest.sequences} x {run.largest.tokens} tokens x {sizes.hidden_size}"
    return Layers(saved, boundary, gradients, config.gradient_checkpointing, text)


def stage1_moments(run: Run) -> Moments:
    """What is alive at the moments of a stage-1 step that can be the highest."""
    sizes, compute = run.sizes, run.compute
    count = sizes.num_hidden_layers
    layers = language_model_layers(run)
    head = sizes.embedding * run.config.trains_backbone
    layer = sizes.llama_layer + run.lora
    encoder = encoder_activations(run)
    # The last norm keeps its input in float32 and the normalised values.
    norm = Part("last norm", layers.boundary + FP32 * run.tokens * sizes.hidden_size, layers.text)
    logits = run.largest.answer_tokens * sizes.vocab_size
    loss = Part("logits and cross-entropy", 12 * logits,
                f"{run.largest.answer_tokens} answer tokens x {sizes.vocab_size} x 12 B "
                "(log-softmax and two gradients, float32)")  # fmt: skip
    own = compute * run.layer_trained if run.is_fsdp or run.is_autocast else 0
    backward = [
        *run.gathered(layer), encoder, layers.in_backward(),
        Part("head's gradient", compute * head * run.is_fsdp, "before its reduction"),
        Part("layer's own gradients or casts", own, millions(run.layer_trained)),
    ]  # fmt: skip
    done = head * (not run.is_fsdp) + (count - 1) * run.layer_trained
    moments = {
        "speech encoder": [*run.lasting(0), *run.gathered(), encoder_working(run)],
        "loss": [*run.lasting(0), *run.gathered(), encoder, layers.kept(count), norm, loss],
        "backward of the last layer": [
            *run.lasting(head * (not run.is_fsdp)), *backward, layers.kept(count),
        ],
        "backward of the first layer": [
            *run.lasting(done), *backward, layers.kept(1),
            Part("previous layer's reduction input", FP32 * run.layer_trained * run.is_fsdp,
                 "float32"),
        ],
    }  # fmt: skip
    if run.is_autocast:
        moments["end of forward"] = [
            *run.lasting(0), encoder, layers.kept(count), norm,
            Part("autocast's bf16 weights", compute * run.trained, millions(run.trained)),
            Part("logits and cross-entropy", 8 * logits, "logits and log-softmax, float32"),
        ]  # fmt: skip
    return {**moments, **run.root_reduction(), **run.optimizer_step()}


def encoder_activations(run: Run) -> Part:
    """What the backward needs of the encoder (if trained) and the projector."""
    width = run.sizes.speech_encoder_hidden_size
    saved = run.states * width * run.compute  # the projector's input
    if run.config.tune_speech_encoder:
        each = 1 if run.config.gradient_checkpointing else 16
        saved += each * run.states * width * run.compute * run.sizes.speech_encoder_layers
    clips = f"{run.largest.clips} clips x {run.largest.mel_frames // 2} states"
    return Part("encoder activations", saved, clips)


def encoder_working(run: Run) -> Part:
    """The widest point of a block: residual, norm, and 4 widths before and after GELU."""
    size = 10 * run.states * run.sizes.speech_encoder_hidden_size * run.compute
    return Part("encoder activations", size, f"{run.states} states x 10 widths")


def generator_layers(run: Run) -> Layers:
    _, width, _, ffn = parse_decoder_shape(run.sizes.ctc_decoder_config)
    frames, compute = run.frames, run.compute
    a_frame = layer_activations(
        run, width=width, q=width, kv=width, ffn=ffn, residual=compute, is_trained=True, lora=0
    )
    boundary = frames * width * compute
    gradients = 2 * compute * frames * ffn + boundary
    text = f"{run.largest.sequences} x {run.largest.unit_frames} frames x {width}"
    is_recomputed = run.config.gradient_checkpointing
    return Layers(frames * a_frame, boundary, gradients, is_recomputed, text)


def stage2_moments(run: Run) -> Moments:
    """What is alive at the moments of a stage-2 step that can be the highest."""
    sizes, compute = run.sizes, run.compute
    count = parse_decoder_shape(sizes.ctc_decoder_config)[0]
    layers, unit = generator_layers(run), sizes.generator_layer
    ends = sizes.generator - count * unit
    output = Part("last layer's output", layers.boundary, layers.text)
    classes = run.frames * (sizes.unit_vocab_size + 1)
    lattice = FP32 * run.frames * (2 * run.longest_units + 1)
    hidden = run.tokens * sizes.hidden_size
    one_layer = hidden * (2 * compute + FP32) + 3 * compute * run.tokens * sizes.intermediate_size

    def casts(number: int) -> Part:
        size = compute * number * run.is_autocast
        return Part("autocast's bf16 weights", size, f"{millions(number)} x {compute} B")

    own = Part("layer's own gradients", compute * unit * run.is_fsdp, millions(unit))
    backward = [*run.gathered(unit), casts(unit), own, layers.in_backward()]
    moments = {
        "forward of the language model": [
            *run.lasting(0), *run.gathered(sizes.llama_layer),
            Part("language model's activations", one_layer, "one layer, nothing saved"),
        ],
        "end of forward": [
            *run.lasting(0), *run.gathered(), casts(sizes.generator), layers.kept(count), output,
            Part("language model's states", hidden * (compute + FP32 * run.is_autocast),
                 f"{run.tokens} tokens"),
            Part("CTC log-probabilities", classes * (compute + 8), "logits, log-softmax"),
            Part("CTC lattice", lattice, "alpha: 2 x units + 1 a frame, float32"),
        ],
        "CTC backward": [
            *run.lasting(0), *run.gathered(), layers.kept(count), output,
            casts(ends if layers.is_recomputed else sizes.generator),
            Part("CTC log-probabilities", 8 * classes, "8 B a class, with gradient"),
            Part("CTC lattice", max(2 * lattice, FP32 * classes),
                 "alpha and beta: 2 x units + 1 a frame, float32"),
        ],
        "backward of the last generator layer": [
            *run.lasting(ends), *backward, layers.kept(count),
        ],
        "backward of the first generator layer": [
            *run.lasting(sizes.generator), *backward, layers.kept(1),
        ],
    }  # fmt: skip
    return {**moments, **run.root_reduction(), **run.optimizer_step()}
