"""Holds our LongCat-Audio-Codec against the official modules, run side by side on the CPU.

    python -m tests.benchmarks.vss_longcat_omni.compare_longcat_codec --official DIR

DIR is a clone of meituan-longcat/LongCat-Audio-Codec (nothing of it is in this repository); its
code needs einops. Compared: random weights at tiny sizes, and at the released sizes (as DIR's YAML
files say, 6 GB of memory, minutes; not with --tiny); and the released checkpoints, where DIR/ckpts
has them. Names and shapes of tensors and all codes are to be equal, numbers to 1e-5 of the largest.
--record FILE writes weights, inputs and official outputs of the tiny sizes for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
import torch
import torchaudio.functional
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.vss_longcat_omni.support.longcat_codec_samples import TINY_DECODERS, TINY_ENCODER
from tests.vss_longcat_omni.support.official_longcat_codec import (
    build_official_decoder,
    build_official_encoder,
    random_stats,
    spread_centroids,
)
from vss_longcat_omni.speech.longcat_codec.codec import LongCatAudioCodec
from vss_longcat_omni.speech.longcat_codec.config import (
    RELEASED_DECODERS,
    DecoderConfig,
    EncoderConfig,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

TOLERANCE = 1e-5
# Around the hop, the frame of the filter bank, and where the official lengths of a batch differ.
SAMPLES = (1, 399, 400, 959, 960, 961, 1360, 1919, 5000, 16_000, 30_001, 67_203)
Result = tuple[str, float]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compare our codec with the official one")
    parser.add_argument("--official", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="not at the released sizes")
    parser.add_argument("--record", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    folder = args.official.resolve()
    sys.path.insert(0, str(folder))
    torch.manual_seed(0)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        for name, error in compare_all(folder, Path(scratch), tiny=args.tiny, record=args.record):
            failed += error > TOLERANCE
            verdict = "ok" if error <= TOLERANCE else "NOT OK"
            sys.stdout.write(f"{name:76s} {error:9.2e} {verdict}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{failed} not ok\n")
    return 1 if failed else 0


def compare_all(
    folder: Path, scratch: Path, *, tiny: bool, record: Path | None
) -> Iterator[Result]:
    clips = [read_speech(folder)[5000:][:size] for size in SAMPLES]
    official = build_official_encoder(folder, scratch, TINY_ENCODER)
    spread_centroids(official, clips[-1])
    decoders = {name: build_official_decoder(config) for name, config in TINY_DECODERS.items()}
    yield from compare_encoder("tiny encoder", official, TINY_ENCODER, scratch, clips)
    for name, config in TINY_DECODERS.items():
        yield from compare_decoder(f"tiny {name}", decoders[name], config, scratch)
    if record:
        record_tiny(record, official, decoders, clips[8])
    if tiny:
        return
    clips = [clips[number] for number in (5, 9, 11)]
    official = build_official_encoder(folder, scratch, None)
    spread_centroids(official, clips[-1])
    yield from compare_encoder("released sizes, encoder", official, None, scratch, clips)
    del official
    for name, config in RELEASED_DECODERS.items():
        wanted = build_official_decoder(config, folder / "configs" / f"{file_name(name)}.yaml")
        yield from compare_decoder(f"released sizes, {name}", wanted, None, scratch)
    yield from compare_released(folder, read_speech(folder)[: 8 * 16_000])


def compare_released(folder: Path, speech: Tensor) -> Iterator[Result]:
    """The released checkpoints in DIR/ckpts, each through its own loader and ours."""
    from networks.semantic_codec import model_loader  # pyright: ignore

    def load(kind: str, name: str) -> nn.Module:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            path = f"configs/{name}.yaml"
            return getattr(model_loader, f"load_{kind}")(path, torch.device("cpu"))

    path = folder / "ckpts" / "LongCatAudioCodec_encoder.pt"
    if path.is_file():
        codec = LongCatAudioCodec.load(path, None)
        official = load("encoder", path.stem)
        clips = [speech, speech[:30_001], speech[30_000:77_777]]
        yield from compare_loaded_encoder("released encoder", official, codec, clips)
        del codec, official
    for name in RELEASED_DECODERS:
        path = folder / "ckpts" / f"{file_name(name)}.pt"
        if path.is_file():
            codec = LongCatAudioCodec.load(None, path)
            yield from compare_loaded_decoder(f"released {name}", load("decoder", path.stem), codec)


def file_name(decoder: str) -> str:
    return f"LongCatAudioCodec_decoder_{decoder}"


# The encoder


def compare_encoder(
    case: str, official: Any, config: EncoderConfig | None, scratch: Path, clips: list[Tensor]
) -> Iterator[Result]:
    """Load the official weights by a file and our loader, as a released checkpoint is."""
    path = scratch / "encoder.pt"
    state = official.state_dict()
    # As far as is known, the released checkpoint has no statistics of the features.
    torch.save({k: v for k, v in state.items() if "feature_extractor" not in k}, path)
    codec = LongCatAudioCodec.load(
        path, None, cmvn_file=scratch / "cmvn.npy", encoder_config=config
    )
    path.unlink()
    yield from compare_loaded_encoder(case, official, codec, clips)


def compare_loaded_encoder(
    case: str, official: Any, codec: LongCatAudioCodec, clips: list[Tensor]
) -> Iterator[Result]:
    ours = codec.encoder
    yield f"{case}: names and shapes", equal(shapes(ours), shapes(official))
    yield from compare_inside(case, official, ours, clips[-1])
    for clip in clips:
        semantic, acoustic = official(clip[None, None], 16_000)
        wanted = join(semantic, acoustic)[0]
        yield f"{case}: codes of {len(clip)} samples", equal(codec.encode(clip), wanted)


def compare_inside(case: str, official: Any, ours: Any, clip: Tensor) -> Iterator[Result]:
    """What the codes are made from, so that equal codes are no accident."""
    waveform = official.preprocess(clip[None, None], 16_000)
    features, states, vectors = run_inside(official, waveform)
    own = ours.semantic_tokenizer
    found = own.feature_extractor(waveform[:, 0] * 32767)
    yield f"{case}: features", error(found, features)
    yield f"{case}: semantic states", error(own.model(found), states)
    yield f"{case}: acoustic vectors", error(ours.encoder(waveform[:, 0]), vectors)
    wanted, codes, *_ = official.acoustic_quantizer(vectors)
    yield f"{case}: quantized vectors", error(ours.acoustic_quantizer.embed(codes), wanted)
    distinct = [len(used.unique()) for used in codes[0]] + [len(own.kmeans(states).unique())]
    yield f"{case}: distinct codes {distinct}", 0.0 if min(distinct) > 2 else math.inf


def run_inside(official: Any, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(features (1, F, M), semantic states (1, N, C), acoustic vectors (1, D, N)) of (1, 1, T)."""
    tokenizer, length = official.semantic_tokenizer, torch.tensor([waveform.shape[-1]])
    features, num_frames = tokenizer.feature_extractor(waveform[:, 0] * 32767, length)
    states, _ = tokenizer.model.get_mid_emb(features, num_frames, tokenizer.layer)
    return features, states.transpose(0, 1), official.encoder(waveform)


