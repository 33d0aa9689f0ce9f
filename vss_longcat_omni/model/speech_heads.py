"""Has four heads that predict one frame's codes: the semantic one, then three acoustic ones.

They form a cascade (report 3.2.2; the structure is in the serving port, see the README): each head
sees the hidden state plus embeddings of the codes before it in the same frame.

Shapes: N positions, H hidden size, V rows of an audio table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from vss_longcat_omni.model.config import LongcatOmniConfig


class AudioOutputLayers(nn.Module):
    """Has the keys of `audio/audio_output_layers.pt`."""

    def __init__(self, config: LongcatOmniConfig) -> None:
        super().__init__()
        size, vocab, num_heads = config.hidden_size, config.audio_vocab_size, config.audio_head_num
        self.audio_output_layers = nn.ModuleList(
            [nn.Linear(size, vocab, bias=False) for _ in range(num_heads)]
        )
        self.embedding = nn.ModuleList([nn.Embedding(vocab, size) for _ in range(num_heads - 1)])

    def forward(self, hidden: Tensor, targets: Tensor) -> list[Tensor]:
        """Return logits (N, V) of each head after (N, H); the codes before it are `targets`, (N,
        heads): the true ids of the frame that each position predicts."""
        logits = []
        for head, layer in enumerate(self.audio_output_layers):
            logits.append(layer(hidden))
            if head < len(self.embedding):
                hidden = hidden + self.embedding[head](targets[:, head])
        return logits

    def choose(self, hidden: Tensor, pick: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Choose a frame's ids (N,) a head, each by `pick(head, logits)` before the next head."""
        ids = []
        for head, layer in enumerate(self.audio_output_layers):
            ids.append(pick(head, layer(hidden)))
            if head < len(self.embedding):
                hidden = hidden + self.embedding[head](ids[-1])
        return ids
