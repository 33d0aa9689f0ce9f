"""Rebuilds the cases of `longcat_omni_fbank*` and `longcat_omni_audio*` files: the hearing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from torchaudio.compliance import kaldi

from vss_longcat_omni.media.cmvn import Cmvn
from vss_longcat_omni.media.fbank import (
    Fbank,
    FbankConfig,
    compute_frames,
    compute_log_mel,
    num_audio_tokens,
)
from vss_longcat_omni.model.audio_encoder import AudioEncoder, AudioEncoderConfig, AudioProjector

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

ALLOWED = 1e-5  # tests/reference_cases.py; wider tolerances are scaled to it
# Logarithms of float32 energies; the README of the reference files allows this much, absolute.
FEATURES_ALLOWED = 1e-3
# The filters are quotients of float32 mel values up to 2840, of which one unit in the last place
# (2.4e-4) over a filter's half width of about 30 is 8e-6: CPUs whose logarithms differ in the last
# bit differ by that. On one CPU they are exactly the official ones.
FILTERS_ALLOWED = 1e-4


def compare_fbank(path: Path) -> Iterator[tuple[str, float]]:
    """(tensor name, error) for every table, stage and length of each configuration in the file.

    Relative to the largest entry, but absolute and scaled for what comes after a logarithm and for
    the filters (above). Of `length_table`, tokens in a batch under 400 samples are not compared:
    there the official features and the official calculator differ, and ours raise for the clip.
    """
    cases, metadata = read_tensors(path)
    lengths = cases["waveform_lengths"].tolist()
    clips = [wave[:size] for wave, size in zip(cases["waveforms"], lengths, strict=True)]
    compared = {"waveforms", "waveform_lengths"}
    for name, values in json.loads(metadata["config"]).items():
        compared.add(f"{name}.cmvn_stats")
        config, stats = FbankConfig.from_dict(values), cases[f"{name}.cmvn_stats"]
        for case, error in compare_configuration(name, config, stats, clips, cases):
            compared.add(case)
            yield case, error
    refuse_rest(cases, compared)


def compare_configuration(
    name: str, config: FbankConfig, stats: Tensor, clips: list[Tensor], cases: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    window, filters = kaldi_tables(config)
    cmvn = Cmvn.from_stats(stats)
    yield f"{name}.window", relative_error(window, cases[f"{name}.window"])
    error = absolute_error(filters, cases[f"{name}.mel_banks"])
    yield f"{name}.mel_banks", error * ALLOWED / FILTERS_ALLOWED
    yield f"{name}.cmvn_mean", relative_error(cmvn.mean, cases[f"{name}.cmvn_mean"])
    yield f"{name}.cmvn_scale", relative_error(cmvn.scale, cases[f"{name}.cmvn_scale"])
    num_frames, num_tokens = [], []
    for i, clip in enumerate(clips):
        stages = {
            "fbank": compute_log_mel(clip, config),
            "delta": compute_frames(clip, config),
            "features": Fbank(config, cmvn)(clip),
        }
        num_frames.append(len(stages["delta"]))
        num_tokens.append(len(stages["features"]))
        for stage, value in stages.items():
            case = f"{name}.{stage}.{i}"
            if stage != "delta" or case in cases:  # without deltas these frames are the fbank
                yield case, absolute_error(value, cases[case]) * ALLOWED / FEATURES_ALLOWED
    yield f"{name}.frame_lengths", exact_error(num_frames, cases[f"{name}.frame_lengths"])
    yield f"{name}.token_lengths", exact_error(num_tokens, cases[f"{name}.token_lengths"])
    table = cases[f"{name}.length_table"]
    yield f"{name}.length_table", exact_error(length_table(config, table), table)


def kaldi_tables(config: FbankConfig) -> tuple[Tensor, Tensor]:
    """Window and (fft size / 2 + 1, M) filters that torchaudio's filter bank uses."""
    size = config.num_window_samples
    make_window: Any = kaldi._feature_window_function  # its annotation of a dtype is wrong
    window = make_window("povey", size, 0.42, torch.device("cpu"), torch.float32)
    low, high = config.mel_limits
    fft_size = 2 ** (size - 1).bit_length()
    filters, _ = kaldi.get_mel_banks(
        config.num_mel_bins, fft_size, config.freq, low, high, 100, -500, 1.0
    )
    return window, nn.functional.pad(filters, (0, 1)).T


