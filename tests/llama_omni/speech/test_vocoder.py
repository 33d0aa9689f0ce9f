"""Tests the unit HiFi-GAN: names, durations, files, and streaming equal to decoding at once."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from llama_omni.speech.code_hifigan import CodeHiFiGAN
from llama_omni.speech.kmeans import KMeans, save_kmeans
from llama_omni.speech.vocoder import load_vocoder, load_voice

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# The released config, but narrower.
CONFIG: dict[str, Any] = {
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "num_embeddings": 50,
    "embedding_dim": 16,
    "model_in_dim": 16,
    "sampling_rate": 16000,
    "f0": False,
    "multispkr": None,
    "dur_predictor_params": {
        "encoder_embed_dim": 16,
        "var_pred_hidden_dim": 16,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
}
SHALLOW = CONFIG | {
    "upsample_rates": [4, 3],
    "upsample_kernel_sizes": [8, 3],
    "upsample_initial_channel": 8,
    "resblock_kernel_sizes": [5],
    "resblock_dilation_sizes": [[1, 2]],
}


def make_vocoder(config: dict[str, Any] = CONFIG) -> CodeHiFiGAN:
    """Random weights, such that samples are neither zero nor saturated and durations differ."""
    vocoder = CodeHiFiGAN(config).eval()
    with torch.no_grad():
        for name, parameter in vocoder.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(1.5)
        vocoder.dur_predictor.proj.weight.mul_(2)
        vocoder.dur_predictor.proj.bias.fill_(1.2)
    return vocoder


def cut(units: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Chunks of these sizes, over and over."""
    chunks, start = [], 0
    while start < len(units):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(list(units[start : start + size]))
        start += size
    return chunks


@pytest.fixture(scope="module")
def units() -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50, (60,), generator=generator).tolist()


def test_official_names() -> None:
    names = set(CodeHiFiGAN(SHALLOW).state_dict())
    normed = ["conv_pre", "ups.0", "ups.1", "conv_post"]
    normed += [f"resblocks.{i}.convs{j}.{k}" for i in (0, 1) for j in (1, 2) for k in (0, 1)]
    expected = {f"{name}.{part}" for name in normed for part in ("bias", "weight_g", "weight_v")}
    expected |= {"dict.weight"}
    for name in ("conv1.0", "ln1", "conv2.0", "ln2", "proj"):
        expected |= {f"dur_predictor.{name}.weight", f"dur_predictor.{name}.bias"}
    assert names == expected


@pytest.mark.parametrize(("config", "reach"), [(CONFIG, 21), (SHALLOW, None)])
def test_reach_is_what_gradients_show(config: dict[str, Any], reach: int | None) -> None:
    vocoder = make_vocoder(config).double()  # the outermost frames weigh about 1e-25
    middle, length = 30, 61
    x = torch.randn(1, length, config["embedding_dim"], dtype=torch.float64, requires_grad=True)
    waveform = vocoder.synthesize(x)
    assert len(waveform) == length * vocoder.hop
    for sample in (0, vocoder.hop - 1, slice(0, vocoder.hop)):
        frame = waveform[middle * vocoder.hop : (middle + 1) * vocoder.hop]
        (gradient,) = torch.autograd.grad(frame[sample].sum(), x, retain_graph=True)
        touched = gradient[0].abs().sum(1).nonzero().flatten()
        found = max(middle - int(touched.min()), int(touched.max()) - middle)
        assert found <= vocoder.reach
    assert found == vocoder.reach
    assert reach in (None, vocoder.reach)


def test_durations_see_two_units(units: list[int]) -> None:
    vocoder = make_vocoder()
    whole = vocoder.predict_durations(units)
    assert len(set(whole)) > 3
    assert min(whole) >= 1
    for start in range(0, len(units) - 7, 5):
        part = vocoder.predict_durations(units[start : start + 7])
        assert part[2:-2] == whole[start + 2 : start + 5]
    vocoder.dur_predictor.proj.bias.data.fill_(-9)
    assert vocoder.predict_durations(units) == [1] * len(units)


@pytest.mark.parametrize(
    "sizes", [[1], [2], [3], [7], [10], [20], [40], [59], [60], [100], [1, 30, 2], [0, 5, 0, 0, 1]]
)
@pytest.mark.parametrize("config", [CONFIG, SHALLOW])
def test_streamed_equals_whole(units: list[int], sizes: list[int], config: dict[str, Any]) -> None:
    vocoder = make_vocoder(config)
    whole = vocoder(units)
    frames = sum(vocoder.predict_durations(units))
    assert whole.shape == (frames * vocoder.hop,)
    assert 0.01 < float(whole.std()) < 0.9
    chunks = cut(units, sizes)
    pieces = list(vocoder.stream(chunks))
    assert len(pieces) == len(chunks) + 1
    assert (torch.cat(pieces) - whole).abs().max() <= 1e-5
    if len(units) > max(sizes) and frames > vocoder.reach + 4 * max(sizes):
        assert sum(len(piece) > 0 for piece in pieces) > 2  # it did not wait for the end


