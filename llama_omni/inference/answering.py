"""Answers a spoken question in text, units and waveform, whole or while the text is being made.

Place in the data flow: generate.py and evaluate.py call it; speech/audio.py and dataset/prompt.py
make the input, model/omni.py the states, model/speech_generator.py the units, speech/vocoder.py the
waveform. Decoding is greedy, as in the paper.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from llama_omni.dataset.prompt import EOT_TOKEN, special_token_id, tokenize_prompt
from llama_omni.model.speech_generator import SpeechGeneratorCTC, collapse_path
from llama_omni.speech.audio import load_audio
from llama_omni.speech.whisper_mel import compute_mel, num_speech_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import WhisperFeatureExtractor

    from llama_omni.dataset.record_formats import Turn
    from llama_omni.model.omni import OmniSpeech2SLlamaForCausalLM
    from llama_omni.speech.vocoder import Voice

MAX_NEW_TOKENS = 256  # of the official inference
CHUNK_SIZE = 40  # units; Omega in the paper
NO_GENERATOR = (
    "the model has no speech generator (it comes from stage 1): it answers in text alone. Train "
    "stage 2 on it for speech."
)


class Omni(NamedTuple):
    """Holds a model in evaluation mode with what turns speech and text into its input."""

    model: OmniSpeech2SLlamaForCausalLM
    tokenizer: Any
    features: WhisperFeatureExtractor

    @property
    def can_speak(self) -> bool:
        return hasattr(self.model, "speech_generator")

    @property
    def stop_ids(self) -> set[int]:
        """Returns the id of <|eot_id|> and what else the config names as an end."""
        named = self.model.config.eos_token_id
        named = named if isinstance(named, list) else [named]
        return {special_token_id(EOT_TOKEN, self.tokenizer), *(i for i in named if i is not None)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Holds a whole answer."""

    text: str
    token_ids: list[int]  # the closing <|eot_id|> included
    is_finished: bool  # False: cut at max_new_tokens
    units: list[int] | None  # None: the model has no speech generator
    waveform: Tensor | None  # (num_samples,) at voice.sample_rate; None: no voice, or no units
    first_audio_seconds: float | None = None  # from question to first samples, when streamed


@dataclass(frozen=True, kw_only=True)
class AnswerPart:
    """Holds what a step of a streamed answer adds; text, units and waveform may be empty."""

    text: str
    token_ids: list[int]
    units: list[int]
    waveform: Tensor  # (num_samples,) at voice.sample_rate
    seconds: float  # since the question was handed over


def embed_prompt(omni: Omni, waveform: Tensor, history: Sequence[Turn] = ()) -> Tensor:
    """Embeds the prompt as (1, T, H): earlier turns with their answers, then the question.

    Args:
        waveform: (num_samples,) at 16 kHz, at most 30 s.
        history: the speech of these turns is read from their files.

    Raises:
        ValueError: too much speech, or too little for one token.
    """
    model, tokenizer, features = omni
    # Official code always pads and its checkpoints lack the key: their weights expect 30 s.
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
    """Yields each token of the answer, <|eot_id|> included, with the state (H,) of its units.

    That is the state that predicts the token, as in the official inference (for the first, the
    last state of the prompt); with `ctc_shift_states` false, the state at the token.
    """
    model: Any = omni.model
    is_shifted = getattr(model.config, "ctc_shift_states", True)
    stop_ids = omni.stop_ids
    cache = DynamicCache()

    def run(embeds: Tensor) -> Tensor:
        output = model.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        return output.last_hidden_state[0, -1]

    state = run(prompt)
    for number in range(1, max_new_tokens + 1):
        token = model.lm_head(state).float().argmax()
        is_last = int(token) in stop_ids or number == max_new_tokens
        if is_shifted:
            yield int(token), state
            if is_last:
                return
        state = run(model.model.embed_tokens(token.view(1, 1)))
        if not is_shifted:
            yield int(token), state
            if is_last:
                return


