"""mHuBERT features: fairseq checkpoints are read as data, and give what transformers gives."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from llama_omni.speech import hubert
from llama_omni.speech.hubert import load_hubert

if TYPE_CHECKING:
    from pathlib import Path

CONV_LAYERS = "[(16,10,5)] + [(16,3,2)] * 2 + [(16,2,2)]"
MODEL_SETTINGS = {
    "_name": "hubert",
    "label_rate": "${task.label_rate}",
    "encoder_layers": 4,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "activation_fn": "gelu",
    "extractor_mode": "default",
    "layer_norm_first": False,
    "conv_feature_layers": CONV_LAYERS,
    "conv_pos": 8,
    "conv_pos_groups": 4,
}


def make_hubert(*, num_layers: int = 4, is_large: bool = False) -> Any:
    """A tiny random HubertModel, of the base or (norm first, normalized input) the large kind."""
    from transformers import HubertConfig, HubertModel

    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=[16] * 4,
        conv_kernel=[10, 3, 3, 2],
        conv_stride=[5, 2, 2, 2],
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer" if is_large else "group",
        do_stable_layer_norm=is_large,
        conv_bias=is_large,
    )
    model = HubertModel(config).eval()
    with torch.no_grad():  # norms and biases begin as ones and zeros, which would hide a mix-up
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "pos_conv" not in name:
                parameter.mul_(3)
    return model


def to_fairseq_names(model: Any) -> dict[str, torch.Tensor]:
    """Written out by hand, so as not to repeat the map under test."""
    state = {}
    is_large = model.config.feat_extract_norm == "layer"
    for key, tensor in model.state_dict().items():
        name = key.replace("feature_projection.layer_norm", "layer_norm")
        name = name.replace("feature_projection.projection", "post_extract_proj")
        name = name.replace("masked_spec_embed", "mask_emb")
        name = name.replace(
            "pos_conv_embed.conv.parametrizations.weight.original0", "pos_conv.0.weight_g"
        )
        name = name.replace(
            "pos_conv_embed.conv.parametrizations.weight.original1", "pos_conv.0.weight_v"
        )
        name = name.replace("pos_conv_embed.conv.bias", "pos_conv.0.bias")
        if name.startswith("feature_extractor"):
            name = name.replace(".conv.", ".0.")
            name = name.replace(".layer_norm.", ".2.1." if is_large else ".2.")
        if name.startswith("encoder.layers"):
            name = name.replace(".layer_norm.", ".self_attn_layer_norm.")
            name = name.replace("attention.", "self_attn.")
            name = name.replace("feed_forward.intermediate_dense", "fc1")
            name = name.replace("feed_forward.output_dense", "fc2")
        state[name] = tensor.clone()
    state["final_proj.weight"] = torch.randn(8, 32)
    state["final_proj.bias"] = torch.randn(8)
    state["label_embs_concat"] = torch.randn(504, 8)
    return state


class _NotToBeLoaded:
    """Base of fairseq's and omegaconf's classes here: whoever makes one while reading fails."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("a class that the file names was used")


