"""What commit c64db93 wrote still loads and resumes: caches as phase 1 leaves them, checkpoints.

tests/reference/c64db93/longcat_video_fft/written.tar.xz is a run of six steps, packed:

    training_config.json  databackend.json  videos/
    model/                      VAE, text encoder and tokenizer (most weights are zeros); dit/ has
                                its config alone, since training starts from random weights
    cache/vae  cache/text       latents and embeddings, with manifests and tables
    out/checkpoint-3  metrics.jsonl        adamw with averages; final.safetensors after step 6
    out_8bit/checkpoint-3  metrics.jsonl   adamw_8bit in bf16, without averages
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from longcat_video_fft.train import main as train
from tests.longcat_video_fft.support.tiny import precompute

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "tests" / "reference" / "c64db93" / "longcat_video_fft"
CONFIG = "training_config.json"
EIGHT_BIT = ("--optimizer", "adamw_8bit", "--mixed_precision", "bf16", "--ema_decay", "null")
RESUMED_STEPS = [4, 5, 6]


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Unpacks the folder; its configs name paths from there."""
    with tarfile.open(OLDER / "written.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def logged(out: Path, name: str) -> dict[int, float]:
    """Returns a number of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def stored(folder: Path) -> dict[str, bytes]:
    """Returns what phase 1 makes by work: tensors, their index and the identities."""
    endings = (".shard", ".index", ".json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in endings
    }


def assert_resumes(older: Path, name: str, *, rel: float) -> None:
    """Checks the steps after the checkpoint, and the evaluation of the last."""
    for number, steps in (("train/loss", RESUMED_STEPS), ("eval/loss", RESUMED_STEPS[-1:])):
        wanted, found = (logged(older / out, number) for out in (name, f"{name}_again"))
        assert list(found) == steps
        assert found == pytest.approx({step: wanted[step] for step in steps}, rel=rel)


def test_caches_are_complete(older: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = stored(older / "cache")
    assert len(before) == 6
    with caplog.at_level("INFO"):
        assert precompute(older / CONFIG) == 0
        assert "to make: 0 of 5 videos, 0 of 6 captions" in caplog.text
        assert precompute(older / CONFIG, "--verify") == 0
    assert "0 corrupt" in caplog.text
    assert stored(older / "cache") == before


def test_a_checkpoint_resumes_as_the_run_went_on(
    older: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = stored(older / "cache")
    checkpoint = older / "out" / "checkpoint-3"
    argv = ["--resume_from_checkpoint", str(checkpoint), "--output_dir", "out_again"]
    with caplog.at_level("INFO"):
        assert train(["--config", CONFIG, *argv]) == 0
    assert f"resumed from {checkpoint}" in caplog.text
    assert "they are made first" not in caplog.text
    assert stored(older / "cache") == before
    assert_resumes(older, "out", rel=1e-4)
    dcp_to_torch_save(older / "out_again" / "checkpoint-6" / "state", older / "merged.pt")
    model = torch.load(older / "merged.pt", weights_only=True)["model"]
    wanted = load_file(older / "final.safetensors")
    assert {f"model/{name}" for name in model} == wanted.keys()
    for name, value in model.items():
        theirs = wanted[f"model/{name}"]
        torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_8bit_moments_resume(older: Path) -> None:
    checkpoint = older / "out_8bit" / "checkpoint-3"
    argv = ["--resume_from_checkpoint", str(checkpoint), "--output_dir", "out_8bit_again"]
    assert train(["--config", CONFIG, *EIGHT_BIT, *argv]) == 0
    assert_resumes(older, "out_8bit", rel=0.01)  # bf16: processors round differently
