"""Generated frames: greedy decoding repeats an overfit answer; the states keep the rules."""

from __future__ import annotations

import pytest
import torch

from tests.vss_longcat_omni.support.tiny import AUDIO, VISION, make_example, tiny_config
from vss_longcat_omni.dataset.collator import collate
from vss_longcat_omni.dataset.special_tokens import SpecialTokens
from vss_longcat_omni.dataset.template import Streams
from vss_longcat_omni.inference.decoding import DecodingOptions, generate_frames
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM

TOKENS = SpecialTokens()


@pytest.fixture
def model() -> LongcatOmniForCausalLM:
    return LongcatOmniForCausalLM(tiny_config(vision_config=VISION, audio_config=AUDIO))


def test_an_overfit_answer_is_generated(model: LongcatOmniForCausalLM) -> None:
    """Shift, delay, cascade and cache of training and decoding agree, or this fails."""
    example = make_example(5, num_text=4, num_frames=7)
    batch = collate([example])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
    assert output.num_correct.tolist() == output.counts.tolist()
    start = len(example.input_ids) - 8  # seven codec frames take eight stream frames
    prompt = Streams(
        example.input_ids[:start], example.audio_ids[:start], torch.zeros(start, dtype=torch.long)
    )
    model.eval()
    text, audio = generate_frames(model, prompt, batch["pictures"], batch["sound"])
    assert text.tolist() == example.input_ids[start:].tolist()
    assert audio.tolist() == example.audio_ids[start:].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_states_keep_the_rules(model: LongcatOmniForCausalLM, temperature: float) -> None:
    """They do so whatever a model that has learned nothing would say."""
    example = make_example(0, num_text=2, num_frames=3)
    prompt = Streams(example.input_ids[:7], example.audio_ids[:7], torch.zeros(7, dtype=torch.long))
    batch = collate([example])
    options = DecodingOptions(
        max_frames=40,
        temperature=temperature,
        num_codes=(20, 10, 10, 10),
        audio_repetition_penalty=1.1,
    )
    text, audio = generate_frames(model.eval(), prompt, batch["pictures"], batch["sound"], options)
    assert len(text) == len(audio) <= 40
    codec = TOKENS.codec
    is_first, text_has_ended = True, False
    for token, (semantic, *acoustic) in zip(text.tolist(), audio.tolist(), strict=True):
        assert token == TOKENS.pad or not text_has_ended
        text_has_ended |= token in (TOKENS.eos, TOKENS.pause)
        assert semantic == codec.eos if semantic < codec.offset else semantic < codec.offset + 20
        if is_first:
            assert semantic != codec.eos
            assert acoustic == [codec.pad] * 3
        else:
            assert all(codec.offset <= code < codec.offset + 10 for code in acoustic)
        is_first = semantic == codec.eos
        text_has_ended &= not is_first
