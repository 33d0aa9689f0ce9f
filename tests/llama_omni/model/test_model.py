"""Tests the whole model: parity of the encoder, padding, losses, trainable sets, names, files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder as OfficialEncoder

from llama_omni import stage1_trainer, stage2_trainer
from llama_omni.data_utils import SpeechInstructionDataset, collate
from llama_omni.dataset.prompt import pad_token_id
from llama_omni.dataset.records import read_records
from llama_omni.model.loading import load_weights, save_released
from llama_omni.model.speech_encoder import WhisperEncoder, num_encoder_states, rename_hf_key
from llama_omni.options.config import load_config
from tests.llama_omni.support.tiny import NUM_UNITS, Tiny, weights

if TYPE_CHECKING:
    from llama_omni.dataset.batch import Batch

ENCODER_NAMES = {
    "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "positional_embedding",
    "ln_post.weight", "ln_post.bias",
    *(
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in (
            "attn.query.weight", "attn.query.bias", "attn.key.weight", "attn.value.weight",
            "attn.value.bias", "attn.out.weight", "attn.out.bias", "attn_ln.weight",
            "attn_ln.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
            "mlp_ln.weight", "mlp_ln.bias",
        )
    ),
}  # fmt: skip
LLAMA_LAYER = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
)  # fmt: skip
LLAMA_NAMES = {
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"model.layers.{i}.{name}" for i in range(2) for name in LLAMA_LAYER),
}  # fmt: skip
ADAPTER = {f"linear{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
PROJECTOR_NAMES = {f"model.speech_projector.{name}" for name in ADAPTER}
SPEECH_NAMES = {f"model.speech_encoder.{name}" for name in ENCODER_NAMES}
GENERATOR_NAMES = {
    *(f"speech_generator.{x}_proj.{kind}" for x in ("input", "output")
      for kind in ("weight", "bias")),
    *(f"speech_generator.layers.0.{name}" for name in LLAMA_LAYER),
}  # fmt: skip
# Of the released config.json (ICTNLP/Llama-3.1-8B-Omni); those of transformers are its own.
RELEASED_KEYS = {
    "architectures", "model_type", "ctc_decoder_config", "ctc_loss_weight", "ctc_upsample_factor",
    "speech_encoder", "speech_encoder_ds_rate", "speech_encoder_hidden_size",
    "speech_encoder_type", "speech_generator_type", "speech_normalize", "speech_projector_type",
    "tokenizer_model_max_length", "tokenizer_padding_side", "unit_vocab_size",
}  # fmt: skip


def build(argv: list[str]) -> Any:
    """Builds the model of a run in float32 on the CPU, weights loaded."""
    config = load_config(argv)
    stage: Any = stage1_trainer if config.stage == 1 else stage2_trainer
    model, readers = stage.build_model(config, *stage.find_sources(config))
    stage.set_trainable(model, config)
    model.to_empty(device="cpu")
    model.reset_rotary(torch.device("cpu"))
    load_weights(model, readers, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def stage1(tiny: Tiny) -> Any:
    return build(tiny.stage1(Path("unused")))


@pytest.fixture(scope="module")
def stage2(tiny: Tiny) -> Any:
    return build(tiny.stage2(Path("unused")))


@pytest.fixture(scope="module")
def batches(tiny: Tiny) -> list[Batch]:
    """Records 0, 3 and 7 together, then each alone; their clips differ in length."""
    records, bad = read_records(tiny.data, needs_units=True, unit_vocab_size=NUM_UNITS)
    assert not bad
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    features = WhisperFeatureExtractor.from_pretrained(tiny.whisper)
    dataset = SpeechInstructionDataset(
        records, tokenizer, feature_extractor=features, labeled="last", units={}
    )
    samples = [dataset[i] for i in (0, 3, 7)]
    pad = pad_token_id(tokenizer)
    return [collate(group, pad_token_id=pad) for group in (samples, *([s] for s in samples))]


def trained(model: Any) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


# Encoder


def load_encoders(tiny: Tiny) -> tuple[Any, Any]:
    stored = load_file(tiny.whisper / "model.safetensors")
    official = OfficialEncoder(WhisperConfig.from_pretrained(tiny.whisper))
    official.load_state_dict(
        {key.removeprefix("model.encoder."): value for key, value in stored.items()}
    )
    ours = WhisperEncoder(mel_size=80, width=128, num_layers=2)
    renamed = {str(rename_hf_key(key)): value for key, value in stored.items()}
    assert set(renamed) == ENCODER_NAMES
    ours.load_state_dict(renamed)
    return ours.eval(), official.eval()


@torch.no_grad()
def test_encoder_equals_transformers_at_30_s(tiny: Tiny) -> None:
    ours, official = load_encoders(tiny)
    mel = torch.randn(2, 80, 3000)
    found = ours(mel, torch.tensor([3000, 3000]))
    expected = official(mel).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_encoder_gives_a_clip_the_same_states_in_any_batch(tiny: Tiny) -> None:
    ours, _ = load_encoders(tiny)
    lengths = torch.tensor([31, 100, 64])
    mel = torch.randn(3, 80, 100) * (torch.arange(100) < lengths[:, None])[:, None]
    together = ours(mel, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = ours(mel[i : i + 1, :, :length], lengths[i : i + 1])[0]
        assert len(alone) == int(num_encoder_states(lengths[i]))
        torch.testing.assert_close(together[i, : len(alone)], alone, rtol=1e-4, atol=1e-5)


# Losses


@torch.no_grad()
def test_a_batch_loses_what_its_samples_lose_alone(
    stage1: Any, stage2: Any, batches: list[Batch]
) -> None:
    for model, task in ((stage1, "text"), (stage2, "units")):
        whole, *parts = (model(batch, task) for batch in batches)
        assert whole.loss.item() > 1
        assert whole.loss.item() == pytest.approx(sum(p.loss.item() for p in parts), rel=1e-5)
        for name in ("num_correct", "num_predicted"):
            total = sum(int(getattr(part, name)) for part in parts)
            assert int(getattr(whole, name)) == total


def test_text_loss_by_hand(stage1: Any) -> None:
    """Each label is predicted from the position before it; a label at position 0 from nothing."""
    hidden = torch.randn(2, 4, 128)
    labels = torch.tensor([[-100, -100, 5, 7], [-100, 9, -100, -100]])
    found = stage1.text_loss(hidden, labels)
    weight = stage1.lm_head.weight.detach().double()
    expected = 0.0
    for row, position in ((0, 2), (0, 3), (1, 1)):
        logits = weight @ hidden[row, position - 1].double()
        target = int(labels[row, position])
        expected += float(logits.exp().sum().log() - logits[target])
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert int(found.num_predicted) == 3


def test_speech_reaches_the_loss_and_the_projector(stage1: Any, batches: list[Batch]) -> None:
    batch = batches[0]
    stage1.zero_grad()
    loss = stage1(batch, "text").loss
    loss.backward()
    assert stage1.model.speech_projector.linear1.weight.grad.abs().sum() > 0
    assert stage1.model.speech_encoder.conv1.weight.grad is None
    changed = replace(batch, speech=batch.speech.flip(-1))
    assert stage1(changed, "text").loss.item() != loss.item()
    stage1.zero_grad()


def test_stage2_sends_no_gradient_to_the_language_model(stage2: Any, batches: list[Batch]) -> None:
    stage2(batches[0], "units").loss.backward()
    with_grad = {name for name, param in stage2.named_parameters() if param.grad is not None}
    assert with_grad == GENERATOR_NAMES
    stage2.zero_grad()


# Trainable sets


def test_stage1_trains_projector_and_language_model(stage1: Any) -> None:
    assert trained(stage1) == LLAMA_NAMES | PROJECTOR_NAMES
    assert {name for name, _ in stage1.named_parameters()} == (
        LLAMA_NAMES | PROJECTOR_NAMES | SPEECH_NAMES
    )


def test_stage2_trains_the_generator_alone(tiny: Tiny, stage2: Any) -> None:
    config = load_config(tiny.stage2(Path("unused")))
    assert trained(stage2) == GENERATOR_NAMES
    (group,) = stage2_trainer.parameter_groups(stage2, config)
    assert len(group["params"]) == len(GENERATOR_NAMES)
    stage2.lm_head.weight.requires_grad_(True)
    with pytest.raises(AssertionError):
        stage2_trainer.parameter_groups(stage2, config)
    stage2.lm_head.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"freeze_backbone": True}, PROJECTOR_NAMES),
        ({"tune_speech_projector": True}, PROJECTOR_NAMES),
        ({"tune_speech_encoder": True}, LLAMA_NAMES | PROJECTOR_NAMES | SPEECH_NAMES),
        ({"freeze_backbone": True, "tune_speech_encoder": True}, PROJECTOR_NAMES | SPEECH_NAMES),
    ],
)
def test_stage1_options_choose_what_is_trained(
    tiny: Tiny, options: dict[str, bool], expected: set[str]
) -> None:
    assert trained(build(tiny.stage1(Path("unused"), **options))) == expected


def test_each_part_has_its_own_learning_rate(tiny: Tiny) -> None:
    options = {"learning_rate": 1e-5, "speech_projector_lr": 1e-3, "speech_encoder_lr": 1e-4}
    argv = tiny.stage1(Path("unused"), tune_speech_encoder=True, **options)
    groups = stage1_trainer.parameter_groups(build(argv), load_config(argv))
    found = {group["lr"]: len(group["params"]) for group in groups}
    assert found == {
        1e-3: len(PROJECTOR_NAMES), 1e-4: len(SPEECH_NAMES), 1e-5: len(LLAMA_NAMES),
    }  # fmt: skip


# LoRA


@torch.no_grad()
def test_lora_begins_as_the_identity_and_is_merged(
    tiny: Tiny, stage1: Any, batches: list[Batch], tmp_path: Path
) -> None:
    lora = build(tiny.stage1(Path("unused"), lora_enable=True, lora_r=4))
    adapters = {name for name in trained(lora) if "lora_" in name}
    assert trained(lora) == adapters | PROJECTOR_NAMES
    assert len(adapters) == 2 * 2 * 7  # A and B of seven linears in two layers
    expected = stage1(batches[0], "text").loss.item()
    assert lora(batches[0], "text").loss.item() == pytest.approx(expected, rel=1e-6)
    for name, param in lora.named_parameters():
        if "lora_B" in name:
            param.normal_()
    changed = lora(batches[0], "text").loss.item()
    assert changed != pytest.approx(expected, rel=1e-3)
    save_released(lora, tmp_path / "merged", dtype=torch.float32, is_main=True)
    assert set(weights(tmp_path / "merged")) == LLAMA_NAMES | PROJECTOR_NAMES | SPEECH_NAMES
    shutil.copy(tiny.llama / "tokenizer.json", tmp_path / "merged")
    merged = build(tiny.stage1(Path("unused"), model_name_or_path=tmp_path / "merged"))
    assert merged(batches[0], "text").loss.item() == pytest.approx(changed, rel=1e-4)


# Files


def test_released_format_round_trip(tiny: Tiny, stage2: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_released(stage2, folder, dtype=torch.float32, is_main=True)
    stored = weights(folder)
    assert set(stored) == LLAMA_NAMES | PROJECTOR_NAMES | SPEECH_NAMES | GENERATOR_NAMES
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored)
    config = json.loads((folder / "config.json").read_text())
    assert set(config) >= RELEASED_KEYS
    assert config["model_type"] == "omni_speech2s_llama"
    assert config["architectures"] == ["OmniSpeech2SLlamaForCausalLM"]
    assert config["unit_vocab_size"] == NUM_UNITS
    again = build(tiny.stage2(Path("unused"), stage1_model_path=folder))
    for (name, left), right in zip(stage2.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_stage1_result_is_bf16_where_training_is(tiny: Tiny, stage1: Any, tmp_path: Path) -> None:
    save_released(stage1, tmp_path / "model", dtype=torch.bfloat16, is_main=True)
    assert {value.dtype for value in weights(tmp_path / "model").values()} == {torch.bfloat16}
    assert "bfloat16" in (tmp_path / "model" / "config.json").read_text()


def change_llama(tiny: Tiny, folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """A copy of the tiny Llama with other config values; returns its tensors to change."""
    shutil.copytree(tiny.llama, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    return weights(folder)


def test_tied_embeddings_are_untied(tiny: Tiny, tmp_path: Path) -> None:
    tensors = change_llama(tiny, tmp_path / "tied", tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    model = build(tiny.stage1(Path("unused"), model_name_or_path=tmp_path / "tied"))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert trained(model) == LLAMA_NAMES | PROJECTOR_NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 weights are missing, first model\.norm\.weight"),
        ("shape", r"model\.norm\.weight has shape \(64,\)"),
        ("nan", r"model\.norm\.weight: the checkpoint holds NaN"),
    ],
)
def test_bad_checkpoints(tiny: Tiny, tmp_path: Path, change: str, message: str) -> None:
    tensors = change_llama(tiny, tmp_path / "bad")
    norm = tensors.pop("model.norm.weight")
    if change == "shape":
        tensors["model.norm.weight"] = norm[:64].contiguous()
    elif change == "nan":
        tensors["model.norm.weight"] = norm * float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        build(tiny.stage1(Path("unused"), model_name_or_path=tmp_path / "bad"))


def test_a_generator_of_another_shape(tiny: Tiny, stage2: Any, tmp_path: Path) -> None:
    save_released(stage2, tmp_path / "model", dtype=torch.float32, is_main=True)
    argv = tiny.stage2(
        Path("unused"), stage1_model_path=tmp_path / "model", ctc_decoder_config="(1,32,4,128)"
    )
    with pytest.raises(ValueError, match=r"speech_generator.*ctc_decoder_config"):
        build(argv)
