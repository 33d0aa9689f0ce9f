"""Decoding and streaming: the states are training's, and streamed answers equal whole ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_omni.data_utils import SpeechInstructionDataset, collate
from llama_omni.dataset.batch import IGNORE_INDEX, Batch
from llama_omni.dataset.prompt import tokenize_prompt
from llama_omni.dataset.record_formats import Turn
from llama_omni.dataset.records import Record
from llama_omni.generate import load_omni_model
from llama_omni.inference.answering import (
    AnswerPart,
    Omni,
    TextStream,
    UnitStream,
    answer,
    answer_streaming,
    decode_greedily,
    embed_prompt,
    join_parts,
)
from llama_omni.model.speech_generator import collapse_path, select_states
from llama_omni.speech.audio import load_audio, save_audio
from llama_omni.speech.vocoder import Voice, load_voice
from llama_omni.speech.whisper_mel import compute_mel, num_speech_tokens
from tests.llama_omni.support.omni_checkpoint import NUM_UNITS, TEXTS, make_omni_checkpoint
from tests.llama_omni.support.tiny import make_kmeans


def make_omni(folder: Path, **options: Any) -> Omni:
    return load_omni_model(
        make_omni_checkpoint(folder / "model", **options), device="cpu", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Omni:
    return make_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Voice:
    path = make_kmeans(tmp_path_factory.mktemp("voice") / "kmeans.safetensors", num_units=NUM_UNITS)
    return load_voice(vocoder_path=None, kmeans_path=path)


def question(seconds: float = 0.6, *, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(round(16000 * seconds), generator=torch.Generator().manual_seed(seed))


def as_batch(omni: Omni, waveform: Tensor, token_ids: list[int]) -> Batch:
    """Returns the training sample whose answer is `token_ids`."""
    mel = compute_mel(waveform, omni.features)
    prompt = tokenize_prompt([], [num_speech_tokens(mel.shape[1], ds_rate=5)], omni.tokenizer)
    return Batch(
        input_ids=torch.tensor([prompt + token_ids]),
        labels=torch.tensor([[IGNORE_INDEX] * len(prompt) + token_ids]),
        speech=mel[None],
        speech_lengths=torch.tensor([mel.shape[1]]),
        tgt_units=None,
    )


def put_end_at(omni: Omni, position: int, waveform: Tensor) -> list[int]:
    """Changes the model so that its answer ends with <|eot_id|> at `position`; returns the answer.

    The weights of two tokens change places in the output layer; neither occurs before.
    """
    tokens = [token for token, _ in run(omni, waveform, 12)]
    chosen, end = tokens[position], omni.tokenizer.eos_token_id
    assert chosen not in tokens[:position]
    assert end not in tokens
    head = omni.model.lm_head.weight.data
    head[[chosen, end]] = head[[end, chosen]]
    return [*tokens[:position], end]


def run(omni: Omni, waveform: Tensor, max_new_tokens: int) -> list[tuple[int, Tensor]]:
    with torch.no_grad():
        prompt = embed_prompt(omni, waveform)
    return list(decode_greedily(omni, prompt, max_new_tokens=max_new_tokens))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_states_are_those_of_teacher_forcing(tmp_path: Path, shift: bool, seed: int) -> None:
    """What generation hands to the speech generator is what stage 2 trained it on."""
    omni = make_omni(tmp_path, seed=seed, ctc_shift_states=shift)
    waveform = question(0.5 + 0.2 * seed, seed=seed)
    expected = put_end_at(omni, 5, waveform)
    tokens, states = zip(*run(omni, waveform, 12), strict=True)
    assert list(tokens) == expected
    batch = as_batch(omni, waveform, list(tokens))
    with torch.no_grad():
        hidden_states = omni.model.hidden_states(batch)
    chosen, counts = select_states(hidden_states, batch.labels, shift=shift)
    assert counts.tolist() == [len(tokens)]
    torch.testing.assert_close(torch.stack(states), chosen[0], rtol=1e-4, atol=1e-5)
    other, _ = select_states(hidden_states, batch.labels, shift=not shift)
    assert (other - chosen).abs().max() > 0.1


def test_prompt_is_the_sample_of_the_dataset(omni: Omni, tmp_path: Path) -> None:
    """The prompts are equal with an earlier turn too, whose answer stands in them."""
    for name, seconds in (("a", 0.5), ("b", 0.75)):
        save_audio(tmp_path / f"{name}.wav", question(seconds), sample_rate=16000)
    turns = tuple(
        Turn(tmp_path / f"{name}.wav", "", text, None, None)
        for name, text in (("a", "Four."), ("b", "It is red."))
    )
    record = Record(tmp_path / "data.jsonl", 1, turns)
    dataset = SpeechInstructionDataset(
        [record], omni.tokenizer, feature_extractor=omni.features, labeled="last"
    )
    assert len(dataset) == 2
    for count in (1, 2):
        batch = collate([dataset[count - 1]], pad_token_id=0)
        num_answer = batch.num_label_tokens
        with torch.no_grad():
            whole = omni.model.embed(batch.input_ids, batch.speech, batch.speech_lengths)
            waveform = load_audio(turns[count - 1].speech_path)
            prompt = embed_prompt(omni, waveform, turns[: count - 1])
        torch.testing.assert_close(prompt, whole[:, :-num_answer], rtol=1e-5, atol=1e-5)


def test_greedy_with_a_cache_equals_greedy_without(omni: Omni) -> None:
    waveform = question()
    found = [token for token, _ in run(omni, waveform, 10)]
    expected: list[int] = []
    for _ in range(10):
        with torch.no_grad():
            states = omni.model.hidden_states(as_batch(omni, waveform, expected))
            expected.append(int(omni.model.lm_head(states[0, -1]).argmax()))
    assert found == expected
    assert len(set(found)) > 3


def test_ends_at_eot_and_says_whether_it_was_cut(tmp_path: Path) -> None:
    omni = make_omni(tmp_path)
    waveform = question()
    expected = put_end_at(omni, 4, waveform)
    reply = answer(omni, waveform, max_new_tokens=12)
    assert reply.token_ids == expected
    assert reply.is_finished
    assert "<|eot_id|>" not in reply.text
    cut = answer(omni, waveform, max_new_tokens=3)
    assert cut.token_ids == expected[:3]
    assert not cut.is_finished
    assert join_parts(omni, answer_streaming(omni, waveform, max_new_tokens=12)).is_finished


@pytest.mark.parametrize("seed", range(6))
def test_streamed_answer_equals_whole_answer(tmp_path: Path, voice: Voice, seed: int) -> None:
    """Units, text and samples, whatever the chunk size; paths hold repeats and blanks."""
    shift = seed % 3 != 2
    omni = make_omni(tmp_path, seed=seed, ctc_upsample_factor=3 + seed, ctc_shift_states=shift)
    waveform = question(0.4 + 0.1 * seed, seed=seed)
    whole = answer(omni, waveform, voice=voice, max_new_tokens=16)
    assert whole.units is not None
    assert len(whole.units) > 8
    for chunk_size in (1, 2, 3, 7, 40):
        parts = answer_streaming(
            omni, waveform, voice=voice, chunk_size=chunk_size, max_new_tokens=16
        )
        streamed = join_parts(omni, parts)
        assert streamed.units == whole.units
        assert (streamed.text, streamed.token_ids) == (whole.text, whole.token_ids)
        assert streamed.waveform is not None
        assert whole.waveform is not None
        assert torch.equal(streamed.waveform, whole.waveform)


def test_each_prefix_has_the_official_units(omni: Omni) -> None:
    """Official code runs the generator over the whole prefix at every token, and streams what is
    new in its units."""
    generator: Any = omni.model.speech_generator
    stream = UnitStream(generator)
    states, units = [], []
    for _, state in run(omni, question(), 14):
        states.append(state)
        units += stream.push(state)
        path = generator.predict(torch.stack(states))[0].tolist()
        assert units == collapse_path(path, blank=generator.blank)
    assert len(units) > 8


def test_speech_comes_while_text_is_made(omni: Omni, voice: Voice) -> None:
    parts = list(answer_streaming(omni, question(), voice=voice, chunk_size=4, max_new_tokens=20))
    with_audio = [index for index, part in enumerate(parts) if len(part.waveform)]
    assert len(parts) == 22  # one a token, what was left, and the end of the voice
    assert with_audio[0] < 10
    assert len(with_audio) > 3
    times = [part.seconds for part in parts]
    assert times == sorted(times)
    reply = join_parts(omni, parts)
    assert reply.first_audio_seconds == parts[with_audio[0]].seconds
    check_chunks(parts, chunk_size=4)


def check_chunks(parts: list[AnswerPart], *, chunk_size: int) -> None:
    """The first samples need a chunk of units."""
    num_units = 0
    for part in parts:
        num_units += len(part.units)
        if len(part.waveform):
            break
    assert num_units >= chunk_size


def test_blanks_alone_give_no_speech(tmp_path: Path, voice: Voice) -> None:
    omni = make_omni(tmp_path)
    generator: Any = omni.model.speech_generator
    generator.output_proj.bias.data[generator.blank] = 1e4
    reply = answer(omni, question(), voice=voice, max_new_tokens=4)
    streamed = answer_streaming(omni, question(), voice=voice, max_new_tokens=4)
    for found in (reply, join_parts(omni, streamed)):
        assert found.units == []
        assert found.waveform is None
        assert found.first_audio_seconds is None


def test_no_half_characters_in_streamed_text(omni: Omni) -> None:
    for text in (*TEXTS, "漢字 and ünïcode"):
        stream = TextStream(omni.tokenizer)
        token_ids = omni.tokenizer(text, add_special_tokens=False).input_ids
        pieces = [stream.push(token) for token in token_ids]
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert "".join([*pieces, stream.finish()]) == text
    stream = TextStream(omni.tokenizer)
    half = omni.tokenizer("漢", add_special_tokens=False).input_ids[:1]
    assert stream.push(half[0]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("pads", [True, False, None])
def test_pads_to_30_s_where_the_model_was_trained_so(tmp_path: Path, pads: bool | None) -> None:
    """Released checkpoints lack the key, and were trained with padding."""
    omni = make_omni(tmp_path, pad_audio_to_30s=pads is True)
    if pads is None:
        delattr(omni.model.config, "pad_audio_to_30s")
    with torch.no_grad():
        length = embed_prompt(omni, question(0.5)).shape[1]
    text_length = len(tokenize_prompt([], [0], omni.tokenizer))
    assert length - text_length == (5 if pads is False else 300)


def test_errors_of_what_cannot_be_answered(omni: Omni, voice: Voice, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"31\.0 s of speech, over the 30 s"):
        answer(omni, question(31.0))
    with pytest.raises(ValueError, match="too short"):
        answer(omni, question(0.03))
    mute = make_omni(tmp_path, has_generator=False)
    assert answer(mute, question(), max_new_tokens=3).units is None
    with pytest.raises(ValueError, match="no speech generator"):
        answer(mute, question(), voice=voice)
    with pytest.raises(ValueError, match="no speech generator"):
        next(iter(answer_streaming(mute, question())))
