"""Answers spoken questions: a wav in; text and, after stage 2, a wav out.

    python generate.py MODEL QUESTION.wav [MORE.wav ...] --output_dir OUT [--vocoder PATH]
    python generate.py MODEL QUESTION.wav --output_dir OUT --streaming --chunk_size 40

MODEL is a final_model folder of either stage, or a released checkpoint (folder or hub id). Last in
the data flow: audio.py and prompt.py make the input, model.py the states, speech_generator.py the
units, vocoder.py the voice. Decoding is greedy, as in the paper.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __package__ in (None, ""):  # run as a script: this folder's `evaluate.py` and others must not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # shadow packages of those names

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, DynamicCache, WhisperFeatureExtractor

from llama_omni.artifacts import resolve_artifact
from llama_omni.audio import (
    audio_duration,
    compute_mel,
    load_audio,
    num_speech_tokens,
    save_audio,
)
from llama_omni.loading import CheckpointReader, encoder_shape, load_weights
from llama_omni.model import OmniSpeech2SConfig, OmniSpeech2SLlamaForCausalLM
from llama_omni.prompt import EOT_TOKEN, special_token_id, tokenize_prompt
from llama_omni.speech_generator import collapse_path
from llama_omni.stage1_trainer import WEIGHTS, read_llama_config
from llama_omni.streaming import TextStream, UnitStream, decode_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_omni.records import Turn
    from llama_omni.vocoder import Voice

logger = logging.getLogger("llama_omni.generate")

MAX_NEW_TOKENS = 256  # of the official inference
CHUNK_SIZE = 40  # units; Omega in the paper
MAX_SECONDS = 30.0
NO_GENERATOR = (
    "the model has no speech generator (it comes from stage 1), so it answers in text alone. Train "
    "stage 2 on it for speech"
)


class Omni(NamedTuple):
    """A model in evaluation mode with what turns speech and text into its input."""

    model: OmniSpeech2SLlamaForCausalLM
    tokenizer: Any
    features: WhisperFeatureExtractor

    @property
    def can_speak(self) -> bool:
        return hasattr(self.model, "speech_generator")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer. `units` and `waveform` are None where there is no generator or no voice."""

    text: str
    token_ids: list[int]  # <|eot_id|> included
    is_finished: bool  # False: cut at max_new_tokens
    units: list[int] | None
    waveform: Tensor | None  # (num_samples,) float32 on the CPU, at the voice's sample_rate
    first_audio_seconds: float | None = None  # from question to first samples; when streamed


@dataclass(frozen=True, kw_only=True)
class AnswerPart:
    """What one step of a streamed answer adds; text, units and waveform may each be empty."""

    text: str
    token_ids: list[int]
    units: list[int]
    waveform: Tensor  # (num_samples,) float32 on the CPU
    seconds: float  # since the question was handed over


def load_omni_model(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Omni:
    """Reads a final_model folder of either stage or a released checkpoint.

    Raises:
        ValueError: no LLaMA-Omni model there, or weights are missing or of another shape.
    """
    config = read_llama_config(folder)
    if not isinstance(config, OmniSpeech2SConfig):
        raise ValueError(
            f"{folder}: a plain {config.model_type} model, which cannot hear. Give OUT/final_model "
            "of a training run, or a released LLaMA-Omni checkpoint."
        )
    reader = CheckpointReader(folder)
    for name, size in encoder_shape(reader, "model.speech_encoder.").items():
        setattr(config, name, size)
    if "speech_generator.output_proj.weight" not in reader:
        config.speech_generator_type = None
    with torch.device("meta"):
        model = OmniSpeech2SLlamaForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    model.reset_rotary(torch.device(device))
    absent = load_weights(model, [reader], seed=0)
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} weights are missing, first {absent[0]}. The checkpoint is "
            "incomplete; copy it again."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if (folder / "preprocessor_config.json").is_file():
        features = WhisperFeatureExtractor.from_pretrained(folder)
    else:  # released checkpoints have none; these are Whisper's own settings
        features = WhisperFeatureExtractor(feature_size=config.mel_size)
    return Omni(model.eval(), tokenizer, features)


def embed_prompt(omni: Omni, waveform: Tensor, history: Sequence[Turn] = ()) -> Tensor:
    """(1, T, H) embedded prompt: earlier turns with their answers, then the question.

    Args:
        waveform: (num_samples,) at 16 kHz, at most 30 s.
        history: the speech of these turns is read from their files.

    Raises:
        ValueError: too much speech, or too little for one token.
    """
    model, tokenizer, features = omni
    # Official code always pads, and released checkpoints lack the key: their weights expect it.
    pad_to_30s = getattr(model.config, "pad_audio_to_30s", True)
    waveforms = [load_audio(turn.speech_path) for turn in history] + [waveform]
    mels = [compute_mel(clip, features, pad_to_30s=pad_to_30s) for clip in waveforms]
    ds_rate = model.config.speech_encoder_ds_rate
    counts = [num_speech_tokens(mel.shape[1], ds_rate=ds_rate) for mel in mels]
    if 0 in counts:
        raise ValueError("the speech is too short to give one speech token (0.1 s)")
    input_ids = torch.tensor([tokenize_prompt(history, counts, tokenizer)])
    speech = pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2)
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    return model.embed(*(x.to(model.device) for x in (input_ids, speech, lengths)))


@torch.no_grad()
def decode_greedily(
    omni: Omni, prompt: Tensor, *, max_new_tokens: int = MAX_NEW_TOKENS
) -> Iterator[tuple[int, Tensor]]:
    """Each token of the answer, <|eot_id|> included, with the state (H,) its units are made of.

    That is the state that predicts the token, as in the official inference (for the first, the
    last state of the prompt); with `ctc_shift_states` false, the state at the token.
    """
    model = omni.model
    stop_ids = {special_token_id(EOT_TOKEN, omni.tokenizer)}
    is_shifted = getattr(model.config, "ctc_shift_states", True)
    cache = DynamicCache()
    embeds = prompt
    for number in range(1, max_new_tokens + 1):
        state = next_state(model, embeds, cache)
        token = model.lm_head(state).argmax()
        embeds = model.model.embed_tokens(token.view(1, 1))
        is_last = int(token) in stop_ids or number == max_new_tokens
        if is_shifted:
            yield int(token), state
        ...