@torch.no_grad()
def answer(
    omni: Omni,
    waveform: Tensor,
    *,
    voice: Voice | None = None,
    history: Sequence[Turn] = (),
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answer:
    """Returns the whole answer to a question of (num_samples,) at 16 kHz; see `embed_prompt`.

    Raises:
        ValueError: a voice for a model without speech generator, or speech of a wrong length.
    """
    if voice is not None and not omni.can_speak:
        raise ValueError(NO_GENERATOR)
    prompt = embed_prompt(omni, waveform, history)
    tokens, states = zip(*decode_greedily(omni, prompt, max_new_tokens=max_new_tokens), strict=True)
    units = None
    if omni.can_speak:
        generator: Any = omni.model.speech_generator
        path = generator.predict(torch.stack(states))[0].tolist()
        units = collapse_path(path, blank=generator.blank)
    return Answer(
        text=decode_text(omni.tokenizer, list(tokens)).strip(),
        token_ids=list(tokens),
        is_finished=tokens[-1] in omni.stop_ids,
        units=units,
        waveform=voice(units) if voice is not None and units else None,
    )


@torch.no_grad()
def answer_streaming(
    omni: Omni,
    waveform: Tensor,
    *,
    voice: Voice | None = None,
    history: Sequence[Turn] = (),
    chunk_size: int = CHUNK_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Iterator[AnswerPart]:
    """Yields the answer in parts, about one a token; `join_parts` puts them together.

    Whenever `chunk_size` or more units wait, the voice gets them, as in the official demo. Text,
    tokens, units and waveform are those of `answer`. Raises ValueError as `answer` does, and for a
    model without speech generator, when the first part is asked for.
    """
    if not omni.can_speak:
        raise ValueError(NO_GENERATOR)
    start = time.perf_counter()
    text = TextStream(omni.tokenizer)
    unit_stream = UnitStream(omni.model.speech_generator)
    added_text, token_ids, units = "", [], []  # what was made since the last part

    def make_chunks() -> Iterator[list[int]]:
        """Yields the units for the voice at each token, most often none, and at last the rest."""
        nonlocal added_text
        waiting: list[int] = []
        prompt = embed_prompt(omni, waveform, history)
        for token, state in decode_greedily(omni, prompt, max_new_tokens=max_new_tokens):
            added = unit_stream.push(state)
            added_text += text.push(token)
            token_ids.append(token)
            units.extend(added)
            waiting += added
            is_due = len(waiting) >= chunk_size
            yield waiting if is_due else []
            waiting = [] if is_due else waiting
        added_text += text.finish()
        yield waiting

    chunks = make_chunks()
    pieces = voice.stream(chunks) if voice is not None else (torch.zeros(0) for _ in chunks)
    for samples in pieces:
        yield AnswerPart(
            text=added_text,
            token_ids=token_ids.copy(),
            units=units.copy(),
            waveform=samples,
            seconds=time.perf_counter() - start,
        )
        added_text = ""
        token_ids.clear()
        units.clear()


def join_parts(omni: Omni, parts: Iterable[AnswerPart]) -> Answer:
    """Returns the whole answer of a stream."""
    parts = list(parts)
    waveform = torch.cat([part.waveform for part in parts])
    token_ids = [token for part in parts for token in part.token_ids]
    return Answer(
        text="".join(part.text for part in parts).strip(),
        token_ids=token_ids,
        is_finished=token_ids[-1] in omni.stop_ids,
        units=[unit for part in parts for unit in part.units],
        waveform=waveform if len(waveform) else None,
        first_audio_seconds=next((part.seconds for part in parts if len(part.waveform)), None),
    )


class UnitStream:
    """Makes the units of one answer, state by state; together they are the whole answer's.

    The speech generator is causal, and frame 25 m + i repeats state m, so running it state by state
    with a cache gives the very frames of `SpeechGeneratorCTC.predict`. The official code
    (omni_speech/model/speech_generator/generation.py) runs it over the whole prefix at each token:
    the same units, at a cost that grows with the square of the length.
    """

    def __init__(self, generator: SpeechGeneratorCTC) -> None:
        self.generator = generator
        self.cache = DynamicCache()
        self.last_frame = -1  # unit of the newest frame: its repeat is no unit of its own

    def push(self, state: Tensor) -> list[int]:
        """Takes the next token's state (H,) and returns the units that it adds, at times none."""
        one = torch.ones(1, dtype=torch.int64, device=state.device)
        num_frames = one * self.generator.upsample_factor
        logits = self.generator.decode(state[None, None], one, num_frames, cache=self.cache)
        path = logits[0].float().argmax(-1).tolist()
        units = collapse_path(path, blank=self.generator.blank, previous=self.last_frame)
        self.last_frame = path[-1]
        return units


class TextStream:
    """Makes the text of one answer, token by token; a character cut in two waits for its rest."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.num_shown = 0  # characters given out

    def push(self, token: int) -> str:
        """Returns the text that a token adds."""
        self.token_ids.append(token)
        text = decode_text(self.tokenizer, self.token_ids)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._show(text)

    def finish(self) -> str:
        """Returns what waited for a rest that never came."""
        return self._show(decode_text(self.tokenizer, self.token_ids))

    def _show(self, text: str) -> str:
        shown, self.num_shown = self.num_shown, len(text)
        return text[shown:]


def decode_text(tokenizer: Any, token_ids: list[int]) -> str:
    """Returns the answer as text, without <|eot_id|> and its like."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