def join(semantic: Tensor, acoustic: Tensor) -> Tensor:
    return torch.cat((semantic[..., None], acoustic.transpose(1, 2)), dim=-1)


# The decoders


def compare_decoder(
    case: str, official: Any, config: DecoderConfig | None, scratch: Path
) -> Iterator[Result]:
    path = scratch / "decoder.pt"
    torch.save(official.state_dict(), path)
    codec = LongCatAudioCodec.load(None, path, decoder_config=config)
    path.unlink()
    yield from compare_loaded_decoder(case, official, codec)


def compare_loaded_decoder(case: str, official: Any, codec: LongCatAudioCodec) -> Iterator[Result]:
    yield f"{case}: names and shapes", equal(shapes(codec.decoder), shapes(official))
    yield f"{case}: sample rate", equal(codec.sample_rate, official.output_rate)
    config = codec.decoder.config
    sizes = torch.tensor([config.semantic_size] + [config.quantizer.codebook_size**2] * 3)
    num_codebooks = config.quantizer.num_codebooks
    for num_frames in (1, 3, 17):
        codes = (torch.rand(num_frames, 4) * sizes).long()
        for used in sorted({1, num_codebooks}):
            part = codes[None, :, : 1 + used]
            wanted = official(part[..., 0], part[..., 1:].transpose(1, 2))[0, 0]
            found = codec.decode(codes if used == num_codebooks else part[0])
            yield f"{case}: {num_frames} frames of {used} codebooks", error(found, wanted)
    yield f"{case}: loudness of the last", 0.0 if 1e-3 < wanted.std() < 0.9 else math.inf
    batch = (torch.rand(3, 9, 1 + num_codebooks) * sizes[: 1 + num_codebooks]).long()
    wanted = official(batch[..., 0], batch[..., 1:].transpose(1, 2))[:, 0]
    yield f"{case}: a batch", error(codec.decoder(batch), wanted)


def read_speech(folder: Path) -> Tensor:
    """(T,) at 16 kHz, one of the official demonstrations."""
    samples, rate = soundfile.read(folder / "demos" / "org" / "common.wav", dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(samples), rate, 16_000)


def record_tiny(path: Path, encoder: Any, decoders: dict[str, Any], clip: Tensor) -> None:
    """Weights in half precision, which is exact, and what the official code makes of a clip."""
    clip = clip[:4200].half().float()  # five frames
    semantic, acoustic = encoder(clip[None, None], 16_000)
    tensors = {"waveform": clip.half(), "codes": join(semantic, acoustic)[0]}
    features, states, vectors = run_inside(encoder, encoder.preprocess(clip[None, None], 16_000))
    tensors |= {"features": features, "states": states, "vectors": vectors}
    tensors["cmvn_stats"] = torch.from_numpy(random_stats(TINY_ENCODER.semantic.num_mel_bins))
    for name, model in {"encoder": encoder, **decoders}.items():
        state = {k: v.half() for k, v in model.state_dict().items() if "feature_ex" not in k}
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
        if name != "encoder":
            tensors[f"speech.{name}"] = model(semantic[:, :2], acoustic[..., :2])[0, 0]
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


# Errors


def equal(found: Any, wanted: Any) -> float:
    """0 when equal, else infinite."""
    if isinstance(wanted, Tensor):
        return 0.0 if torch.equal(found, wanted) else math.inf
    return 0.0 if found == wanted else math.inf


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest entry."""
    if found.shape != wanted.shape:
        return math.inf
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


if __name__ == "__main__":
    sys.exit(main())
