"""Counts model FLOPs of a batch, for the MFU in the log and the times in `plan/__main__.py`.

A multiply-add counts 2. Attention counts half of the square when causal. Forward once; a trained
part three times (forward, gradient to inputs and to weights), a frozen part that gradients pass
through twice, and recomputed activations are not counted: they are no model FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_omni.options.config import parse_decoder_shape

if TYPE_CHECKING:
    from llama_omni.options.config import TrainConfig

# Dense bf16 by the vendors' datasheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class BatchSize:
    """Counts what one batch holds, padding included."""

    clips: int
    mel_frames: int  # a clip
    sequences: int
    tokens: int  # a sequence, speech placeholders included
    answer_tokens: int  # in all
    unit_frames: int = 0  # an answer, after repeating


def peak_flops(device_name: str) -> float | None:
    """Returns the datasheet's peak of a device by its name; None when unknown."""
    found = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def llama_layer_params(config: Any) -> int:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2 * config.hidden_size * head_dim * (heads + config.num_key_value_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def decoder_layer_params(config: Any) -> int:
    _, width, _, ffn = parse_decoder_shape(config.ctc_decoder_config)
    return 4 * width * width + 3 * width * ffn


def forward_flops(config: Any, size: BatchSize) -> dict[str, float]:
    """Counts the forward FLOPs of each part of an OmniSpeech2SConfig model for one batch."""
    width = config.speech_encoder_hidden_size
    states = -(-size.mel_frames // 2)
    conv = 2 * 3 * width * (config.mel_size * size.mel_frames + width * states)
    encoder_layer = 2 * 12 * width * width * states + 4 * states * states * width
    encoder = size.clips * (conv + config.speech_encoder_layers * encoder_layer)

    rate, hidden = config.speech_encoder_ds_rate, config.hidden_size
    projector = size.clips * (states // rate) * 2 * 2048 * (width * rate + hidden)

    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    all_tokens = size.sequences * size.tokens
    attention = 2 * all_tokens * size.tokens * heads * head_dim  # causal: half of 4 T^2
    llm = layers * (2 * llama_layer_params(config) * all_tokens + attention)
    parts = {
        "speech_encoder": float(encoder),
        "speech_projector": float(projector),
        "llm": float(llm),
        "lm_head": 2.0 * hidden * config.vocab_size * size.answer_tokens,
    }
    if size.unit_frames:
        depth, decoder_width, _, _ = parse_decoder_shape(config.ctc_decoder_config)
        frames = size.sequences * size.unit_frames
        per_layer = 2 * decoder_layer_params(config) * frames
        per_layer += 2 * frames * size.unit_frames * decoder_width
        head = 2 * decoder_width * (config.unit_vocab_size + 1) * frames
        parts["speech_generator"] = float(
            depth * per_layer + head + 2 * hidden * decoder_width * size.answer_tokens
        )
    return parts


def step_flops(model_config: Any, size: BatchSize, config: TrainConfig) -> float:
    """Counts the FLOPs of forward and backward in a run by `config`.

    Gradients pass through the language model to the projector in stage 1, whatever of it is
    trained.
    """
    parts = forward_flops(model_config, size)
    if config.stage == 2:
        return (
            parts["speech_encoder"]
            + parts["speech_projector"]
            + parts["llm"]
            + 3 * parts["speech_generator"]
        )
    passes = 3 if config.trains_backbone else 2
    return (
        parts["speech_encoder"] * (3 if config.tune_speech_encoder else 1)
        + parts["speech_projector"] * 3
        + (parts["llm"] + parts["lm_head"]) * passes
    )
