"""Reads the answer's text and codec codes from generated frames, whole and segment by segment.

Place in the data flow: answerer.py hands over what was generated; speech/codec.py gets the codes.
This is the inverse of a spoken answer in dataset/template.py. Rules of
post_process/unified_post_processor.py (meituan-longcat/LongCat-Flash-Omni).

R generated frames, S audio streams, N codec frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vss_longcat_omni.dataset.special_tokens import EOS_TOKEN, PAUSE_TOKEN, name_mask_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.dataset.special_tokens import CodecIds, SpecialTokens


@dataclass(frozen=True)
class SpokenSegment:
    text: str
    codes: Tensor  # (N, S) raw codes
    is_finished: bool  # False: cut before the semantic EOS


@dataclass(frozen=True)
class SpokenAnswer:
    text: str
    segments: tuple[SpokenSegment, ...]

    @property
    def codes(self) -> Tensor:
        """Return the (N, S) raw codes of all segments, one after the other."""
        return torch.cat([segment.codes for segment in self.segments])

    @property
    def is_finished(self) -> bool:
        return all(segment.is_finished for segment in self.segments)


def read_answer(
    text_ids: Tensor, audio_frames: Tensor, tokenizer: Any, *, tokens: SpecialTokens
) -> SpokenAnswer:
    """Return the answer in (R,) text ids and (R, S) audio ids, generated side by side.

    Text pads and bos are dropped first, which the official post-processor leaves in the text: its
    server never hands over a pad. A frame with a reserved id among its codes is dropped too; it has
    no code that the codec could decode.

    Raises:
        ValueError: not as many text ids as audio frames, or none.
    """
    if len(text_ids) != len(audio_frames) or len(text_ids) == 0:
        raise ValueError(
            f"{len(text_ids)} text ids beside {len(audio_frames)} audio frames: an answer needs as "
            "many of each, and at least one"
        )
    codec = tokens.codec
    is_text = (text_ids != tokens.pad) & (text_ids != tokens.bos)
    ends = (audio_frames[:, 0] == codec.eos).nonzero().flatten().add(1).tolist()
    stops = ends if ends and ends[-1] == len(audio_frames) else [*ends, len(audio_frames)]
    segments = []
    for start, stop in zip([0, *stops], stops, strict=False):
        codes = undo_delay(audio_frames[start:stop], codec=codec) - codec.offset
        segments.append(
            SpokenSegment(
                text=decode_text(text_ids[start:stop][is_text[start:stop]].tolist(), tokenizer),
                codes=codes[(codes >= 0).all(dim=1)],
                is_finished=stop in ends,
            )
        )
    return SpokenAnswer(decode_text(text_ids[is_text].tolist(), tokenizer), tuple(segments))


def undo_delay(audio_frames: Tensor, *, codec: CodecIds) -> Tensor:
    """Return (N, S) codec frames, offset kept, of (R, S) stream frames: the semantic id of each
    with the acoustic ids of the next.

    The semantic EOS begins no codec frame, nor does the last stream frame, whose acoustic codes
    were never generated.
    """
    frames = torch.cat([audio_frames[:-1, :1], audio_frames[1:, 1:]], dim=1)
    return frames[frames[:, 0] != codec.eos]


def decode_text(text_ids: Sequence[int], tokenizer: Any) -> str:
    """Return clean text of generated ids; those below 1 are none (the official server's sound)."""
    kept = [token_id for token_id in text_ids if token_id > 0]
    raw = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return clean_text(name_mask_tokens(raw))


def clean_text(text: str) -> str:
    """Put a space for the pause after a full stop; drop other pauses and end tokens, not a bos."""
    text = text.replace(f".{PAUSE_TOKEN}", ". ")
    return text.replace(PAUSE_TOKEN, "").replace(EOS_TOKEN, "").strip()
