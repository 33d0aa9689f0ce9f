"""Generates an answer frame by frame: a text id and one id of each audio stream at a time.

answerer.py uses it; answer.py reads the frames. The states are those of the serving port
(shineran96/vllm, longcat_flash_omni.py): text and sound together until the text ends, sound alone
until the semantic stream ends, then the next segment or the end.

Shapes: T prompt positions, S audio streams, R generated frames, V rows of an audio table.
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
    """Chooses greedily by default, as the official demo.

    Attributes:
        max_frames: the answer is cut there (16.67 frames are a second of speech).
        temperature: above 0, ids are drawn.
        audio_repetition_penalty: what the scores of the last `penalty_window` ids of a stream are
            divided by, once for each time (the official server: 1.1 over 30 frames).
        has_text: False for a model trained with --transcripts none: its text stream is all pads.
        num_codes: entries of each stream's codebook; more are never chosen.
    """

    max_frames: int = 500
    temperature: float = 0.0
    audio_repetition_penalty: float = 1.0
    penalty_window: int = 30
    has_text: bool = True
    num_codes: Sequence[int] = (8192, 8100, 8100, 8100)
    seed: int = 0


@torch.no_grad()
def generate_frames(
    model: LongcatOmniForCausalLM,
    prompt: Streams,
    pictures: Pictures | None,
    sound: Sound | None,
    options: DecodingOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (R,) text ids and (R, S) audio ids of the answer to one prompt."""
    options = options or DecodingOptions()
    device = model.lm_head.weight.device
    embeds = model.embed(prompt.input_ids.to(device), prompt.audio_ids.to(device), pictures, sound)
    caches = [LatentCache() for _ in range(2 * model.config.num_layers)]
    positions = torch.arange(len(embeds), device=device)
    hidden = model.model(embeds, positions, [len(embeds)], caches)[-1:]  # (1, H)
    chooser = _Chooser(model, options, device)
    for frame in range(options.max_frames):
        chooser.choose(hidden)
        if chooser.is_done:
            break
        embeds = model.embed(chooser.text[-1], chooser.audio[-1])
        position = torch.tensor([len(prompt.input_ids) + frame], device=device)
        hidden = model.model(embeds, position, [1], caches)
    return torch.cat(chooser.text), torch.cat(chooser.audio)


class _Chooser:
    """The state machine that decides what each stream may say next."""

    def __init__(
        self, model: LongcatOmniForCausalLM, options: DecodingOptions, device: torch.device
    ) -> None:
        self.model, self.options = model, options
        self.tokens = model.tokens
        self.text: list[Tensor] = []  # a frame's id each, (1,)
        self.audio: list[Tensor] = []  # a frame's ids each, (1, S)
        self.is_first = True  # frame of a segment: acoustic ids come one frame later
        self.text_has_ended = not options.has_text
        self.has_next = False  # another segment follows this one
        self.is_done = False
        self.generator = torch.Generator(device).manual_seed(options.seed)

    def choose(self, hidden: Tensor) -> None:
        """Choose one more frame after the hidden state (1, H) of the last one."""
        tokens, pad = self.tokens, torch.full((1,), self.tokens.pad, device=hidden.device)
        text = pad if self.text_has_ended else self._pick(self.model.lm_head(hidden).float())
        ids = self.model.speech_heads.choose(hidden, self._pick_code)
        self.text.append(text)
        self.audio.append(torch.stack(ids, dim=1))
        token, semantic = text.item(), ids[0].item()
        if token in (tokens.eos, tokens.pause):
            self.text_has_ended = True
            self.has_next = token == tokens.pause
        self.is_first = semantic == tokens.codec.eos
        if self.is_first:
            self.is_done = not (self.text_has_ended and self.has_next)
            self.text_has_ended = self.has_next = False

    def _pick_code(self, stream: int, logits: Tensor) -> Tensor:
        """Pick a code (1,) of the codebook by (1, V); the semantic stream may end after a frame."""
        codec = self.tokens.codec
        if stream > 0 and self.is_first:
            return torch.full((1,), codec.pad, device=logits.device)
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[:, codec.offset : codec.offset + self.options.num_codes[stream]] = True
        allowed[:, codec.eos] = stream == 0 and not self.is_first
        logits = logits.float()
        if self.options.audio_repetition_penalty != 1:
            factor = self.options.audio_repetition_penalty
            for ids in self.audio[-self.options.penalty_window :]:
                score = logits[0, ids[0, stream]]
                logits[0, ids[0, stream]] = score / factor if score > 0 else score * factor
        return self._pick(logits.masked_fill(~allowed, -torch.inf))

    def _pick(self, logits: Tensor) -> Tensor:
        """Pick an id (1,) by (1, V)."""
        if self.options.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = (logits / self.options.temperature).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
