"""Runs Whisper's encoder at each clip's true length: log-mel frames in, a state per 20 ms out.

First stop of the speech after the collator. Module names are openai-whisper's, which released
LLaMA-Omni checkpoints use (`model.speech_encoder.blocks.0.attn.query.weight`); weights of a
transformers Whisper folder are renamed by `rename_hf_key`.

transformers' own encoder insists on 3000 frames and ignores the padding. Here positions are cut to
the longest clip of the batch and padding is masked, so a clip gives the same states alone as in
any batch; 30 s clips (`pad_audio_to_30s`) give Whisper's own states.

Shapes: S clips, M mel bins, F mel frames (10 ms), T = ceil(F / 2) states, D width.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_STATES = 1500  # 30 s
HEAD_DIM = 64  # of every Whisper size

# transformers' names -> openai-whisper's, applied in order to the part after `encoder.`
HF_RENAMES = (
    (r"^layers\.", "blocks."),
    (r"^embed_positions\.weight$", "positional_embedding"),
    (r"^layer_norm\.", "ln_post."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"\.final_layer_norm\.", ".mlp_ln."),
    (r"\.self_attn\.q_proj\.", ".attn.query."),
    (r"\.self_attn\.k_proj\.", ".attn.key."),
    (r"\.self_attn\.v_proj\.", ".attn.value."),
    (r"\.self_attn\.out_proj\.", ".attn.out."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
)


def rename_hf_key(key: str) -> str | None:
    """Renames a transformers Whisper weight as openai-whisper does; None for the decoder's."""
    found = re.search(r"(?:^|\.)encoder\.(.*)$", key)
    if found is None or "decoder." in key:
        return None
    name = found.group(1)
    for pattern, replacement in HF_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def num_encoder_states(mel_frames: Tensor) -> Tensor:
    """Counts the states that the encoder gives for a number of mel frames: ceil(F / 2)."""
    return (mel_frames + 1) // 2


class Attention(nn.Module):
    """Computes bidirectional attention; the key projection has no bias, as in Whisper."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = [
            proj(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (S, heads, T, 64)
            for proj in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Applies attention and MLP, each after its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.attn_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), mask)
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(nn.Module):
    """Runs Whisper's encoder with a padding mask; `width` must be a multiple of 64."""

    def __init__(self, *, mel_size: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mel_size, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(torch.zeros(MAX_STATES, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_layers)])
        self.ln_post = nn.LayerNorm(width)
        self.gradient_checkpointing = False

    def forward(self, mel: Tensor, mel_lengths: Tensor) -> Tensor:
        """Encodes (S, M, F) of (S,) frames as (S, T, D); ignore states beyond a clip's own."""
        in_clip = torch.arange(mel.shape[-1], device=mel.device) < mel_lengths[:, None]  # (S, F)
        x = F.gelu(self.conv1(mel)) * in_clip[:, None]  # what follows a clip reads as zeros
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (S, T, D)
        x = x + self.positional_embedding[: x.shape[1]]
        is_valid = (
            torch.arange(x.shape[1], device=x.device) < num_encoder_states(mel_lengths)[:, None]
        )
        mask = is_valid[:, None, None, :]  # (S, 1, 1, T): every state may attend to valid ones
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return self.ln_post(x)
