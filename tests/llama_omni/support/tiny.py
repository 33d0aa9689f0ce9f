"""Makes what tests train on, once a session: tiny real models and a few spoken records.

`conftest.py` offers `make_tiny` as the fixture `tiny`. Runs are the user's own commands: `train`
calls train.py's main in this process, `launch` starts it as a program.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[3] / "llama_omni"
NUM_UNITS = 40
NUM_RECORDS = 8
ANSWERS = ("Four.", "It is red.", "Paris.", "Cold.", "Seven.", "Blue.", "Rome.", "The cat is big.")

# Options that every tiny run shares; later ones win.
COMMON: dict[str, Any] = {
    "mel_size": 80,
    "speech_encoder_hidden_size": 128,
    "bf16": False,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "evaluation_strategy": "no",
    "save_strategy": "no",
    "unit_vocab_size": NUM_UNITS,
    "ctc_decoder_config": "(1,64,4,128)",
    "ctc_upsample_factor": 4,
}


@dataclass(frozen=True)
class Tiny:
    """Paths of one session's tiny things."""

    root: Path
    data: Path  # the source document's jsonl, with tgt_units
    llama: Path
    whisper: Path
    kmeans: Path
    stage1_model: Path  # a stage-1 result of one step

    def stage1(self, out: Path, **options: Any) -> list[str]:
        """Returns the command line of a stage-1 run."""
        given = {
            "stage": 1,
            "data_path": self.data,
            "model_name_or_path": self.llama,
            "speech_encoder": self.whisper,
            "output_dir": out,
        }
        return arguments(COMMON | given | options)

    def stage2(self, out: Path, **options: Any) -> list[str]:
        """Returns the command line of a stage-2 run on the records' own units."""
        given = {
            "stage": 2,
            "data_path": self.data,
            "stage1_model_path": self.stage1_model,
            "kmeans_model_path": self.kmeans,
            "freeze_backbone": True,
            "tune_speech_generator_only": True,
            "has_tgt_units": True,
            "output_dir": out,
        }
        return arguments(COMMON | given | options)

    def stage(self, number: int, out: Path, **options: Any) -> list[str]:
        return (self.stage1 if number == 1 else self.stage2)(out, **options)


def arguments(options: dict[str, Any]) -> list[str]:
    """{"bf16": False, "run_name": None} -> ["--bf16", "false", "--run_name", "null"]."""
    argv: list[str] = []
    for key, value in options.items():
        text = "null" if value is None else str(value)
        argv += [f"--{key}", text.lower() if isinstance(value, bool) else text]
    return argv


def train(argv: list[str]) -> int:
    """train.py's main in this process."""
    from llama_omni.train import main

    return main(argv)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that no other program is given meanwhile; torch's store may still listen on it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def launch(
    command: list[str],
    *,
    cwd: Path = FOLDER,
    timeout: float = 300,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, with this interpreter's folder first on PATH."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=cwd, env=launch_env(**env or {}), stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher then ends the processes it started
            out, error = process.communicate()
            raise AssertionError(f"ran over {timeout} s: {command}\n{error[-5000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def launch_env(**env: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **env}


def metrics(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the speeds, which differ from run to run."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("speed/")}
        for line in lines
    ]


def losses(out: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(out) if "train/loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a released-format folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_weights(left: Path, right: Path, *, atol: float = 0.0) -> None:
    """Every tensor of two final models; exactly, when `atol` is 0."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        error = (value.double() - theirs[name].double()).abs().max().item()
        assert error <= atol, f"{name}: {error}"


def make_audio(path: Path, *, seconds: float, seed: int) -> None:
    from llama_omni.speech.audio import save_audio

    noise = torch.randn(round(seconds * 16000), generator=torch.Generator().manual_seed(seed))
    tone = torch.sin(torch.arange(len(noise)) * (0.05 * 1.4**seed))  # another pitch a seed
    save_audio(path, 0.2 * tone + 0.02 * noise, sample_rate=16000)


def make_records(folder: Path, *, num_units: int = 3) -> list[dict[str, Any]]:
    """NUM_RECORDS records of the source document's format with tones of 0.3 to 1.7 s as speech."""
    records = []
    for i in range(NUM_RECORDS):
        make_audio(folder / f"q{i}.wav", seconds=0.3 + 0.2 * i, seed=i)
        units = [(7 * i + 3 * j) % NUM_UNITS for j in range(num_units + i % 3)]
        records.append(
            {
                "speech_instruction_path": f"q{i}.wav",
                "text_instruction": f"question {i}",
                "text_response": ANSWERS[i],
                "tgt_units": " ".join(map(str, units)),
            }
        )
    return records


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_kmeans(path: Path, *, num_units: int = NUM_UNITS) -> Path:
    """Writes random centroids over log-mel frames in the format of speech/kmeans.py."""
    from llama_omni.speech.kmeans import KMeans, save_kmeans

    centroids = torch.randn(num_units, 80, generator=torch.Generator().manual_seed(0))
    save_kmeans(path, KMeans("log_mel", centroids, torch.ones(num_units)))
    return path


def make_tiny(root: Path) -> Tiny:
    """Data, models, k-means and a stage-1 model below `root`."""
    from llama_omni.tools import make_model

    data = write_jsonl(root / "data.jsonl", make_records(root))
    make_model.main([str(root)])
    kmeans = make_kmeans(root / "kmeans.safetensors")
    tiny = Tiny(
        root, data, root / "llama", root / "whisper", kmeans, root / "stage1" / "final_model"
    )
    assert train(tiny.stage1(root / "stage1", max_steps=1)) == 0
    return tiny


def copy_data(tiny: Tiny, folder: Path) -> list[dict[str, Any]]:
    """Copies the session's wav files to `folder`, for records that a test is going to change."""
    for path in tiny.root.glob("*.wav"):
        shutil.copy(path, folder)
    return [json.loads(line) for line in tiny.data.read_text().splitlines()]
