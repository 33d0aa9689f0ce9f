"""Units and text while an answer is being made: what `generate.py` does at each new token.

The speech generator is causal, and frame 25 m + i repeats state m, so running it state by state
with a cache gives the very frames of the whole answer (`SpeechGeneratorCTC.predict`). The official
code (omni_speech/model/speech_generator/generation.py) runs it over the whole prefix at each token
instead: the same units, at a cost that grows with the square of the length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llama_omni.speech_generator import SpeechGeneratorCTC, collapse_path


class UnitStream:
    """Speech units of one answer, state by state; together they are the whole answer's units."""

    def __init__(self, generator: SpeechGeneratorCTC) -> None:
        self.generator = generator
        self.cache = DynamicCache()
        self.last_frame = -1  # what the newest frame said, so that a repeat is not a new unit

    def push(self, state: Tensor) -> list[int]:
        """(H,) the next token's state -> the units that it adds, often none."""
        one = torch.ones(1, dtype=torch.int64, device=state.device)
        num_frames = one * self.generator.upsample_factor
        logits = self.generator.decode(state[None, None], one, num_frames, cache=self.cache)
        path = logits[0].float().argmax(-1).tolist()
        units = collapse_path(path, blank=self.generator.blank, previous=self.last_frame)
        self.last_frame = path[-1]
        return units


class TextStream:
    """Text of one answer, token by token. A character cut between tokens waits for its rest."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.num_shown = 0  # characters given out

    def push(self, token: int) -> str:
        """The text that a token adds."""
        self.token_ids.append(token)
        text = decode_text(self.tokenizer, self.token_ids)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._show(text)

    def finish(self) -> str:
        """What waited for a rest that never came."""
        return self._show(decode_text(self.tokenizer, self.token_ids))

    def _show(self, text: str) -> str:
        shown, self.num_shown = self.num_shown, len(text)
        return text[shown:]


def decode_text(tokenizer: Any, token_ids: list[int]) -> str:
    """The answer as text, without <|eot_id|> and its like."""
    return tokenizer.decode(
        token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
