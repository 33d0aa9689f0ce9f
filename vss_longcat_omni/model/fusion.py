"""Merges the text stream, the audio streams and the two encoders to one embedding a position.

Place in the data flow: between the encoders and the language model. Rules of longcat_omni_demo.py
(`_get_input_embedding`) and encoders/embedding.py (meituan-longcat/LongCat-Flash-Omni).

B batch, T positions, S audio streams, H hidden size, V rows of an audio table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vss_longcat_omni.dataset.special_tokens import SpecialTokens


class AudioEmbeddings(nn.Module):
    """Has a table for each audio stream; keys as in `audio/audio_embeddings.pt`."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, num_streams: int = 4, pad: int = 3
    ) -> None:
        super().__init__()
        self.pad = pad
        self.audio_embeddings = nn.ModuleList(
            [nn.Embedding(vocab_size, hidden_size) for _ in range(num_streams)]
        )

    def forward(self, audio_ids: Tensor) -> Tensor:
        """Embed (B, T, S) ids to (B, T, H), the sum over the streams; PAD adds nothing.

        The released tables may hold anything in the PAD row, so its embedding is cleared here and
        not in the table.
        """
        total: Tensor | None = None
        for stream, table in enumerate(self.audio_embeddings):
            ids = audio_ids[..., stream]  # (B, T)
            embeds = table(ids).masked_fill((ids == self.pad)[..., None], 0.0)  # (B, T, H)
            total = embeds if total is None else total + embeds
        assert total is not None
        return total


def merge_embeddings(
    text_embeds: Tensor,
    audio_embeds: Tensor,
    input_ids: Tensor,
    audio_ids: Tensor,
    *,
    tokens: SpecialTokens,
    audio_features: Tensor | None = None,
    image_features: Tensor | None = None,
) -> Tensor:
    """Return (B, T, H) input embeddings of the language model.

    Text and audio embeddings are added. A text pad counts for nothing beside an audio code; where
    both streams are padding, the text pad's embedding stays. Features take the places of the audio
    and image pads, in the order of the flattened batch, so packed and padded batches are alike.

    Args:
        text_embeds, audio_embeds: (B, T, H), of `input_ids` and `audio_ids`.
        input_ids, audio_ids: (B, T), (B, T, S).
        audio_features, image_features: (number of pads in the batch, H); None leaves the pads.

    Raises:
        RuntimeError: another number of features than pads; on a GPU as a device-side assertion,
            since nothing here waits for the device. The collator should compare them before.
    """
    has_code = (audio_ids != tokens.codec.pad).any(dim=-1)  # (B, T)
    is_silent = (input_ids == tokens.pad) & has_code
    merged = text_embeds.masked_fill(is_silent[..., None], 0.0) + audio_embeds
    if audio_features is not None:
        merged = _place(merged, input_ids == tokens.audio_pad, audio_features, name="audio")
    if image_features is not None:
        merged = _place(merged, input_ids == tokens.image_pad, image_features, name="image")
    return merged


def _place(merged: Tensor, is_pad: Tensor, features: Tensor, *, name: str) -> Tensor:
    """Put the n-th feature at the n-th position where `is_pad`, without a host sync.

    A boolean index would wait for the device to count the pads. Their number is known: it is that
    of the features.
    """
    message = f"the batch has not as many {name} pads as {name} features"
    torch.ops.aten._assert_async.msg(is_pad.sum() == len(features), message)
    # A stable sort brings the pads to the front in their order.
    order = torch.argsort((~is_pad).flatten().to(torch.uint8), stable=True)
    positions = order[: len(features)]
    flat = merged.flatten(0, 1).index_copy(0, positions, features.to(merged.dtype))
    return flat.view_as(merged)
