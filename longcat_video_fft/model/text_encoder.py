"""Captions -> embeddings: frozen UMT5, of which the valid tokens alone are kept.

    caption -> cleaned -> ids (at most 512) -> last_hidden_state (L, D) bf16

The official model pads to 512 tokens and multiplies the padding's embeddings by zero before its
attention (`text_tokens_zero_pad`), so valid tokens padded with zeros again are the same to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from longcat_video_fft.options.buckets import MAX_TOKENS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer; raises ValueError when the folder holds none."""
    from transformers import AutoTokenizer  # here: the plan imports this file too

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder}: no tokenizer ({error}). It is the folder tokenizer/ of LongCat-Video."
        ) from error


def count_tokens(tokenizer: Any, captions: list[str]) -> list[int]:
    """Counts tokens of cleaned captions, the end mark included, before the cut at MAX_TOKENS."""
    return [len(ids) for ids in tokenizer(captions)["input_ids"]] if captions else []


class TextEncoder:
    """Encodes captions by UMT5 in bf16 on `device`.

    Raises:
        ValueError: no UMT5 in the folder.
    """

    def __init__(self, folder: Path, tokenizer: Any, device: torch.device) -> None:
        from transformers import UMT5EncoderModel

        self.tokenizer = tokenizer
        self.device = device
        try:
            self.model = UMT5EncoderModel.from_pretrained(
                folder, dtype=torch.bfloat16, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{folder}: no UMT5 encoder ({error}). It is the folder text_encoder/ of "
                "LongCat-Video."
            ) from error
        self.model = self.model.to(device).eval().requires_grad_(False)  # pyright: ignore

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """Encodes cleaned captions -> (L, D) bf16 on the CPU each, padded to the longest in
        between.

        UMT5's positions are relative and padding is masked, so valid tokens do not see it; a batch
        of other captions changes their last bits alone.
        """
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        states = self.model(tokens.input_ids, attention_mask=tokens.attention_mask)
        hidden = states.last_hidden_state.to(torch.bfloat16).cpu()  # (B, L, D)
        lengths = tokens.attention_mask.sum(1).tolist()
        return [row[:length].clone() for row, length in zip(hidden, lengths, strict=True)]
