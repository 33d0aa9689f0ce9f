"""Recognizers and UTMOS of evaluate.py: the real programs, with what can be had offline."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from llama_omni.speech.audio import resample
from llama_omni.speech.recognizer import load_recognizer
from llama_omni.speech.utmos import load_utmos


def test_pocketsphinx_transcribes_real_speech() -> None:
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("espeakng_loader")
    from data.espeak import SAMPLE_RATE, synthesize

    recognizer = load_recognizer("pocketsphinx")
    assert recognizer is not None
    spoken = synthesize("One two three four five.", voice="en-us+m3", speed=160, pitch=50)
    waveform = resample(torch.from_numpy(spoken / 32768).float(), SAMPLE_RATE, 16000)
    text = recognizer.transcribe(waveform)
    assert text == "one two three four five"
    assert recognizer.transcribe(torch.zeros(0)) == ""
    recognizer.transcribe(torch.randn(16000, generator=torch.Generator().manual_seed(0)))
    assert recognizer.transcribe(waveform) == text  # whatever came in between


WHISPER_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startofprev|>",
    "<|notimestamps|>",
)


def make_whisper(folder: Path, clips: dict[str, torch.Tensor]) -> None:
    """A tiny real Whisper, trained here until it transcribes the clips."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=alphabet, merges=[])
    tokenizer.add_tokens(list(WHISPER_TOKENS), special_tokens=True)
    tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(1501)])
    end, start, english, translate, transcribe, previous, no_times = (
        tokenizer.get_vocab()[token] for token in WHISPER_TOKENS
    )
    ends: dict[str, Any] = {"eos_token_id": end, "bos_token_id": end, "pad_token_id": end}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_target_positions=24,
        decoder_start_token_id=start,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **ends,
    )
    model = WhisperForConditionalGeneration(config)
    extractor = WhisperFeatureExtractor(feature_size=80)
    features = extractor(
        [clip.numpy() for clip in clips.values()], sampling_rate=16000, return_tensors="pt"
    ).input_features
    prompt = [start, english, transcribe, no_times]
    texts = tokenizer(list(clips), add_special_tokens=False).input_ids
    targets = torch.tensor([[*prompt, *text, end] for text in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model(input_features=features, decoder_input_ids=targets[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2)[..., 3:], targets[:, 4:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        max_length=24,
        is_multilingual=True,
        lang_to_id={"<|en|>": english},
        task_to_id={"translate": translate, "transcribe": transcribe},
        no_timestamps_token_id=no_times,
        prev_sot_token_id=previous,
        max_initial_timestamp_index=50,
        return_timestamps=False,
        **ends,
    )
    model.save_pretrained(folder)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)


def test_whisper_transcribes_what_it_was_trained_on(tmp_path: Path) -> None:
    time = torch.arange(16000) / 16000
    clips = {
        "low": 0.3 * torch.sin(2 * math.pi * 220 * time),
        "top": 0.3 * torch.sin(2 * math.pi * 3000 * time),
    }
    make_whisper(tmp_path / "whisper", clips)
    recognizer = load_recognizer(f"whisper:{tmp_path / 'whisper'}")
    assert recognizer is not None
    assert recognizer.name.startswith("whisper:")
    assert [recognizer.transcribe(clip) for clip in clips.values()] == list(clips)
    assert isinstance(recognizer.transcribe(clips["low"].repeat(33)), str)  # by pieces of 30 s
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no whole Whisper"):
        load_recognizer(f"whisper:{tmp_path / 'empty'}")


def test_utmos_scores_with_the_weights_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("utmos_pytorch")
    from utmos_pytorch.utmos_torch import UTMOSModel

    model = UTMOSModel().eval()
    state = model.state_dict()
    path = tmp_path / "utmos.pt"
    torch.save(state, path)
    waveform = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    score = load_utmos(str(path))(waveform)
    with torch.no_grad():
        domain, listener = torch.zeros(1, dtype=torch.int), torch.full((1,), 288)
        expected = model(waveform[None, None], domain, listener).mean() * 2 + 3
    assert score == pytest.approx(float(expected), abs=1e-4)
    state.pop(next(iter(state)))
    torch.save(state, path)
    with pytest.raises(ValueError, match="1 weights are missing"):
        load_utmos(str(path))
    with pytest.raises(FileNotFoundError, match="absent"):
        load_utmos(str(tmp_path / "absent.pt"))
