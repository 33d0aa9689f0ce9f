"""Adapters: their number, their names, PEFT's own format on our base and on transformers'."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from tests.vss_longcat_omni.model.test_language_model import relative
from tests.vss_longcat_omni.support.tiny import SIZES, randomize, tiny_config
from vss_longcat_omni.model.config import LongcatOmniConfig
from vss_longcat_omni.model.lora import add_lora, count_trainable
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.options.lora_targets import (
    LORA_TARGETS,
    notice_translation,
    translate_targets,
)

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_lora(model: nn.Module, r: int = 4) -> PeftModel:
    return add_lora(model, r=r, alpha=2 * r, dropout=0.0, targets=LORA_TARGETS)


@pytest.fixture
def base() -> LongcatOmniForCausalLM:
    model = LongcatOmniForCausalLM(tiny_config())
    randomize(model)
    return model


def test_205_6_million_parameters_are_trained_on_the_released_model() -> None:
    with torch.device("meta"):
        model = LongcatOmniForCausalLM(LongcatOmniConfig())
        model = with_lora(model, r=32)
    assert round(count_trainable(model) / 1e6, 1) == 205.6
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert not any("experts" in name or "router" in name for name in trained)
    assert len(trained) == 2 * 28 * 2 * len(LORA_TARGETS)


def test_the_documented_targets_are_translated_with_a_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notice_translation.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the options are read twice
            assert translate_targets(DOCUMENTED) == LORA_TARGETS
    notice = "LongCat-Flash has no q_proj; q_a_proj and q_b_proj are trained instead."
    assert caplog.text.count(notice) == 1
    assert translate_targets(["o_proj"]) == ("o_proj",)


@pytest.mark.parametrize(("targets", "named"), [(["wq", "o_proj"], "wq"), ([], "empty")])
def test_unknown_targets_are_errors(targets: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=f"lora_target_modules: {named}. Choose from q_a_proj"):
        translate_targets(targets)


def test_adapters_change_nothing_at_first(base: LongcatOmniForCausalLM) -> None:
    ids = torch.randint(150, 300, (2, 9))
    before = base(ids).logits
    assert torch.equal(with_lora(base)(ids).logits, before)


def save_trained(base: nn.Module, folder: Path) -> Tensor:
    """A folder with an adapter of random weights, and the logits of base and adapter."""
    model = with_lora(base)
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if ".lora_" in name:
            param.data.normal_(0, 0.1, generator=generator)
    model.save_pretrained(str(folder))
    model.eval()
    return model(make_ids()).logits


def make_ids() -> Tensor:
    return torch.randint(150, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def test_peft_loads_the_adapter_on_our_base(base: LongcatOmniForCausalLM, tmp_path: Path) -> None:
    wanted = save_trained(base, tmp_path)
    fresh = LongcatOmniForCausalLM(tiny_config())
    randomize(fresh)
    plain = fresh(make_ids()).logits
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(make_ids()).logits, wanted)
    assert relative(plain, wanted) > 0.1
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in stored)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_peft_loads_the_adapter_on_transformers_text_model(
    base: LongcatOmniForCausalLM, tmp_path: Path
) -> None:
    """As the README's snippet does: peft would turn gate_proj into the experts' fused tensors."""
    wanted = save_trained(base, tmp_path)
    theirs = LongcatFlashForCausalLM(LongcatFlashConfig(**SIZES))
    state = theirs.state_dict()
    fresh = LongcatOmniForCausalLM(tiny_config())
    randomize(fresh)
    for name, value in fresh.state_dict().items():
        if name in state:
            state[name][: len(value)] = value
    theirs.load_state_dict(state)
    setattr(theirs.config, "model_type", LongcatOmniConfig.model_type)  # noqa: B010
    loaded = PeftModel.from_pretrained(theirs.eval(), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    names = {name for name, _ in loaded.named_parameters() if ".lora_" in name}
    assert {name.replace(".default", "") for name in names} == set(stored)
    assert relative(loaded(input_ids=make_ids()).logits, wanted) < 1e-5