def test_cutting_without_context_would_differ(units: list[int]) -> None:
    """The official streaming decodes so, and the test above would notice."""
    vocoder = make_vocoder()
    naive = torch.cat([vocoder(chunk) for chunk in cut(units, [20])])
    whole = vocoder(units)
    assert len(naive) != len(whole) or (naive - whole).abs().max() > 0.01


def test_no_units_and_few() -> None:
    vocoder = make_vocoder()
    assert vocoder([]).shape == (0,)
    assert torch.cat(list(vocoder.stream([]))).shape == (0,)
    assert torch.allclose(torch.cat(list(vocoder.stream([[7]]))), vocoder([7]), atol=1e-5)
    with pytest.raises(ValueError, match=r"unit 50 is outside the voice's 0..49"):
        vocoder([50])


def write_vocoder(folder: Path, vocoder: CodeHiFiGAN, kind: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    state = {key: tensor.clone() for key, tensor in vocoder.state_dict().items()}
    if kind == "released":
        path = folder / "g_00500000"
        torch.save({"generator": state}, path)
    elif kind == "safetensors":
        path = folder / "model.safetensors"
        save_file(state, path)
    else:
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            state = {k.replace(old, f"parametrizations.weight.{new}"): v for k, v in state.items()}
        path = folder / "model.pt"
        torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["released", "safetensors", "parametrizations", "fused"])
def test_files(tmp_path: Path, units: list[int], kind: str) -> None:
    vocoder = make_vocoder()
    whole = vocoder(units)
    if kind == "fused":
        vocoder.fuse_weight_norm()
        path = write_vocoder(tmp_path / "v", vocoder, "safetensors")
    else:
        path = write_vocoder(tmp_path / "v", vocoder, kind)
    for given in (path, tmp_path / "v"):
        voice = load_voice(vocoder_path=given, kmeans_path=None)
        assert (voice.sample_rate, voice.num_units) == (16000, 50)
        torch.testing.assert_close(voice(units), whole, rtol=0, atol=1e-5)


def test_clear_messages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a voice needs a vocoder"):
        load_voice(vocoder_path=None, kmeans_path=None)
    with pytest.raises(FileNotFoundError, match="absent: no such vocoder"):
        load_vocoder(tmp_path / "absent")
    path = write_vocoder(tmp_path / "v", make_vocoder(), "released")
    kmeans = tmp_path / "k.safetensors"
    save_kmeans(kmeans, KMeans("mhubert", torch.randn(40, 8)))
    with pytest.raises(ValueError, match=r"speaks 50 units, but .*k.safetensors makes 40"):
        load_voice(vocoder_path=path, kmeans_path=kmeans)
    with pytest.raises(ValueError, match="units of mHuBERT need a vocoder"):
        load_voice(vocoder_path=None, kmeans_path=kmeans)
    config = tmp_path / "v/config.json"
    for change, message in (
        ({"num_embeddings": 51}, "g_00500000: the weights do not fit"),
        ({"multispkr": True}, "config.json: .*multispkr.*not supported"),
        ({"dur_predictor_params": None}, "config.json: .*dur_predictor_params.*missing"),
        ({"upsample_kernel_sizes": [10, 8, 8, 4, 4]}, "config.json: each upsample_kernel_size"),
    ):
        config.write_text(json.dumps(CONFIG | change), "utf-8")
        with pytest.raises(ValueError, match=message):
            load_vocoder(path)
    path.write_bytes(b"torn")
    config.write_text(json.dumps(CONFIG), "utf-8")
    with pytest.raises(ValueError, match="g_00500000: not readable"):
        load_vocoder(path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is to be beside it"):
        load_vocoder(path)


def test_parity_with_fairseq(tmp_path: Path, units: list[int]) -> None:
    """fairseq's own vocoder reads the same file; durations are equal, samples to rounding."""
    pytest.importorskip("fairseq")
    from fairseq.models.text_to_speech.vocoder import CodeHiFiGANVocoder  # pyright: ignore

    path = write_vocoder(tmp_path / "v", make_vocoder(), "released")
    theirs = CodeHiFiGANVocoder(str(path), CONFIG)
    expected = theirs({"code": torch.tensor([units])}, dur_prediction=True)
    ours = load_vocoder(path)(units)
    sys.stdout.write(f"vocoder against fairseq: max |difference| {(ours - expected).abs().max()}\n")
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
