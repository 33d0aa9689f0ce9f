"""Turns a conversation into the text stream, the four audio streams beside it, and their labels.

Place in the data flow: train_ds.py makes the turns (interleave.py the media's part,
speech/codec.py the answer's codes); collator.py packs the streams; inference/answer.py goes back.
Rules of data/multimodal_tokenizer.py and data/converters/audio_converter.py
(meituan-longcat/LongCat-Flash-Omni), with the demo's settings: text prefixes, no round numbers.

T positions, S audio streams (4: semantic, then acoustic), N codec frames of a segment. A segment
takes N + 1 stream frames: its acoustic codes stand one frame later than the semantic ones.

    frame        0        1 .. N-1    N
    text         t0       t1 ..       </pause> or </longcat_s> after the last token, then pads
    semantic     c0       c_n         EOS
    acoustic     PAD      a_(n-1)     a_(N-1)

The template writes no bos, as official: there the pieces of a turn are encoded one by one, and one
bos a piece would not fit beside its audio frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vss_longcat_omni.dataset.conversation import Segment, TextItem, Turn, VoiceItem
from vss_longcat_omni.dataset.special_tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vss_longcat_omni.dataset.interleave import Part
    from vss_longcat_omni.dataset.special_tokens import CodecIds, SpecialTokens

# Role of a position; the assistant's covers an answer's body, its text pads included.
ROLE_NONE, ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT = 0, 1, 2, 3
ROLES = {
    "system": ROLE_SYSTEM,
    "user": ROLE_USER,
    "assistant": ROLE_ASSISTANT,
    "voice assistant": ROLE_ASSISTANT,
}


@dataclass(frozen=True)
class Streams:
    """Holds the streams of one sample, int64."""

    input_ids: Tensor  # (T,)
    audio_ids: Tensor  # (T, S), PAD where there is no code
    roles: Tensor  # (T,)


class _Run(NamedTuple):
    """Holds positions of one role, with `frames` (len(ids), S) where they have codes."""

    ids: list[int]
    role: int = ROLE_NONE
    frames: Tensor | None = None


def build_streams(turns: Sequence[Turn], tokenizer: Any, *, tokens: SpecialTokens) -> Streams:
    """Return the streams of a whole conversation, answers included.

    Raises:
        ValueError: an answer's text is longer than its frames, a text holds a special token, or
            codes are not (N, S).
    """
    runs = [run for turn in turns for run in _turn_runs(turn, tokenizer, tokens)]
    return _join(runs, tokens.codec)


def build_prompt(
    turns: Sequence[Turn], tokenizer: Any, *, tokens: SpecialTokens, speak: bool = True
) -> Streams:
    """Return streams up to where the next answer begins; `speak` False asks for text alone.

    A prefix of what `build_streams` gives for the same turns and the answer.
    """
    runs = [run for turn in turns for run in _turn_runs(turn, tokenizer, tokens)]
    prefix = _prefix("voice assistant" if speak else "assistant")
    runs.append(_Run(encode_text(prefix, tokenizer, tokens=tokens)))
    return _join(runs, tokens.codec)


def build_labels(streams: Streams, *, tokens: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Return text_labels (T,), audio_labels (T, S), at the positions they describe: shift them.

    Text: the assistant's body but for its text pads: from the end of a segment's text to the end of
    its sound, the official decoding never asks for text, and pads would be most of the text loss.

    Audio: every id in the assistant's body that is not PAD, the semantic EOS included. The acoustic
    PADs of a segment's first frame are none: official decoding throws its acoustic ids away.
    """
    is_answer = streams.roles == ROLE_ASSISTANT
    is_text = is_answer & (streams.input_ids != tokens.pad)
    is_code = is_answer[..., None] & (streams.audio_ids != tokens.codec.pad)
    return (
        streams.input_ids.where(is_text, IGNORE_INDEX),
        streams.audio_ids.where(is_code, IGNORE_INDEX),
    )


def encode_text(text: str, tokenizer: Any, *, tokens: SpecialTokens) -> list[int]:
    """Return ids of plain text; markup in it stays text, so that no transcript can open a sound.

    Raises ValueError where the tokenizer makes a special token of it all the same.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    found = sorted(tokens.reserved.intersection(ids))
    if found:
        raise ValueError(
            f"the text {text!r} holds special tokens (ids {found}): remove them, the template "
            "writes its own"
        )
    return ids


def encode_media(parts: Sequence[Part], tokenizer: Any, *, tokens: SpecialTokens) -> list[int]:
    """Return the ids of a plan of interleave.py."""
    token_of = {
        "image_tokens": tokens.image_pad,
        "audio_begin": tokens.audio_begin,
        "audio_pads": tokens.audio_pad,
        "audio_end": tokens.audio_end,
    }
    ids: list[int] = []
    for part in parts:
        if part.kind == "timestamp":
            ids += encode_text(part.text, tokenizer, tokens=tokens)
        else:
            ids += [token_of[part.kind]] * part.count
    return ids


def encode_segment(
    segment: Segment, tokenizer: Any, *, tokens: SpecialTokens, is_last: bool
) -> list[int]:
    """Return a segment's text ids with its terminator, not yet padded; none when text-pad-only."""
    if segment.text is None:
        return []
    ids = encode_text(segment.text, tokenizer, tokens=tokens)
    return [*ids, tokens.eos if is_last else tokens.pause]


