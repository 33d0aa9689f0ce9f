"""Answers spoken questions: a wav in; text and, after stage 2, a wav out.

    python generate.py MODEL QUESTION.wav [MORE.wav ...] --output_dir OUT [--vocoder PATH]
    python generate.py MODEL QUESTION.wav --output_dir OUT --streaming --chunk_size 40

MODEL is a final_model folder of either stage, or a released checkpoint (folder or hub id). Last in
the data flow; inference/answering.py has what this file does from Python:

    omni = load_omni_model(folder, device="cuda", dtype=torch.bfloat16)
    print(answer(omni, load_audio(path)).text)
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: this folder's `evaluate.py` and others must not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # shadow packages of those names

import torch
from transformers import AutoTokenizer

from llama_omni.dataset.check import MAX_SECONDS
from llama_omni.inference.answering import (
    CHUNK_SIZE,
    MAX_NEW_TOKENS,
    NO_GENERATOR,
    Answer,
    AnswerPart,
    Omni,
    answer,
    answer_streaming,
    join_parts,
)
from llama_omni.model.loading import (
    WEIGHTS,
    CheckpointReader,
    encoder_shape,
    load_weights,
    read_llama_config,
)
from llama_omni.model.omni import OmniSpeech2SConfig, OmniSpeech2SLlamaForCausalLM
from llama_omni.options.hub import resolve_artifact
from llama_omni.speech.audio import audio_duration, load_audio, save_audio
from llama_omni.speech.whisper_mel import load_feature_extractor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_omni.speech.vocoder import Voice


logger = logging.getLogger("llama_omni.generate")


def read_omni_config(folder: Path) -> tuple[OmniSpeech2SConfig, CheckpointReader]:
    """Reads the config, completed from the weights, and opens their reader; loads no weight yet.

    `speech_generator_type` is None where there is no speech generator (stage 1).

    Raises:
        ValueError: no LLaMA-Omni model there.
    """
    config = read_llama_config(folder)
    if not isinstance(config, OmniSpeech2SConfig):
        raise ValueError(
            f"{folder}: a plain {config.model_type} model, without a speech encoder. Give "
            "OUT/final_model of a training run, or a released LLaMA-Omni checkpoint."
        )
    reader = CheckpointReader(folder)
    for name, size in encoder_shape(reader, "model.speech_encoder.").items():
        setattr(config, name, size)
    if "speech_generator.output_proj.weight" not in reader:
        config.speech_generator_type = None
    return config, reader


def load_omni_model(folder: Path, *, device: torch.device | str, dtype: torch.dtype) -> Omni:
    """Reads a final_model folder of either stage or a released checkpoint.

    Raises:
        ValueError: no LLaMA-Omni model there, or weights are missing or of another shape.
    """
    config, reader = read_omni_config(folder)
    with torch.device("meta"):
        model: Any = OmniSpeech2SLlamaForCausalLM(config)
    model.to(dtype).to_empty(device=device)
    model.reset_rotary(torch.device(device))
    absent = load_weights(model, [reader], seed=0)
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} weights are missing, first {absent[0]}. The checkpoint is "
            "incomplete; copy it again."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    features = load_feature_extractor(folder, mel_size=config.mel_size)
    return Omni(model.eval(), tokenizer, features)


def choose_voice(folder: Path, args: argparse.Namespace, device: torch.device) -> Voice | None:
    """Returns the vocoder, else the embedded voice of the k-means, or None for text alone.

    Raises:
        ValueError: there is neither, it speaks other units, or the model cannot speak at all.
    """
    from llama_omni.speech.vocoder import load_voice

    config, _ = read_omni_config(folder)
    if args.text_only:
        return None
    if not getattr(config, "speech_generator_type", None):
        if args.vocoder or args.kmeans or getattr(args, "streaming", False):
            raise ValueError(f"{folder}: {NO_GENERATOR}")
        logger.warning("%s: %s", folder, NO_GENERATOR)
        return None
    vocoder_path = resolve_artifact(args.vocoder, field="--vocoder") if args.vocoder else None
    kmeans_path = find_kmeans(folder, args)
    if vocoder_path is None and kmeans_path is None:
        raise ValueError(
            f"{folder}: no voice to speak with. Give --vocoder FOLDER (a unit HiFi-GAN), or "
            "--kmeans FILE (log-mel centroids, which are a simple voice of their own); --text_only "
            "does without."
        )
    voice = load_voice(vocoder_path=vocoder_path, kmeans_path=kmeans_path, device=device)
    if voice.num_units != config.unit_vocab_size:
        raise ValueError(
            f"{vocoder_path or kmeans_path}: speaks {voice.num_units} units, but {folder} was "
            f"trained on {config.unit_vocab_size}. Give the one it was trained with."
        )
    return voice


def find_kmeans(folder: Path, args: argparse.Namespace) -> Path | None:
    """Returns --kmeans, else what training left beside the model, else None."""
    if args.kmeans:
        return resolve_artifact(args.kmeans, field="--kmeans")
    beside = folder / "kmeans.safetensors"
    return beside if beside.is_file() else None


def check_questions(questions: Sequence[Path], output_dir: Path) -> None:
    """Raises FileNotFoundError or ValueError before any weight is read."""
    outputs: set[Path] = set()
    for path in questions:
        seconds = audio_duration(path)
        if not 0 < seconds <= MAX_SECONDS:
            raise ValueError(
                f"{path}: {seconds:.1f} s of speech; a question has more than 0 s and at most "
                f"{MAX_SECONDS:g} s."
            )
        output = answer_path(path, output_dir)
        if output in outputs or output.resolve() in {other.resolve() for other in questions}:
            raise ValueError(
                f"{path}: its answer {output} would overwrite another file; rename it."
            )
        outputs.add(output)


def answer_path(question: Path, output_dir: Path) -> Path:
    return output_dir / f"{question.stem}_answer.wav"


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Chooses for "auto" the first GPU in bf16, else the CPU in float32.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no GPU here. Give --device cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return torch.device(device), getattr(torch, dtype)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `generate.py` and `evaluate.py` have in common."""
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocoder", help="unit HiFi-GAN: folder or hub id")
    parser.add_argument("--kmeans", help="default: MODEL/kmeans.safetensors")
    parser.add_argument("--text_only", action="store_true", help="no speech, no voice needed")
    parser.add_argument("--chunk_size", type=int, default=CHUNK_SIZE, help="units a piece")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="final_model folder or hub id")
    parser.add_argument("questions", metavar="QUESTION", type=Path, nargs="+")
    parser.add_argument("--streaming", action="store_true", help="speak while the text is made")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args, "chunk_size", "max_new_tokens")
    return args