@pytest.fixture
def foreign_classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Classes that pickle under the names of fairseq's and omegaconf's."""
    classes = {}
    for module_name, class_name in (
        ("fairseq.data.dictionary", "Dictionary"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("omegaconf.nodes", "AnyNode"),
    ):
        for name in (module_name.partition(".")[0], module_name):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        classes[class_name] = type(class_name, (_NotToBeLoaded,), {"__module__": module_name})
        setattr(sys.modules[module_name], class_name, classes[class_name])
    return classes


def make_checkpoint(
    model: Any, classes: dict[str, type], *, normalize: bool, layout: str
) -> dict[str, Any]:
    dictionary = classes["Dictionary"]()
    dictionary.__dict__.update(symbols=["<s>", "a"], indices={"<s>": 0}, count=[1, 2])
    settings = MODEL_SETTINGS | {
        "layer_norm_first": normalize,
        "extractor_mode": "layer_norm" if normalize else "default",
    }
    cfg: Any = {"_name": None, "model": settings, "task": {"normalize": normalize}}
    args = None
    if layout == "omegaconf":

        def wrap(value: Any) -> Any:
            node = classes["DictConfig" if isinstance(value, dict) else "AnyNode"]()
            if isinstance(value, dict):
                node.__dict__.update(_parent=None, _content={k: wrap(v) for k, v in value.items()})
            else:
                node.__dict__.update(_parent=None, _val=value)
            return node

        cfg = wrap(cfg)
    elif layout == "args":
        cfg, args = None, argparse.Namespace(arch="hubert", normalize=normalize, **settings)
    return {
        "args": args,
        "cfg": cfg,
        "model": OrderedDict(to_fairseq_names(model)),
        "criterion": None,
        "optimizer_history": [{"num_updates": 400_000}],
        "task_state": {"dictionaries": [dictionary]},
        "extra_state": {"best": 1.5, "seen": {1, 2}},
        "last_optimizer_state": None,
    }


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("layout", ["dict", "omegaconf", "args"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_fairseq_checkpoint_equals_transformers(
    tmp_path: Path,
    foreign_classes: dict[str, type],
    is_large: bool,
    layout: str,
    is_zip: bool,
) -> None:
    model = make_hubert(is_large=is_large)
    path = tmp_path / "hubert.pt"
    checkpoint = make_checkpoint(model, foreign_classes, normalize=is_large, layout=layout)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_zip)
    waveform = torch.randn(1600)
    features = load_hubert(path, layer=3)
    source = waveform
    if is_large:
        source = torch.nn.functional.layer_norm(waveform, waveform.shape)
    with torch.no_grad():
        expected = model(source[None], output_hidden_states=True).hidden_states[3][0]
    assert features.normalize is is_large
    assert features.dim == 32
    torch.testing.assert_close(features(waveform), expected, rtol=1e-5, atol=1e-5)
    assert len(features.model.encoder.layers) == 3  # pyright: ignore


def test_hugging_face_folders_equal_fairseq(
    tmp_path: Path, foreign_classes: dict[str, type]
) -> None:
    """safetensors, and the older .bin with weight_g; all are the same encoder to a unit cache."""
    model = make_hubert()
    model.save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    settings = json.loads((tmp_path / "new/config.json").read_text("utf-8"))
    (old / "config.json").write_text(json.dumps(settings), "utf-8")
    (old / "preprocessor_config.json").write_text('{"do_normalize": false}', "utf-8")
    state = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for key, tensor in model.state_dict().items()
    }
    torch.save(state, old / "pytorch_model.bin")
    fairseq = tmp_path / "hubert.pt"
    torch.save(make_checkpoint(model, foreign_classes, normalize=False, layout="dict"), fairseq)
    waveform = torch.randn(1234)
    every = [load_hubert(path, layer=2) for path in (tmp_path / "new", old, fairseq)]
    for features in every:
        assert torch.equal(features(waveform), every[0](waveform))
    assert len({features.identity for features in every}) == 1
    assert load_hubert(fairseq, layer=3).identity != every[0].identity


def test_default_layer_is_the_eleventh(tmp_path: Path) -> None:
    model = make_hubert(num_layers=12)
    model.save_pretrained(tmp_path / "twelve")
    waveform = torch.randn(1, 700)
    with torch.no_grad():
        expected = model(waveform, output_hidden_states=True).hidden_states
    features = load_hubert(tmp_path / "twelve")(waveform[0])
    torch.testing.assert_close(features, expected[11][0])
    assert not torch.allclose(features, expected[10][0], atol=0.01)
    make_hubert().save_pretrained(tmp_path / "four")
    with pytest.raises(ValueError, match="has 4 layers, layer 11 is asked"):
        load_hubert(tmp_path / "four")


def test_long_clips_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hubert().save_pretrained(tmp_path / "h")
    features = load_hubert(tmp_path / "h", layer=2)
    monkeypatch.setattr(hubert, "MAX_CHUNK", 1000)
    waveform = torch.randn(2020)  # the last 20 samples make no frame
    parts = torch.cat([features(waveform[:1000]), features(waveform[1000:2000])])
    assert torch.equal(features(waveform), parts)
    # 10, 3, 3, 2 wide convolutions with strides 5, 2, 2, 2: the first frame sees 60 samples
    assert len(features(torch.randn(60))) == 1
    with pytest.raises(ValueError, match="59 samples, fewer than the 60 of a frame"):
        features(torch.randn(59))


def test_clear_messages(tmp_path: Path, foreign_classes: dict[str, type]) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such mHuBERT"):
        load_hubert(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: a HuBERT folder holds config.json"):
        load_hubert(tmp_path / "empty")
    torn = tmp_path / "torn.pt"
    torn.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"torn.pt: not readable as a checkpoint"):
        load_hubert(torn)
    torch.save({"model": {"a": torch.ones(1)}}, torn)
    with pytest.raises(ValueError, match=r"torn.pt: no HuBERT of fairseq's"):
        load_hubert(torn)
    checkpoint = make_checkpoint(make_hubert(), foreign_classes, normalize=False, layout="dict")
    del checkpoint["model"]["encoder.layers.0.fc2.weight"]
    torch.save(checkpoint, torn)
    with pytest.raises(ValueError, match=r"torn.pt: .*encoder.layers.0.feed_forward.output_dense"):
        load_hubert(torn, layer=2)
    named = tmp_path / hubert.MHUBERT_FILE
    torch.save(checkpoint, named)
    with pytest.raises(ValueError, match="but the released file of that name has 23527cd6"):
        load_hubert(named)


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}', "utf-8")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model_type='wav2vec2'"):
        load_hubert(tmp_path)


def test_fairseq_backend_says_what_is_missing(
    tmp_path: Path, foreign_classes: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hubert.pt"
    torch.save(
        make_checkpoint(make_hubert(), foreign_classes, normalize=False, layout="dict"), path
    )
    monkeypatch.setitem(sys.modules, "fairseq.models.hubert", None)
    with pytest.raises(ValueError, match="unit_backend=fairseq needs fairseq"):
        load_hubert(path, layer=2, unit_backend="fairseq")


def test_parity_with_fairseq(tmp_path: Path) -> None:
    """fairseq's own network and its own file: 30 s through layers of the base kind, every frame."""
    pytest.importorskip("fairseq")
    from fairseq.models.hubert import HubertConfig, HubertModel  # pyright: ignore
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig  # pyright: ignore

    settings = MODEL_SETTINGS | {
        "encoder_layers": 12,
        "encoder_embed_dim": 192,
        "encoder_ffn_embed_dim": 384,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "conv_feature_layers": "[(64,10,5)] + [(64,3,2)] * 4 + [(64,2,2)] * 2",
        "label_rate": 50.0,
    }
    task = HubertPretrainingConfig(label_rate=50.0)
    known = {k: v for k, v in settings.items() if k != "_name"}
    model = HubertModel(HubertConfig(**known), task, [list(range(504))]).eval()
    with torch.no_grad():  # else all frames come out nearly alike
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "pos_conv" not in name:
                parameter.mul_(3)
    path = tmp_path / "hubert.pt"
    cfg = {
        "_name": None,
        "model": settings,
        "task": {"_name": "hubert_pretraining", "normalize": False},
    }
    torch.save({"args": None, "cfg": cfg, "model": model.state_dict()}, path)
    seconds = torch.arange(480_001) / 16_000
    waveform = torch.sin(300 * seconds**2) * torch.sin(seconds) + 0.01 * torch.randn(480_001)
    with torch.no_grad():
        expected = model.extract_features(waveform[None], mask=False, output_layer=11)[0][0]
    ours = load_hubert(path)(waveform)
    theirs = load_hubert(path, unit_backend="fairseq")(waveform)
    assert torch.equal(theirs, expected)
    assert expected.std(0).mean() > 0.1
    sys.stdout.write(f"HuBERT against fairseq: max |difference| {(ours - expected).abs().max()}\n")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