def length_table(config: FbankConfig, official: Tensor) -> list[list[int]]:
    """Our counts in the columns of the file: samples, calculator, alone, in a batch (or -1)."""
    rows = []
    for num_samples, _, _, in_batch in official.tolist():
        counted = num_audio_tokens(num_samples, config)
        is_heard = num_samples >= config.num_window_samples
        alone = len(Fbank(config)(torch.zeros(num_samples))) if is_heard else 0
        in_batch = alone if is_heard and in_batch >= 0 else in_batch
        rows.append([num_samples, counted, alone, in_batch])
    return rows


def compare_audio(path: Path) -> Iterator[tuple[str, float]]:
    """(tensor name, largest relative error) for every output and gradient of a cases file.

    Positions beyond a clip's end are left out, as the README of the reference files says. The
    clip alone is also held against our default in the padded batch (`solo.encoder_output.remask`).
    """
    cases, metadata = read_tensors(path)
    weights, _ = read_tensors(path.with_name(path.name.replace(".cases.", ".weights.")))
    config = json.loads(metadata["config"])
    if config.get("emb_mult", 1.0) != 1.0:
        raise ValueError(f"emb_mult={config['emb_mult']}: the official code has no other than 1.0")
    compared = {"features", "lengths", "solo.row"}
    features, lengths = cases["features"].clone().requires_grad_(), cases["lengths"]
    is_sound = torch.arange(features.shape[1]) < lengths[:, None]
    hearing: Any = build(weights, config, remask=False)
    states = hearing["audio_encoder"](features, lengths)
    embeddings = hearing["audio_projector"](states)
    found = {
        "encoder_output": (states, cases["encoder_output"][is_sound]),
        "logits": (hearing["audio_encoder"].logits(states), cases["logits"][is_sound]),
        "projector_output": (embeddings, cases["projector_output"][is_sound]),
        "adaptor_output": (embeddings, cases["adaptor_output"]),
    }
    embeddings.pow(2).mean().backward()
    gradients = {f"grad.{name}": p.grad for name, p in hearing.named_parameters()}
    gradients["grad_features"] = features.grad
    found |= {name: (gradients[name], cases[name]) for name in cases if name.startswith("grad")}
    for name, (ours, official) in found.items():
        compared.add(name)
        yield name, relative_error(ours, official)
    if "solo.row" in cases:
        compared.add("solo.encoder_output")
        yield from compare_solo(cases, weights, config)
    refuse_rest(cases, compared)


def compare_solo(
    cases: dict[str, Tensor], weights: dict[str, Tensor], config: dict[str, Any]
) -> Iterator[tuple[str, float]]:
    features, lengths = cases["features"], cases["lengths"]
    row, official = int(cases["solo.row"]), cases["solo.encoder_output"].flatten(0, 1)
    start, size = int(lengths[:row].sum()), int(lengths[row])
    alone = features[row : row + 1, :size], lengths[row : row + 1]
    for ending, remask in (("", False), (".default", True)):
        encoder = build(weights, config, remask=remask)["audio_encoder"]
        yield f"solo.encoder_output{ending}", relative_error(encoder(*alone), official)
    in_batch = encoder(features, lengths)[start : start + size]
    yield "solo.encoder_output.remask", relative_error(in_batch, official)


def build(weights: dict[str, Tensor], config: dict[str, Any], *, remask: bool) -> nn.ModuleDict:
    """Both modules in evaluation mode; every weight of the file must be theirs and no other."""
    encoder = AudioEncoder(AudioEncoderConfig.from_dict(config), remask=remask)
    projector = AudioProjector(encoder.config.output_size, config["proj_output_dim"])
    hearing = nn.ModuleDict({"audio_encoder": encoder, "audio_projector": projector})
    hearing.load_state_dict(weights)
    return hearing.eval()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def refuse_rest(cases: dict[str, Tensor], compared: set[str]) -> None:
    left = set(cases) - compared
    if left:
        raise ValueError(f"tensors that nothing compares: {sorted(left)}")


def relative_error(ours: Tensor | None, official: Tensor) -> float:
    """The largest difference over the largest entry."""
    return absolute_error(ours, official) / max(official.abs().max().item(), 1e-30)


def absolute_error(ours: Tensor | None, official: Tensor) -> float:
    if ours is None or ours.shape != official.shape:
        return float("inf")
    error = (ours.detach() - official).abs().max().item()
    return error if error == error else float("inf")  # NaN is a mismatch


def exact_error(ours: list[Any], official: Tensor) -> float:
    return 0.0 if ours == official.tolist() else float("inf")