def check_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *counts: str
) -> None:
    """Ends the program when one of the named counts is below 1."""
    for name in counts:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}={value} must be above 0")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        check_questions(args.questions, args.output_dir)
        run(args)
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Answers the questions one after the other, and writes OUT/QUESTION_answer.wav and .json."""
    device, dtype = device_and_dtype(args.device, args.dtype)
    folder = resolve_artifact(args.model, field="MODEL", allow_patterns=WEIGHTS)
    voice = choose_voice(folder, args, device)
    omni = load_omni_model(folder, device=device, dtype=dtype)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.questions:
        waveform = load_audio(path)
        sys.stdout.write(f"{path}: ")
        if args.streaming:
            parts = answer_streaming(
                omni,
                waveform,
                voice=voice,
                chunk_size=args.chunk_size,
                max_new_tokens=args.max_new_tokens,
            )
            reply = join_parts(omni, show(parts))
            sys.stdout.write("\n")
        else:
            reply = answer(omni, waveform, voice=voice, max_new_tokens=args.max_new_tokens)
            sys.stdout.write(f"{reply.text}\n")
        write_answer(reply, path, args.output_dir, voice)


def show(parts: Iterator[AnswerPart]) -> Iterator[AnswerPart]:
    """Writes the text as it comes."""
    for part in parts:
        sys.stdout.write(part.text)
        sys.stdout.flush()
        yield part


def write_answer(reply: Answer, question: Path, output_dir: Path, voice: Voice | None) -> None:
    output = answer_path(question, output_dir)
    report = {
        "question": str(question),
        "text": reply.text,
        "is_finished": reply.is_finished,
        "units": reply.units,
        "first_audio_seconds": reply.first_audio_seconds,
    }
    output.with_suffix(".json").write_text(
        json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if not reply.is_finished:
        logger.warning("%s: the answer was cut at --max_new_tokens", question)
    if voice is None:
        return
    if reply.waveform is None:
        logger.warning("%s: the speech generator gave blanks alone; there is no speech", question)
        return
    save_audio(output, reply.waveform, sample_rate=voice.sample_rate)
    latency = reply.first_audio_seconds
    delay = "" if latency is None else f", first audio after {1000 * latency:.0f} ms"
    sys.stdout.write(f"{output}: {len(reply.waveform) / voice.sample_rate:.1f} s{delay}\n")


if __name__ == "__main__":
    sys.exit(main())
