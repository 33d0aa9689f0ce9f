"""model/adapter.py: what PEFT and a training wrote, as changes of the base; what is an error."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.vss_longcat_omni.support.tiny import AUDIO, VISION, randomize, tiny_config
from vss_longcat_omni.model.adapter import LoraPair, read_adapter
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.options.lora_targets import LORA_TARGETS

if TYPE_CHECKING:
    from pathlib import Path

LORA_A = "base_model.model.model.layers.0.mlps.1.up_proj.lora_A.weight"
WEIGHT = "model.layers.0.mlps.1.up_proj.weight"


def make_base() -> LongcatOmniForCausalLM:
    model = LongcatOmniForCausalLM(tiny_config(vision_config=VISION, audio_config=AUDIO))
    randomize(model)
    return model.eval()


def write_adapter(folder: Path, **changes: Any) -> PeftModel:
    """A trained adapter on the base, written by PEFT."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": list(LORA_TARGETS)} | changes
    model = get_peft_model(make_base(), LoraConfig(**values))  # pyright: ignore
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if ".lora_" in name:
            param.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(str(folder))
    return model.eval()  # pyright: ignore[reportReturnType]


def edit_weights(path: Path, changed: dict[str, Tensor | None]) -> None:
    """None: without this tensor."""
    state = load_file(path) if path.is_file() else {}
    state |= {key: value for key, value in changed.items() if value is not None}
    save_file({key: value for key, value in state.items() if changed.get(key, value) is not None},
              path)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_adapter(folder)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "adapter")


def test_every_weight_with_an_adapter_is_named_once(adapter: Path) -> None:
    changes = read_adapter(adapter)
    names = {name for name, _ in make_base().named_parameters()}
    assert len(changes) == 2 * 2 * len(LORA_TARGETS)
    assert set(changes) <= names
    pair = changes[WEIGHT]
    assert isinstance(pair, LoraPair)
    assert (pair.shape, pair.scale) == ((48, 32), 2.0)


def test_patterns_count_as_in_peft(tmp_path: Path) -> None:
    """The end of a name, as a regular expression; the first one that fits, of those in the file:
    PEFT sorts them when it writes, so that its own model changes with saving and loading."""
    write_adapter(
        tmp_path,
        rank_pattern={"q_b_proj": 2, r"layers\.0\.mlps\.\d\.up_proj": 6, "up_proj": 3},
        alpha_pattern={"model.layers.1.self_attn.1.o_proj": 3, "q_b_proj": 5, r"\w+_b_proj": 7},
    )
    changes = read_adapter(tmp_path)
    model: Any = PeftModel.from_pretrained(make_base(), tmp_path)
    modules = model.get_base_model().named_modules()
    scales = {f"{n}.weight": m.scaling["default"] for n, m in modules if hasattr(m, "lora_A")}
    found = {name: pair.scale for name, pair in changes.items() if isinstance(pair, LoraPair)}
    assert found == scales
    assert set(found.values()) == {8 / 4, 8 / 6, 8 / 3, 3 / 4, 7 / 2, 7 / 4}


def test_whole_tensors_are_read_beside_the_pairs(adapter: Path) -> None:
    save_file({"speech_heads.x": torch.ones(2)}, adapter / "trained_modules.safetensors")
    changes = read_adapter(adapter)
    assert isinstance(changes["speech_heads.x"], Tensor)
    assert len(changes) == 33


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "LOHA"),
        ("init_lora_weights", "pissa"),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("some_later_kind", {"x": 1}),
    ],
)
def test_more_than_plain_lora_is_an_error(adapter: Path, key: str, value: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key}=.*: plain LoRA alone"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("file", "changed", "message"),
    [
        ("adapter_model", {LORA_A: None}, r"layers\.0.*up_proj has only one of lora_A and"),
        ("adapter_model", {LORA_A: torch.zeros(3, 32)}, r"lora_A \(3, 32\) and .* not of rank 4"),
        ("adapter_model", {LORA_A: torch.zeros(0)}, r"lora_A \(0,\) and .* not of rank 4"),
        ("adapter_model", {LORA_A: torch.full((4, 32), torch.nan)}, "up_proj.* holds NaN or infin"),
        ("adapter_model", {f"{LORA_A}.x": torch.zeros(1)}, "lora_A.weight.x is no LoRA weight"),
        ("trained_modules", {WEIGHT: torch.zeros(2)}, f"{WEIGHT} has an adapter too"),
        ("trained_modules", {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_broken_weights_are_reported(
    adapter: Path, file: str, changed: dict[str, Tensor | None], message: str
) -> None:
    edit_weights(adapter / f"{file}.safetensors", changed)
    with pytest.raises(ValueError, match=rf"adapter.*{message}"):
        read_adapter(adapter)


def test_missing_and_unreadable_files_are_reported(adapter: Path) -> None:
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not readable as safetens"):
        read_adapter(adapter)
    weights.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no such file: .* no whole"):
        read_adapter(adapter)
    config.write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: no r: not the config of a LoRA"):
        read_adapter(adapter)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not readable as JSON"):
        read_adapter(adapter)
    config.unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json: no such file: .*no folder of an"):
        read_adapter(adapter)