def delay_codes(codes: Tensor, *, codec: CodecIds) -> Tensor:
    """Delay (N, S) raw codes to (N + 1, S) frames: + offset, acoustics one later, semantic EOS."""
    if codes.ndim != 2 or codes.shape[1] != codec.num_streams or len(codes) == 0:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)}: a segment of speech needs (frames, "
            f"{codec.num_streams}) codes and at least one frame; encode the recording again"
        )
    if codes.is_floating_point() or (codes < 0).any():
        raise ValueError(
            f"codes must be integers from 0, found {codes.dtype} with minimum {codes.min()}: give "
            "the codec's raw codes, not frames of the audio streams"
        )
    frames = torch.full((len(codes) + 1, codec.num_streams), codec.pad, dtype=torch.int64)
    frames[:-1, 0] = codes[:, 0] + codec.offset
    frames[-1, 0] = codec.eos
    frames[1:, 1:] = codes[:, 1:] + codec.offset
    return frames


def _turn_runs(turn: Turn, tokenizer: Any, tokens: SpecialTokens) -> list[_Run]:
    """Return prefix, items, newline: a user's are all of that role, others' only the items."""
    role = ROLES[turn.role]
    edge = role if turn.role == "user" else ROLE_NONE
    runs = [_Run(encode_text(_prefix(turn.role), tokenizer, tokens=tokens), edge)]
    for item in turn.items:
        if isinstance(item, VoiceItem):
            runs += _voice_runs(item, tokenizer, tokens, role)
            continue
        if isinstance(item, TextItem):
            ids = encode_text(item.text, tokenizer, tokens=tokens)
        else:
            ids = encode_media(item.parts, tokenizer, tokens=tokens)
        # As official: each item of a system or text answer is closed, not each turn.
        closing = [tokens.eos] if turn.role in ("system", "assistant") else []
        runs.append(_Run(ids + closing, role))
    runs.append(_Run(encode_text("\n", tokenizer, tokens=tokens), edge))
    return runs


def _voice_runs(item: VoiceItem, tokenizer: Any, tokens: SpecialTokens, role: int) -> list[_Run]:
    """Put text and codes side by side; a user's speech as codes has text pads only, as official.

    A text may take all N + 1 frames, as official. Its terminator is then beside the semantic EOS,
    so a decoder has to look for that EOS in the terminator's frame too (the serving port does not).
    """
    runs = []
    total = len(item.segments)
    for number, segment in enumerate(item.segments, 1):
        frames = delay_codes(segment.codes, codec=tokens.codec)
        ids: list[int] = []
        if role != ROLE_USER:
            is_last = number == total
            ids = encode_segment(segment, tokenizer, tokens=tokens, is_last=is_last)
        if len(ids) > len(frames):
            raise ValueError(
                f"segment {number} of {total} of an answer: its text takes {len(ids)} tokens, the "
                f"terminator included, but {len(segment.codes)} codec frames give {len(frames)} "
                f"stream frames (text: {_shorten(segment.text)!r}). Check that the transcript "
                "belongs to the recording; else shorten it or leave the sample out"
            )
        runs.append(_Run(ids + [tokens.pad] * (len(frames) - len(ids)), role, frames))
    return runs


def _join(runs: Sequence[_Run], codec: CodecIds) -> Streams:
    input_ids = torch.tensor([i for run in runs for i in run.ids], dtype=torch.int64)
    lengths = torch.tensor([len(run.ids) for run in runs])
    roles = torch.tensor([run.role for run in runs]).repeat_interleave(lengths)
    audio_ids = input_ids.new_full((len(input_ids), codec.num_streams), codec.pad)
    start = 0
    for run in runs:
        if run.frames is not None:
            audio_ids[start : start + len(run.frames)] = run.frames
        start += len(run.ids)
    return Streams(input_ids, audio_ids, roles)


def _prefix(role: str) -> str:
    return f"{role.upper()}:"


def _shorten(text: str | None, *, limit: int = 60) -> str:
    text = text or ""
    return text if len(text) <= limit else text[: limit - 3] + "..."
