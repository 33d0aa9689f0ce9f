"""Joins neighboring encoder frames and projects them to the language model's width.

Second stop of the speech after `speech_encoder.py`; its output stands in for the `<speech>` tokens.
Follows omni_speech/model/speech_projector/speech_projector.py of ictnlp/LLaMA-Omni.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

INNER_SIZE = 2048  # fixed in the official code


class EncoderProjectorConcat(nn.Module):
    """Maps `k` frames of width D side by side by Linear -> ReLU -> Linear to the LLM's width H.

    `config` needs speech_encoder_ds_rate (k), speech_encoder_hidden_size (D), hidden_size (H).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.k = config.speech_encoder_ds_rate
        self.linear1 = nn.Linear(config.speech_encoder_hidden_size * self.k, INNER_SIZE)
        self.linear2 = nn.Linear(INNER_SIZE, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, D) to (B, T // k, H); the last T % k frames are dropped."""
        batch, frames, width = x.shape
        x = x[:, : frames - frames % self.k].reshape(batch, frames // self.k, width * self.k)
        return self.linear2(torch.relu(self.linear1(x)))
