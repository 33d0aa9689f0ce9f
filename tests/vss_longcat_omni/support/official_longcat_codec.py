"""Official modules of LongCat-Audio-Codec with random weights, for `compare_longcat_codec.py`.

Imported from a clone of meituan-longcat/LongCat-Audio-Codec that is on sys.path; nothing of it is
in this repository.
"""

from __future__ import annotations

import contextlib
import io
import json
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

    from vss_longcat_omni.speech.longcat_codec.config import DecoderConfig, EncoderConfig

SEMANTIC_TYPE = "LongCatAudioCodec_semantic_tokenizer"


def build_official_encoder(folder: Path, scratch: Path, config: EncoderConfig | None) -> Any:
    """At the sizes of its own YAML files, or at those of `config`.

    Its statistics of the features, random as well, stay as `cmvn.npy` in `scratch`.
    """
    from networks.semantic_codec import LongCatAudioCodec_model  # pyright: ignore
    from semantic_tokenizer_general import encoder as semantic_encoder  # pyright: ignore

    sizes = read_yaml(folder / "configs" / "LongCatAudioCodec_encoder.yaml")["codec_config"]
    tokenizer = read_yaml(
        folder / "semantic_tokenizer_general" / "configs" / f"{SEMANTIC_TYPE}.yaml"
    )
    tokenizer = tokenizer["semantic_tokenizer_config"]
    model = read_yaml(folder / tokenizer["model_config"])
    if config:
        change_sizes(config, sizes, tokenizer, model)
    stats = random_stats(model["feature"]["fbank"]["num_mel_bins"])
    np.save(scratch / "cmvn.npy", stats)
    model["feature"]["cmvn_file"] = str(scratch / "cmvn.npy")
    tokenizer["model_config"] = str(scratch / "model.yaml")
    (scratch / "model.yaml").write_text(json.dumps(model))  # which is YAML too
    chosen = patch.object(semantic_encoder, "select_config", return_value=tokenizer)
    with chosen, contextlib.redirect_stdout(io.StringIO()):
        official = LongCatAudioCodec_model.LongCatAudioCodecEncoder(
            encoder_dim=sizes["encoder_dim"],
            encoder_rates=sizes["codec_enc_ratios"],
            latent_dim=sizes["codec_dimension"],
            n_codebooks=sizes["codec_codebooks"],
            codebook_size=sizes["codec_codebook_size"],
            codebook_dim=sizes["codec_codebook_search_dim"],
            input_sample_rate=sizes["input_sample_rate"],
            semantic_tokenizer_type=sizes["semantic_tokenizer_type"],
        )
    return randomize(official, gain=1.4)


def change_sizes(
    config: EncoderConfig, sizes: dict[str, Any], tokenizer: dict[str, Any], model: dict[str, Any]
) -> None:
    """Puts ours in the three official dictionaries."""
    quantizer, semantic = config.quantizer, config.semantic
    sizes.update(
        encoder_dim=config.width,
        codec_enc_ratios=list(config.rates),
        codec_dimension=quantizer.dim,
        codec_codebooks=quantizer.num_codebooks,
        codec_codebook_size=quantizer.codebook_size,
        codec_codebook_search_dim=quantizer.codebook_dim,
    )
    tokenizer.update(
        select_layer=semantic.num_encoder_layers,
        codebook_dim=semantic.d_model,
        codebook_size=semantic.codebook_size,
    )
    model["feature"]["fbank"]["num_mel_bins"] = semantic.num_mel_bins
    names = ("d_model", "nhead", "num_encoder_layers", "dim_feedforward")
    changed = {name: getattr(semantic, name) for name in names}
    model["encoder"]["VGGtf_encoder"].update(changed, feat_dim=semantic.num_mel_bins)


def build_official_decoder(config: DecoderConfig, settings: Path | None = None) -> Any:
    """At the sizes of the YAML file `settings`, or at those of `config`."""
    from networks.semantic_codec import LongCatAudioCodec_model  # pyright: ignore

    quantizer = config.quantizer
    ours = {
        "codec_dimension": quantizer.dim,
        "decoder_dim": config.width,
        "codec_dec_ratios": list(config.rates),
        "semantic_dim": config.semantic_dim,
        "decoder_type": f"{config.sample_rate // 1000}k",
        "codec_codebooks": quantizer.num_codebooks,
        "codec_codebook_size": quantizer.codebook_size,
        "codec_codebook_search_dim": quantizer.codebook_dim,
        "semantic_token_nums": config.semantic_size,
    }
    sizes = read_yaml(settings)["codec_config"] if settings else ours
    official = LongCatAudioCodec_model.LongCatAudioCodecDecoder(
        latent_dim=sizes["codec_dimension"],
        decoder_dim=sizes["decoder_dim"],
        decoder_rates=sizes["codec_dec_ratios"],
        semantic_dim=sizes["semantic_dim"],
        decoder_type=sizes["decoder_type"],
        n_codebooks=sizes["codec_codebooks"],
        codebook_size=sizes["codec_codebook_size"],
        codebook_dim=sizes["codec_codebook_search_dim"],
        semantic_token_nums=sizes["semantic_token_nums"],
    )
    return randomize(official, gain=1.1)  # more, and rounding errors grow from layer to layer


@torch.no_grad()
def spread_centroids(official: Any, clip: Tensor) -> None:
    """Makes centroids of (T,) speech's semantic states: with random ones all may fall to one."""
    tokenizer = official.semantic_tokenizer
    states = tokenizer(clip[None] * 32767, torch.tensor([len(clip)]))[2][0]  # (N, C)
    codebook = tokenizer.kmeans.codebook
    states = states[: codebook.shape[1] // 2]
    places = torch.randperm(codebook.shape[1])[: len(states)]
    codebook[:, places] = F.normalize(states, dim=-1).T.half().float()


@torch.no_grad()
def randomize(model: nn.Module, *, gain: float) -> nn.Module:
    """Norms, biases and snakes as well; all of it exact in half precision, for a small record."""
    for name, value in model.named_parameters():
        if name.endswith("bias") or ".bias_" in name:
            value.normal_(std=0.03)
        elif value.dim() == 1 or name.endswith("alpha"):
            value.uniform_(0.8, 1.2)
        elif name.endswith("weight_g"):
            value.mul_(torch.empty_like(value).uniform_(gain - 0.4, gain + 0.4))
        elif name.endswith(("linear2.weight", "self_attn.out_proj.weight")):
            value.mul_(0.3)  # else 26 random layers make all positions alike
    for name, value in model.state_dict().items():
        if "feature_extractor" not in name:
            value.copy_(value.half())
    return model.eval()


def random_stats(num_mel_bins: int) -> np.ndarray:
    """(2, num_mel_bins + 1), as the released file: sums and count, sums of squares and a zero."""
    generator = np.random.default_rng(0)
    count = 1000.0
    mean, deviation = generator.uniform(9, 13, num_mel_bins), generator.uniform(2, 4, num_mel_bins)
    squares = count * (deviation**2 + mean**2)
    return np.stack([np.append(count * mean, count), np.append(squares, 0.0)])


def read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text())
