"""What commit c64db93 wrote still loads and resumes: a checkpoint, adapters, prepared samples.

tests/reference/c64db93/vss_longcat_omni/written.tar.xz is a run of six steps, packed:

    data/training/  model/     three short samples; a model in the released layout (many zeros)
    cache/                     its codec, and frames, features and codes as prepare.py leaves them
    out/checkpoint-3           of Trainer, without DeepSpeed
    out/                       the adapter after step 6
    with_heads/                an adapter of another run, and trained_modules.safetensors
    final_trainer_state.json   of checkpoint-6
"""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from vss_longcat_omni import train_ds
from vss_longcat_omni.model.adapter import LoraPair, apply_change, read_adapter
from vss_longcat_omni.model.loading import CheckpointReader, load_config, load_weights
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.tools.merge_lora import main as merge_main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "tests" / "reference" / "c64db93" / "vss_longcat_omni"
OPTIONS: dict[str, Any] = {
    "model_name_or_path": "model", "data_dir": "data", "cache_dir": "cache", "max_tokens": 60,
    "gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
    "lora_r": 2, "lora_alpha": 4, "learning_rate": 0.003, "adam_epsilon": 1e-5,
    "dataloader_num_workers": 0, "use_cpu": True, "report_to": "none", "deepspeed": "",
    "bf16": False, "warmup_steps": 0,
}  # fmt: skip
RESUMED_STEPS = [4, 5, 6]


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder unpacked; the run was made in it, by relative paths."""
    with tarfile.open(OLDER / "written.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard_logs"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(out: str, **options: object) -> None:
    values = OPTIONS | {"output_dir": out} | options
    train_ds.main([arg for name, value in values.items() for arg in (f"--{name}", str(value))])


def losses(path: Path) -> dict[int, float]:
    history = json.loads(path.read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def prepared() -> dict[str, int]:
    """Files of the cache and when each was written; all have the archive's time."""
    found = [*Path("cache").rglob("*.safetensors"), Path("cache/codec/codec.json")]
    return {str(path): path.stat().st_mtime_ns for path in found}


def load_model(folder: str) -> LongcatOmniForCausalLM:
    model = LongcatOmniForCausalLM(load_config(Path(folder)))
    load_weights(model, CheckpointReader(Path(folder)), show_progress=False)
    return model


@pytest.mark.usefixtures("older")
def test_prepared_samples_are_taken_as_they_are() -> None:
    before = prepared()
    assert len(before) == 2 * 3 + 2
    train("unused", prepare_only=True)
    assert prepared() == before


@pytest.mark.usefixtures("older")
def test_a_checkpoint_resumes_as_the_run_went_on() -> None:
    before = prepared()
    shutil.copytree("out/checkpoint-3", "again/checkpoint-3")
    train("again", resume_from_checkpoint="latest")
    assert prepared() == before
    found = losses(Path("again/checkpoint-6/trainer_state.json"))
    wanted = losses(Path("final_trainer_state.json"))
    assert list(found) == [1, 2, 3, *RESUMED_STEPS]
    assert found == pytest.approx(wanted, rel=1e-4)
    ours, theirs = (load_file(f"{out}/adapter_model.safetensors") for out in ("again", "out"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.usefixtures("older")
def test_an_adapter_loads_and_merges() -> None:
    changes = read_adapter(Path("with_heads"))
    pairs = [change for change in changes.values() if isinstance(change, LoraPair)]
    assert 0 < len(pairs) < len(changes)
    assert all(pair.scale == 2.0 and pair.b.any() for pair in pairs)
    base = dict(load_model("model").named_parameters())
    merge_main(["--base", "model", "--adapter", "with_heads", "--out", "merged"])
    merged = dict(load_model("merged").named_parameters())
    for name, value in merged.items():
        wanted = base[name].detach()
        wanted = apply_change(wanted, changes[name]) if name in changes else wanted
        assert torch.equal(value.detach(), wanted), name
    assert changes.keys() <= merged.keys()


@pytest.mark.usefixtures("older")
def test_peft_loads_an_adapter() -> None:
    model: Any = PeftModel.from_pretrained(load_model("model"), "out")
    stored = load_file("out/adapter_model.safetensors")
    loaded = {name.replace(".default.", "."): value for name, value in model.named_parameters()}
    assert stored
    for name, value in stored.items():
        assert torch.equal(loaded[name].detach(), value), name
