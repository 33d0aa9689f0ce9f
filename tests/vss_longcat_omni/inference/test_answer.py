"""An answer read back is the answer written; official results: test_streams_reference.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from vss_longcat_omni.dataset.conversation import Segment, Turn, VoiceItem
from vss_longcat_omni.dataset.special_tokens import SpecialTokens, build_byte_tokenizer
from vss_longcat_omni.dataset.template import build_streams
from vss_longcat_omni.inference.answer import clean_text, decode_text, read_answer, undo_delay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS = SpecialTokens()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer()


def frames_of(
    segments: list[tuple[str | None, int]], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Text ids and audio frames of an answer's body, and its codes."""
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 8100, (n, 4), generator=generator) for _, n in segments]
    items = [Segment(text, c) for (text, _), c in zip(segments, codes, strict=True)]
    turn = Turn("voice assistant", (VoiceItem(tuple(items)),))
    streams = build_streams([turn], tokenizer, tokens=TOKENS)
    is_body = streams.roles == 3
    return streams.input_ids[is_body], streams.audio_ids[is_body], codes


def test_what_the_template_wrote_is_read_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text_ids, frames, codes = frames_of([("I see.", 9), ("Yes \u00e9!", 12), ("", 1)], tokenizer)
    answer = read_answer(text_ids, frames, tokenizer, tokens=TOKENS)
    assert answer.text == "I see. Yes \u00e9!"
    assert [segment.text for segment in answer.segments] == ["I see.", "Yes \u00e9!", ""]
    for segment, wanted in zip(answer.segments, codes, strict=True):
        assert torch.equal(segment.codes, wanted)
    assert torch.equal(answer.codes, torch.cat(codes))
    assert answer.is_finished


def test_pads_and_bos_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text_ids, frames, _ = frames_of([(None, 4)], tokenizer)
    assert read_answer(text_ids, frames, tokenizer, tokens=TOKENS).text == ""
    text_ids[0] = TOKENS.bos
    assert read_answer(text_ids, frames, tokenizer, tokens=TOKENS).text == ""
    # The official post-processor leaves a bos.
    assert decode_text([1, 214, 2], tokenizer) == "<longcat_s>a"


def test_an_answer_that_was_cut_keeps_its_whole_frames(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text_ids, frames, codes = frames_of([("a", 3), ("b", 6)], tokenizer)
    answer = read_answer(text_ids[:8], frames[:8], tokenizer, tokens=TOKENS)
    assert [segment.is_finished for segment in answer.segments] == [True, False]
    # Stream frames 4 to 7 are of the second segment; the last has no acoustic codes yet.
    assert torch.equal(answer.segments[1].codes, codes[1][:3])
    one_frame = read_answer(text_ids[:1], frames[:1], tokenizer, tokens=TOKENS)
    assert one_frame.codes.shape == (0, 4)


def test_frames_that_hold_a_reserved_id_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    text_ids, frames, codes = frames_of([("a", 5)], tokenizer)
    frames[2, 3] = 3  # an acoustic id of frame 1
    answer = read_answer(text_ids, frames, tokenizer, tokens=TOKENS)
    assert torch.equal(answer.codes, codes[0][[0, 2, 3, 4]])
    assert len(undo_delay(frames, codec=TOKENS.codec)) == 5  # official


def test_pauses_become_spaces_only_after_a_full_stop() -> None:
    assert clean_text("One.</pause>Two!</pause>Three</longcat_s>") == "One. Two!Three"


def test_ids_below_one_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert decode_text([214, 137, -5000000, 0, 215, 2], tokenizer) == "ab"


def test_unequal_or_empty_streams_are_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    text_ids, frames, _ = frames_of([("a", 5)], tokenizer)
    with pytest.raises(ValueError, match="5 text ids beside 6 audio frames"):
        read_answer(text_ids[1:], frames, tokenizer, tokens=TOKENS)
    with pytest.raises(ValueError, match="at least one"):
        read_answer(text_ids[:0], frames[:0], tokenizer, tokens=TOKENS)
