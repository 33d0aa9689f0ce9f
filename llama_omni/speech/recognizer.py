"""Speech recognizers, each optional and loaded when asked for: Whisper and PocketSphinx.

A waveform is (num_samples,) float32 at 16 kHz.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llama_omni.options.hub import resolve_artifact

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SAMPLE_RATE = 16000
ROOM_NOISE = 1e-3  # PocketSphinx stops at silence of exact zeros, as espeak-ng's
WHISPER_FILES = ("*.json", "*.txt", "model.safetensors", "model-*.safetensors")
NEEDS_EVAL = "install the extra 'eval' (pip install -e '.[eval]')"


@dataclass(frozen=True)
class Recognizer:
    """A named speech recognizer. `spelling` maps British to American words, as Whisper's does."""

    name: str
    transcribe: Callable[[Tensor], str]
    spelling: dict[str, str]


def load_recognizer(spec: str, *, device: torch.device | str = "cpu") -> Recognizer | None:
    """Load what --asr names: "whisper:FOLDER_OR_HUB_ID", "pocketsphinx", "none", or "auto".

    "auto" is pocketsphinx where it is installed, else none.

    Raises:
        ValueError: unknown name, or a package is missing.
    """
    kind, _, source = spec.partition(":")
    if kind == "whisper" and source:
        return load_whisper(source, device)
    has_sphinx, has_jiwer = is_installed("pocketsphinx"), is_installed("jiwer")
    if spec == "pocketsphinx" and not has_sphinx:
        raise ValueError(f"--asr pocketsphinx: not installed; {NEEDS_EVAL}")
    if spec == "pocketsphinx" or (spec == "auto" and has_sphinx and has_jiwer):
        return load_pocketsphinx()
    if spec in ("auto", "none"):
        return None
    raise ValueError(f"--asr {spec}: give whisper:FOLDER_OR_HUB_ID, pocketsphinx, none or auto")


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_whisper(source: str, device: torch.device | str) -> Recognizer:
    """Load Whisper by transformers: English, greedy, any length (30 s at a time, by timestamps)."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = resolve_artifact(source, field="--asr whisper", allow_patterns=WHISPER_FILES)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16
    try:
        processor: Any = WhisperProcessor.from_pretrained(folder)
        model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    except OSError as error:
        raise ValueError(f"--asr whisper:{source}: no whole Whisper there ({error})") from None
    model.to(device).eval()
    is_multilingual = getattr(model.generation_config, "is_multilingual", False)
    options = {"language": "en", "task": "transcribe"} if is_multilingual else {}

    def transcribe(waveform: Tensor) -> str:
        is_long = len(waveform) > processor.feature_extractor.n_samples
        inputs = processor(
            waveform.numpy(),
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            return_attention_mask=True,
            truncation=False,
            padding="longest" if is_long else "max_length",
        )
        token_ids = model.generate(
            inputs.input_features.to(device, dtype),
            attention_mask=inputs.attention_mask.to(device),
            return_timestamps=is_long,
            **options,
        )
        return processor.batch_decode(token_ids, skip_special_tokens=True)[0].strip()

    spelling = getattr(processor.tokenizer, "english_spelling_normalizer", None)
    return Recognizer(f"whisper:{source}", transcribe, spelling or {})


def load_pocketsphinx() -> Recognizer:
    """Load PocketSphinx with the small US English model in its wheel: quick, and often wrong."""
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    return Recognizer("pocketsphinx en-us", partial(transcribe_by_sphinx, decoder), {})


def transcribe_by_sphinx(decoder: Any, waveform: Tensor, room_noise: float = ROOM_NOISE) -> str:
    """Return the words that PocketSphinx makes of a waveform, "" for none.

    Args:
        room_noise: standard deviation of the normal noise that is added, always the same.
    """
    if len(waveform) < SAMPLE_RATE // 10:  # it fails on less than a frame
        return ""
    room = torch.Generator().manual_seed(0)
    waveform = waveform + room_noise * torch.randn(len(waveform), generator=room)
    pcm = (waveform.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes()
    decoder.reinit_feat()  # else it adapts to what came before
    decoder.start_utt()
    decoder.process_raw(pcm, no_search=False, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return "" if found is None else found.hypstr
