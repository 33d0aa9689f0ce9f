"""Generates an answer row by row: a text id and one id of each audio stream at a time.

Used by answerer.py; answer.py reads the rows. The states are those of the
serving port (shineran96/vllm, longcat_flash_omni.py): text and sound together until the text ends,
sound alone until the semantic stream ends, then the next segment or the end.

Shapes: T prompt positions, S audio streams, R generated rows, V rows of an audio table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vss_longcat_omni.model.attention import LatentCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.dataset.template import Streams
    from vss_longcat_omni.model.omni import LongcatOmniForCausalLM, Pictures, Sound


@dataclass(frozen=True)
class DecodingOptions:
    """Greedy by default, as the official demo.

    Attributes:
        max_rows: the answer is cut there (16.67 rows are a second of speech).
        temperature: above 0, ids are drawn.
        audio_repetition_penalty: what the scores of the last `penalty_window` ids of a stream are
            divided by, once for each time (the official server: 1.1 over 30 rows).
        has_text: False for a model trained with --transcripts none: its text stream is all pads.
        num_codes: entries of each stream's codebook; more are never chosen.
    """

    max_rows: int = 500
    temperature: float = 0.0
    audio_repetition_penalty: float = 1.0
    penalty_window: int = 30
    has_text: bool = True
    num_codes: Sequence[int] = (8192, 8100, 8100, 8100)
    seed: int = 0


@torch.no_grad()
def generate_rows(
    model: LongcatOmniForCausalLM,
    prompt: Streams,
    pictures: Pictures | None,
    sound: Sound | None,
    options: DecodingOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """(R,) text ids and (R, S) audio ids of the answer to one prompt."""
    options = options or DecodingOptions()
    device = model.lm_head.weight.device
    embeds = model.embed(prompt.input_ids.to(device), prompt.audio_ids.to(device), pictures, sound)
    caches = [LatentCache() for _ in range(2 * model.config.num_layers)]
    positions = torch.arange(len(embeds), device=device)
    hidden = model.model(embeds, positions, [len(embeds)], caches)[-1:]  # (1, H)
    chooser = _Chooser(model, options, device)
    for row in range(options.max_rows):
        chooser.choose(hidden)
        if chooser.is_done:
            break
        text, audio = chooser.last_row()
        embeds = model.embed(text, audio)
        position = torch.tensor([len(prompt.input_ids) + row], device=device)
        hidden = model.model(embeds, position, [1], caches)
    return torch.cat(chooser.text_rows), torch.cat(chooser.audio_rows)


class _Chooser:
    """The state machine: what each stream may say next."""

    def __init__(
        self, model: LongcatOmniForCausalLM, options: DecodingOptions, device: torch.device
    ) -> None:
        self.model, self.options = model, options
        self.tokens = model.tokens
        self.text_rows: list[Tensor] = []  # each (1,)
        self.audio_rows: list[Tensor] = []  # each (1, S)
        self.is_first = True  # row of a segment: acoustic ids come one row later
        self.text_has_ended = not options.has_text
        self.goes_on = False  # another segment follows this one
        self.is_done = False
        self.generator = torch.Generator(device).manual_seed(options.seed)

    def choose(self, hidden: Tensor) -> None:
        """One more row after the hidden state (1, H) of the last one."""
        tokens, pad = self.tokens, torch.full((1,), self.tokens.pad, device=hidden.device)
        text = pad if self.text_has_ended else self._pick(self.model.lm_head(hidden).float())
        ids = self.model.speech_heads.choose(hidden, self._pick_code)
        self.text_rows.append(text)
        self.audio_rows.append(torch.stack(ids, dim=1))
        word, semantic = text.item(), ids[0].item()
        if word in (tokens.eos, tokens.pause):
            self.text_has_ended = True
            self.goes_on = word == tokens.pause
        self.is_first = semantic == tokens.codec.eos
        if self.is_first:
            self.is_done = not (self.text_has_ended and self.goes_on)
            self.text_has_ended = self.goes_on = False

    def last_row(self) -> tuple[Tensor, Tensor]:
        return self.text_rows[-1], self.audio_rows[-1]

    def _pick_code(self, stream: int, logits: Tensor) -> Tensor:
        """(1, V) -> (1,): a code of the codebook; the semantic stream may end after a frame."""
        codec = self.tokens.codec
        if stream > 0 and self.is_first:
            return torch.full((1,), codec.pad, device=logits.device)
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[:, codec.offset : codec.offset + self.options.num_codes[stream]] = True
        allowed[:, codec.eos] = stream == 0 and not self.is_first
        logits = logits.float()
        if self.options.audio_repetition_penalty != 1:
            recent = self.audio_rows[-self.options.penalty_window :]
            for row in recent:
                score = logits[0, row[0, stream]]
                factor = self.options.audio_repetition_penalty
                logits[0, row[0, stream]] = score / factor if score > 0 else score * factor
        return self._pick(logits.masked_fill(~allowed, -torch.inf))

    def _pick(self, logits: Tensor) -> Tensor:
        """(1, V) -> (1,)"""
        if self.options.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = (logits / self.options.temperature).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
