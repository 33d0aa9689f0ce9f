"""Every position of a hand-written conversation, and what is an error in the template.

The official conversations: test_streams_reference.py. Ids of the byte tokenizer without merges: 150
+ code point - 33 for a visible ASCII character, 370 a space, 348 a newline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from vss_longcat_omni.dataset.conversation import MediaItem, Segment, TextItem, Turn, VoiceItem
from vss_longcat_omni.dataset.interleave import Part, plan_interleaved
from vss_longcat_omni.dataset.special_tokens import SpecialTokens, build_byte_tokenizer
from vss_longcat_omni.dataset.template import (
    Streams,
    build_labels,
    build_prompt,
    build_streams,
    delay_codes,
    encode_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS = SpecialTokens()
X = -100  # IGNORE_INDEX
NO_CODE, NO_LABEL = [3, 3, 3, 3], [X, X, X, X]
USER = (202, 200, 186, 199, 175)  # USER:
VOICE = (203, 196, 190, 184, 186, 370, 182, 200, 200, 190, 200, 201, 182, 195, 201, 175)
TIME = (232, 218, 216, 228, 227, 217, 240, 165, 163, 165, 242, 175)  # second{0.0}:
ANSWER = [
    # text, audio ids, role, text label, audio labels
    # "a", two frames: codes + 32; acoustics one frame later, their first PAD, which is no label.
    (214, [42, 3, 3, 3], 3, 214, [42, X, X, X]),  # a; c0 = 10
    (137, [43, 52, 62, 72], 3, 137, [43, 52, 62, 72]),  # </pause>; c1 = 11; a0 = 20, 30, 40
    (3, [2, 53, 63, 73], 3, X, [2, 53, 63, 73]),  # pad, no label; EOS; a1 = 21, 31, 41
    # "b", one frame: its text takes both stream frames.
    (215, [44, 3, 3, 3], 3, 215, [44, X, X, X]),  # b; c0 = 12
    (2, [2, 54, 64, 74], 3, 2, [2, 54, 64, 74]),  # </longcat_s>; EOS; a0 = 22, 32, 42
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_byte_tokenizer()


def question() -> Turn:
    parts = plan_interleaved(["second{0.0}:"], [2], 1)
    return Turn("user", (MediaItem(parts),))


def answer(first: str | None = "a", second: str | None = "b") -> Turn:
    two, one = [[10, 20, 30, 40], [11, 21, 31, 41]], [[12, 22, 32, 42]]
    segments = (Segment(first, torch.tensor(two)), Segment(second, torch.tensor(one)))
    return Turn("voice assistant", (VoiceItem(segments),))


def spoken(text: str | None, num_frames: int) -> Turn:
    codes = torch.arange(num_frames * 4).view(num_frames, 4)
    return Turn("voice assistant", (VoiceItem((Segment(text, codes),)),))


def body_of(streams: Streams) -> list[int]:
    return streams.input_ids[streams.roles == 3].tolist()


def test_every_position_of_a_question_and_its_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    # USER: (5) second{0.0}: (12) two image pads, <|audio|>, one audio pad, <|/audio|>, newline (6):
    # 23 positions of the user. VOICE ASSISTANT: (16) and the last newline belong to nobody.
    user = [*USER, *TIME, 142, 142, 134, 136, 135, 348]
    prompt = [(i, NO_CODE, 2, X, NO_LABEL) for i in user]
    prompt += [(i, NO_CODE, 0, X, NO_LABEL) for i in VOICE]
    wanted = [*prompt, *ANSWER, (348, NO_CODE, 0, X, NO_LABEL)]
    assert len(wanted) == 23 + 16 + 5 + 1
    streams = build_streams([question(), answer()], tokenizer, tokens=TOKENS)
    text_labels, audio_labels = build_labels(streams, tokens=TOKENS)
    columns = (streams.input_ids, streams.audio_ids, streams.roles, text_labels, audio_labels)
    assert all(column.dtype == torch.int64 for column in columns)
    found = zip(*(column.tolist() for column in columns), strict=True)
    assert list(found) == wanted


def test_text_pads_are_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    streams = build_streams([answer()], tokenizer, tokens=TOKENS)
    text_labels, _ = build_labels(streams, tokens=TOKENS)
    assert streams.input_ids[16:21].tolist() == [214, 137, 3, 215, 2]
    assert text_labels[16:21].tolist() == [214, 137, X, 215, 2]


def test_labels_of_a_batch_are_those_of_its_samples(tokenizer: PreTrainedTokenizerFast) -> None:
    one = build_streams([answer()], tokenizer, tokens=TOKENS)
    batch = Streams(*(torch.stack([t, t]) for t in (one.input_ids, one.audio_ids, one.roles)))
    for found, wanted in zip(
        build_labels(batch, tokens=TOKENS), build_labels(one, tokens=TOKENS), strict=True
    ):
        assert torch.equal(found, torch.stack([wanted, wanted]))


def test_every_code_is_a_label_once(tokenizer: PreTrainedTokenizerFast) -> None:
    codes = torch.randint(0, 8000, (30, 4), generator=torch.Generator().manual_seed(0))
    turn = Turn("voice assistant", (VoiceItem((Segment("hello", codes),)),))
    _, labels = build_labels(build_streams([turn], tokenizer, tokens=TOKENS), tokens=TOKENS)
    semantic = labels[:, 0][labels[:, 0] != X].tolist()
    assert semantic == [*(codes[:, 0] + 32).tolist(), 2]
    for stream in (1, 2, 3):
        column = labels[:, stream]
        assert column[column != X].tolist() == (codes[:, stream] + 32).tolist()


def test_without_a_transcript_the_text_stream_is_pads(tokenizer: PreTrainedTokenizerFast) -> None:
    streams = build_streams([question(), answer(None, None)], tokenizer, tokens=TOKENS)
    assert body_of(streams) == [3] * 5
    text_labels, audio_labels = build_labels(streams, tokens=TOKENS)
    assert set(text_labels.tolist()) == {X}
    spoken_labels = [position[4] for position in ANSWER]
    assert audio_labels[streams.roles == 3].tolist() == spoken_labels


def test_prompt_is_the_beginning_of_the_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    system = Turn("system", (TextItem("Be kind."),))
    parts = (Part("audio_begin"), Part("audio_pads", count=3), Part("audio_end"))
    sound = Turn("user", (MediaItem(parts), TextItem("ok?")))
    for history in ([question()], [system, sound], [system, sound, answer(), question()]):
        prompt = build_prompt(history, tokenizer, tokens=TOKENS)
        whole = build_streams([*history, answer()], tokenizer, tokens=TOKENS)
        length = len(prompt.input_ids)
        assert len(whole.input_ids) == length + 6
        for name in ("input_ids", "audio_ids", "roles"):
            assert torch.equal(getattr(whole, name)[:length], getattr(prompt, name))
    silent = build_prompt([question()], tokenizer, tokens=TOKENS, speak=False)
    assert silent.input_ids[-10:].tolist() == [*VOICE[6:]]  # ASSISTANT:


def test_text_answers_are_learned_and_each_item_is_closed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turn = Turn("assistant", (TextItem("A"), TextItem("B")))
    streams = build_streams([question(), turn], tokenizer, tokens=TOKENS)
    text_labels, audio_labels = build_labels(streams, tokens=TOKENS)
    assert body_of(streams) == [182, 2, 183, 2]
    assert text_labels[text_labels != X].tolist() == [182, 2, 183, 2]
    assert set(audio_labels.flatten().tolist()) == {X}


def test_a_text_may_take_its_frames_but_not_exceed_them(tokenizer: PreTrainedTokenizerFast) -> None:
    full = build_streams([spoken("abc", 3)], tokenizer, tokens=TOKENS)
    assert body_of(full) == [214, 215, 216, 2]
    message = (
        r"segment 1 of 1 of an answer: its text takes 5 tokens, the terminator included, but 3 "
        r"codec frames give 4 stream frames \(text: 'abcd'\)\. Check that the transcript belongs "
        r"to the"
    )
    with pytest.raises(ValueError, match=message):
        build_streams([spoken("abcd", 3)], tokenizer, tokens=TOKENS)
    with pytest.raises(
        ValueError, match=r"segment 2 of 2.*3 tokens.*1 codec frames give 2 stream frames"
    ):
        build_streams([answer("a", "bc")], tokenizer, tokens=TOKENS)


def test_a_users_speech_as_codes_has_text_pads_only(tokenizer: PreTrainedTokenizerFast) -> None:
    streams = build_streams([Turn("user", spoken("abc", 3).items)], tokenizer, tokens=TOKENS)
    assert streams.input_ids.tolist() == [*USER, 3, 3, 3, 3, 348]
    assert streams.audio_ids[5].tolist() == [32, 3, 3, 3]
    assert all((labels == X).all() for labels in build_labels(streams, tokens=TOKENS))


def test_markup_in_a_transcript_stays_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("<mask_112>", "</longcat_s>", "<|audio_pad|>", "</pause>"):
        ids = encode_text(text, tokenizer, tokens=TOKENS)
        assert not TOKENS.reserved.intersection(ids)
        assert tokenizer.decode(ids) == text


def test_markup_that_a_tokenizer_cannot_leave_as_text_is_an_error() -> None:
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens(["<sound>"])  # known, but not as a special token: it cannot be split
    tokens = SpecialTokens(audio_pad=406)
    with pytest.raises(ValueError, match=r"'a<sound>' holds special tokens \(ids \[406\]\)"):
        encode_text("a<sound>", tokenizer, tokens=tokens)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(5, 3, dtype=torch.int64), r"shape \(5, 3\).*\(frames, 4\)"),
        (torch.zeros(0, 4, dtype=torch.int64), r"shape \(0, 4\).*at least one frame"),
        (torch.tensor([[5, -1, 0, 0]]), "minimum -1"),
        (torch.zeros(5, 4), r"torch\.float32"),
    ],
)
def test_codes_that_are_none_are_errors(codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delay_codes(codes, codec=TOKENS.codec)
