"""Both stages on a tiny model, then spoken questions and spoken answers, in a few minutes on a CPU.

    make demo FOLDER=llama_omni    (or, from the root: python -m tests.demos.llama_omni.demo)

No pretrained encoder can be had offline, so the tiny Whisper is trained too
(`tune_speech_encoder`); with real weights it is frozen. In runs/demo/llama_omni are then the
data, the models, the answers as wav files, loss.png and summary.json. Exit status 1 if it did not
learn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "llama_omni"
CONFIGS = Path(__file__).parent
OUT = ROOT / "runs" / "demo" / "llama_omni"
NUM_QUESTIONS = 30
TAKES = 60  # of each question, by the training voices
HELD_OUT_VOICE = "en-us+m6"
NUM_UNITS = 100

MIN_RIGHT = 0.8
MIN_DISTINCT_ANSWERS = 10
MAX_UNIT_ERROR_RATE = 0.2


@dataclass
class Reply:
    """Holds the model's answer to one held-out question."""

    question: str
    expected: str
    answer: str
    answer_to_silence: str
    unit_error_rate: float
    has_voice: bool
    wav: str

    @property
    def is_right(self) -> bool:
        return self.answer == self.expected


def run(title: str, *argv: str | Path, cwd: Path = FOLDER) -> None:
    """Runs one command with its output shown, and says what it is."""
    say(f"\n== {title}\n$ {' '.join(map(shown, argv))}\n")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable if part == "python" else str(part) for part in argv]
    result = subprocess.run(command, cwd=cwd, env=environment, check=False)
    if result.returncode:
        raise SystemExit(f"{title}: failed with exit status {result.returncode}")


def shown(part: str | Path) -> str:
    """Returns paths below the repository relative to it, as a reader would type them."""
    return os.path.relpath(part, FOLDER) if isinstance(part, Path) else part


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def make_data() -> None:
    """Makes spoken questions by a dozen voices, and the same by one that is not in training."""
    common = ["--distinct", str(NUM_QUESTIONS), "--phrasings", "1", "--seed", "0", "--workers", "2"]
    maker = ["python", "-m", "data.make_speech"]
    count = str(NUM_QUESTIONS * TAKES)
    run("spoken questions", *maker, OUT / "train", "--count", count, *common, cwd=ROOT)
    run(
        "the same questions by a held-out voice", *maker, OUT / "held_out",
        "--count", str(NUM_QUESTIONS), "--voices", HELD_OUT_VOICE, *common, cwd=ROOT,
    )  # fmt: skip


def train_both_stages() -> None:
    """Runs the documented commands, with the demo's configs."""
    run(
        "a tiny model with random weights", "python", "-m", "llama_omni.tools.make_model",
        OUT / "model",
    )  # fmt: skip
    run(
        "stage 1: speech to text", "bash", "scripts/run_stage1.sh",
        CONFIGS / "demo_stage1_config.json", OUT / "train", OUT / "stage1",
        "--model_name_or_path", OUT / "model" / "llama",
        "--speech_encoder", OUT / "model" / "whisper",
        "--validation_data_path", OUT / "held_out",
    )  # fmt: skip
    run(
        "units: k-means over the answers' log-mel frames", "python", "-m", "llama_omni.units",
        "fit", OUT / "train", OUT / "kmeans.safetensors", "--num_units", str(NUM_UNITS),
    )  # fmt: skip
    run(
        "stage 2: the speech generator", "bash", "scripts/run_stage2.sh",
        CONFIGS / "demo_stage2_config.json", OUT / "train", OUT / "stage1" / "final_model",
        OUT / "kmeans.safetensors", OUT / "stage2",
        "--validation_data_path", OUT / "held_out",
    )  # fmt: skip


