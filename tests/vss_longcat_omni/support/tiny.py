"""Tiny models of the real classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vss_longcat_omni.dataset.examples import Example
from vss_longcat_omni.dataset.special_tokens import SpecialTokens
from vss_longcat_omni.dataset.template import (
    ROLE_ASSISTANT,
    ROLE_USER,
    Streams,
    build_labels,
    delay_codes,
)
from vss_longcat_omni.model.config import LongcatOmniConfig

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,  # transformers' name of the rotary width
    "v_head_dim": 8,
    "moe_topk": 4,
    "n_routed_experts": 6,
    "zero_expert_num": 3,
    "expert_ffn_hidden_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "max_position_embeddings": 512,
}


def tiny_config(**changes: Any) -> LongcatOmniConfig:
    values: dict[str, Any] = SIZES | {"audio_vocab_size": 64} | changes
    return LongcatOmniConfig(**values)


@torch.no_grad()
def randomize(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Every parameter and buffer random, norms and the router's correction included."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        center = 1.0 if "norm" in name and tensor.ndim == 1 else 0.0
        scale = 0.02 if "correction" in name else tensor.shape[-1] ** -0.5 * 1.5
        tensor.copy_(center + scale * torch.randn(tensor.shape, generator=generator))


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "adaptor_dim": 24,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 24,
    "proj_size": 12,
    "vocab_size": 5,
    "nlayer": 2,
    "num_right_layers": 1,
    "dropout": 0.0,
}


def make_example(seed: int, *, num_text: int, num_frames: int, has_media: bool = True) -> Example:
    """A question of one pair of frames and three audio tokens, and an answer in one segment."""
    generator = torch.Generator().manual_seed(seed)
    tokens = SpecialTokens()

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    media = [tokens.image_pad] * 2 + [tokens.audio_pad] * 3 if has_media else []
    prompt = torch.tensor([150, *media, 151])
    frames = delay_codes(draw(0, 32, num_frames, 4), codec=tokens.codec)
    text = torch.full((len(frames),), tokens.pad)
    text[:num_text] = draw(160, 290, num_text)
    text[num_text] = tokens.eos
    silence = torch.full((len(prompt), 4), tokens.codec.pad)
    streams = Streams(
        torch.cat([prompt, text]),
        torch.cat([silence, frames]),
        torch.tensor([ROLE_USER] * len(prompt) + [ROLE_ASSISTANT] * len(frames)),
    )
    text_labels, audio_labels = build_labels(streams, tokens=tokens)
    return Example(
        input_ids=streams.input_ids,
        audio_ids=streams.audio_ids,
        text_labels=text_labels,
        audio_labels=audio_labels,
        pixel_values=torch.randn(4 if has_media else 0, 1176, generator=generator),
        grids=[(1, 2, 2)] if has_media else [],
        pooled_grids=[(2, 2)] if has_media else [],
        features=torch.randn(3 if has_media else 0, 1200, generator=generator),
    )
