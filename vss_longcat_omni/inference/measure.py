"""Measures loss, answers, their transcripts and their time for every sample of a split.

evaluate.py hands over a model that can answer and prepared samples; metrics.py counts.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from tqdm import tqdm

from vss_longcat_omni.dataset.collator import collate
from vss_longcat_omni.dataset.examples import VssDataset
from vss_longcat_omni.dataset.folders import read_transcript
from vss_longcat_omni.inference.metrics import Result, summarize
from vss_longcat_omni.media.audio import audio_duration, load_audio, resample, save_audio
from vss_longcat_omni.speech.recognizer import (
    NEEDS_EVAL,
    SAMPLE_RATE,
    is_installed,
    load_recognizer,
)
from vss_longcat_omni.train_ds import preprocess_function
from vss_longcat_omni.training.metrics import describe, stack_sums

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

    from vss_longcat_omni.dataset.prepare import PreparedSample
    from vss_longcat_omni.inference.answerer import Answerer
    from vss_longcat_omni.speech.recognizer import Recognizer

logger = logging.getLogger(__name__)

NUM_SHOWN = 8  # samples to listen to in TensorBoard


def evaluate(
    answerer: Answerer,
    prepared: Sequence[PreparedSample],
    *,
    out: Path,
    recognizer: Recognizer | None,
    writer: SummaryWriter | None = None,
) -> dict[str, Any]:
    """Return the summary of metrics.py; a run that dies leaves the lines of results.jsonl so far.

    Raises:
        ValueError: as `compute_losses`.
    """
    losses = compute_losses(answerer, prepared)
    out.mkdir(parents=True, exist_ok=True)
    # The first use of a kernel loads it, which is no computing of the model's.
    few_frames = dataclasses.replace(answerer.options, max_frames=2)
    answer_sample(dataclasses.replace(answerer, options=few_frames), prepared[0])
    results: list[Result] = []
    with (out / "results.jsonl").open("w", encoding="utf-8") as file:
        for sample in tqdm(prepared, desc="answering", unit="sample"):
            result, speech = answer_sample(answerer, sample)
            score(result, speech, answerer, sample, out=out, recognizer=recognizer)
            if writer is not None and len(results) < NUM_SHOWN:
                show(writer, result, speech, answerer, sample)
            results.append(result)
            file.write(json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n")
            file.flush()
    summary = summarize(results, losses, recognizer)
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    return summary


@torch.no_grad()
def compute_losses(answerer: Answerer, prepared: Sequence[PreparedSample]) -> dict[str, float]:
    """Compute loss and accuracy of each term over all samples, teacher forced, as
    `training.metrics.describe` returns them.

    Raises:
        ValueError: a transcript is missing, or longer than its answer.
    """
    model: Any = answerer.model
    dataset = VssDataset(
        prepared,
        partial(preprocess_function, system_prompt=answerer.system_prompt),
        answerer.tokenizer,
        tokens=model.tokens,
        pixels=answerer.settings.pixels,
        use_transcripts=answerer.options.has_text,
    )
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for number in tqdm(range(len(dataset)), desc="losses", unit="sample"):
        batch: Any = send_to_device(collate([dataset[number]]), model.lm_head.weight.device)
        sums += stack_sums(model(**batch))
    return describe(sums)


def answer_sample(answerer: Answerer, sample: PreparedSample) -> tuple[Result, Tensor]:
    """Return the answer to a sample, timed, and its waveform (S,) at the codec's rate."""
    media, codec, files = sample.load_media(), answerer.codec, sample.sample
    started = time.perf_counter()
    answer = answerer.answer_media(media, files.video.parent)
    speech = codec.decode(answer.codes) if len(answer.codes) else torch.empty(0)
    computing_seconds = time.perf_counter() - started
    result = Result(
        name=files.name,
        expected=None if files.transcript is None else read_transcript(files.transcript),
        answer=answer.text if answerer.options.has_text else None,
        is_finished=answer.is_finished,
        wav=None,
        seconds=len(speech) / codec.sample_rate,
        true_seconds=audio_duration(files.output_audio),
        computing_seconds=computing_seconds,
    )
    return result, speech


def score(
    result: Result,
    speech: Tensor,
    answerer: Answerer,
    sample: PreparedSample,
    *,
    out: Path,
    recognizer: Recognizer | None,
) -> None:
    """Write the speech, and put in `result` what the recognizer makes of it."""
    rate = answerer.codec.sample_rate
    if len(speech):
        path = out / f"{result.name}.wav"
        save_audio(path, speech, sample_rate=rate)
        result.wav = str(path)
    if recognizer is None:
        return
    result.transcribed = ""  # without sound every word counts as lost
    if len(speech):
        result.transcribed = recognizer.transcribe(resample(speech, rate, SAMPLE_RATE))
    round_trip = resample(answerer.codec.decode(sample.codes), rate, SAMPLE_RATE)
    result.round_trip_transcribed = recognizer.transcribe(round_trip)


def show(
    writer: SummaryWriter,
    result: Result,
    speech: Tensor,
    answerer: Answerer,
    sample: PreparedSample,
) -> None:
    """Show the answer, the true one and the texts of both in TensorBoard."""
    true_speech = load_audio(sample.sample.output_audio)
    writer.add_audio(f"{result.name}/true answer", true_speech[None], sample_rate=SAMPLE_RATE)
    if len(speech):
        rate = answerer.codec.sample_rate
        writer.add_audio(f"{result.name}/answer", speech[None], sample_rate=rate)
    texts = {"true": result.expected, "answer": result.answer, "transcribed": result.transcribed}
    lines = [f"{name}: {text}" for name, text in texts.items() if text is not None]
    writer.add_text(f"{result.name}/texts", "  \n".join(lines))


def choose_recognizer(spec: str, device: str) -> Recognizer | None:
    """Load what --asr names, with a warning of what will not be measured.

    Raises:
        ValueError, FileNotFoundError: something was asked for and cannot be had.
    """
    if not is_installed("jiwer"):
        if spec not in ("auto", "none"):
            raise ValueError(f"--asr {spec}: word errors need jiwer; {NEEDS_EVAL}")
        logger.warning("no word error rates: jiwer is missing; %s", NEEDS_EVAL)
    recognizer = load_recognizer(spec, device=device)
    if recognizer is None:
        logger.warning("no ASR-WER: pocketsphinx is missing or --asr is none; %s", NEEDS_EVAL)
    return recognizer