def ask_held_out() -> list[Reply]:
    """Asks every held-out question, and silence of the same length."""
    import torch
    from rapidfuzz.distance import Levenshtein
    from tqdm import tqdm

    from llama_omni.dataset.records import read_records
    from llama_omni.generate import load_omni_model
    from llama_omni.inference.answering import answer
    from llama_omni.speech.audio import load_audio, save_audio
    from llama_omni.speech.quantizer import load_quantizer
    from llama_omni.speech.vocoder import load_voice

    final = OUT / "stage2" / "final_model"
    omni = load_omni_model(final, device="cpu", dtype=torch.float32)
    voice = load_voice(vocoder_path=None, kmeans_path=final / "kmeans.safetensors")
    quantizer = load_quantizer(final / "kmeans.safetensors")
    records, _ = read_records(OUT / "held_out")
    (OUT / "answers").mkdir(exist_ok=True)
    replies = []
    for number, record in enumerate(tqdm(records, desc="asking", unit="question")):
        turn = record.turns[0]
        waveform = load_audio(turn.speech_path)
        reply = answer(omni, waveform, voice=voice)
        silence = answer(omni, torch.zeros_like(waveform), max_new_tokens=32)
        assert turn.answer_speech_path is not None
        target = quantizer.extract(load_audio(turn.answer_speech_path))
        wav = OUT / "answers" / f"{number:02d}-answer.wav"
        shutil.copy(turn.speech_path, wav.with_name(f"{number:02d}-question.wav"))
        if reply.waveform is not None:
            save_audio(wav, reply.waveform, sample_rate=voice.sample_rate)
        replies.append(
            Reply(
                question=turn.question,
                expected=turn.answer,
                answer=reply.text,
                answer_to_silence=silence.text,
                unit_error_rate=Levenshtein.distance(reply.units or [], target) / len(target),
                has_voice=bool(reply.units),
                wav=str(wav.relative_to(ROOT)),
            )
        )
    return replies


def score(replies: list[Reply]) -> tuple[dict[str, Any], list[str]]:
    """Returns the numbers of the whole set, and what falls short."""
    right = [reply for reply in replies if reply.is_right]
    summary: dict[str, Any] = {
        "questions": len(replies),
        "distinct_answers": len({reply.expected for reply in replies}),
        "right": len(right) / len(replies),
        "right_with_silence": sum(r.answer_to_silence == r.expected for r in replies)
        / len(replies),
        "unit_error_rate_when_right": (
            sum(reply.unit_error_rate for reply in right) / len(right) if right else 1.0
        ),
        "without_voice": sum(not reply.has_voice for reply in replies),
    }
    demands = (
        (summary["right"] >= MIN_RIGHT, f"fewer than {MIN_RIGHT:.0%} of the answers are right"),
        (
            summary["distinct_answers"] >= MIN_DISTINCT_ANSWERS,
            f"fewer than {MIN_DISTINCT_ANSWERS} distinct answers",
        ),
        (
            summary["unit_error_rate_when_right"] <= MAX_UNIT_ERROR_RATE,
            f"the unit error rate is above {MAX_UNIT_ERROR_RATE:.0%}",
        ),
        (summary["without_voice"] == 0, "some answers are blanks alone: no voice"),
    )
    return summary, [error for is_met, error in demands if not is_met]


def plot_losses(path: Path) -> None:
    """Plots training and validation loss of both stages, side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    titles = ("stage 1: nats a token", "stage 2: nats a unit")
    for stage, panel, title in zip((1, 2), panels, titles, strict=True):
        lines = (OUT / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
        for key, label in (("train/loss", "training voices"), ("eval/loss", "held-out voice")):
            points = [(m["step"], m[key]) for m in map(json.loads, lines) if key in m]
            panel.plot(*zip(*points, strict=True), label=label)
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    started = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    make_data()
    train_both_stages()
    say("\n== questions by a held-out voice\n")
    replies = ask_held_out()
    summary, errors = score(replies)
    plot_losses(OUT / "loss.png")
    summary["minutes"] = (time.perf_counter() - started) / 60
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for reply in replies:
        mark = " " if reply.is_right else "!"
        say(f"{mark} {reply.question:45s} {reply.answer:25s} {reply.wav}\n")
    say(
        f"\nright: {summary['right']:.0%} of {summary['questions']} questions with "
        f"{summary['distinct_answers']} distinct answers (with silence in place of the speech: "
        f"{summary['right_with_silence']:.0%})\n"
        f"unit error rate where right: {summary['unit_error_rate_when_right']:.1%}\n"
        f"{summary['minutes']:.1f} minutes; wav files, loss.png and summary.json are in "
        f"{OUT.relative_to(ROOT)}\n"
    )
    for error in errors:
        say(f"the demo failed: {error}\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
