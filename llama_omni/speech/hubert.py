"""Computes mHuBERT features of speech, the input of the k-means that gives the released units.

Used by `quantizer.py`. Weights come from a Hugging Face folder or straight from the fairseq `.pt`;
both give the same network, transformers' HubertModel cut after the wanted layer. The checkpoint of
the paper is the file at MHUBERT_URL; nothing is downloaded here (`options/hub.py` does hub ids: the
same weights are voidful/mhubert-base).

Rules of the features: hubert_feature_reader.py of facebookresearch/fairseq (examples/textless_nlp).
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_omni.speech.fairseq_checkpoint import build_config, read_fairseq_hubert, rename_weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import HubertConfig

MHUBERT_FILE = "mhubert_base_vp_en_es_fr_it3.pt"
MHUBERT_URL = f"https://dl.fbaipublicfiles.com/hubert/{MHUBERT_FILE}"
MHUBERT_SHA256 = "23527cd6311a6617bfa199f574e2eed478cd6a58a634f4007165c10ec0019832"
MHUBERT_LAYER = 11  # counted from 1, as fairseq's output_layer: HubertModel's hidden_states[11]
MAX_CHUNK = 1_600_000  # samples; longer clips are cut, as in the reader that made the units

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# What training needed and features do not.
UNUSED = re.compile(
    r"(mask_emb|masked_spec_embed|label_embs_concat|layer_weights)$|"
    r"(final_proj|target_glu|lm_head|classifier|projector)\."
)


class HubertFeatures:
    """`features(waveform)` gives one vector per 20 ms (50 Hz).

    Attributes:
        dim: width of a vector.
        identity: distinguishes encoders whose features differ (layer, normalization, weights),
            whatever file they come from.
    """

    def __init__(
        self, model: nn.Module, config: HubertConfig, *, layer: int, normalize: bool
    ) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.layer = layer
        self.normalize = normalize
        self.dim = config.hidden_size
        self.identity = (
            f"{type(self).__name__} layer={layer} normalize={normalize} {_digest_weights(model)}"
        )
        self.min_samples = 1  # those that the first frame sees
        for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1], strict=True):
            self.min_samples = (self.min_samples - 1) * stride + kernel

    @torch.no_grad()
    def __call__(self, waveform: Tensor) -> Tensor:
        """Returns (T, dim) float32 on the model's device for (num_samples,) at 16 kHz.

        It takes one clip at a time, unpadded: the group norm of the first layer runs over time, so
        padding would change every frame. TF32 stays off: rounding moves frames to other units.

        Raises:
            ValueError: shorter than one frame (25 ms).
        """
        if len(waveform) < self.min_samples:
            raise ValueError(
                f"{len(waveform)} samples, fewer than the {self.min_samples} of a frame"
            )
        waveform = waveform.to(next(self.model.parameters()).device, torch.float32)
        if self.normalize:
            waveform = F.layer_norm(waveform, waveform.shape)
        chunks = [c for c in waveform.split(MAX_CHUNK) if len(c) >= self.min_samples]
        with full_float32():
            return torch.cat([self.encode(chunk[None])[0] for chunk in chunks])

    def encode(self, waveform: Tensor) -> Tensor:
        """Runs the network alone: (1, num_samples) -> (1, T, dim)."""
        return self.model(waveform).last_hidden_state


class FairseqHubertFeatures(HubertFeatures):
    """Runs fairseq's own network instead, to compare (`unit_backend="fairseq"`)."""

    def encode(self, waveform: Tensor) -> Tensor:
        model: Any = self.model
        return model.extract_features(waveform, mask=False, output_layer=self.layer)[0]


def load_hubert(
    path: Path,
    *,
    layer: int = MHUBERT_LAYER,
    device: torch.device | str = "cpu",
    unit_backend: Literal["transformers", "fairseq"] = "transformers",
) -> HubertFeatures:
    """Loads features from a Hugging Face folder or a fairseq `.pt` (no pickled code runs).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a HuBERT, fewer than `layer` layers, weights that do not fit, or a damaged
            copy of the released file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such mHuBERT folder or checkpoint")
    if path.is_dir():
        if unit_backend == "fairseq":
            raise ValueError(f"{path}: unit_backend=fairseq takes fairseq's .pt file, not a folder")
        config, state, normalize = _read_folder(path)
        model = build_model(config, state, layer=layer, source=path)
        return HubertFeatures(model.to(device), config, layer=layer, normalize=normalize)
    if path.name == MHUBERT_FILE:
        verify_sha256(path, MHUBERT_SHA256)
    checkpoint = read_fairseq_hubert(path)
    config, normalize = build_config(checkpoint), checkpoint.normalize
    if unit_backend == "fairseq":
        model = _build_fairseq_model(checkpoint.settings, checkpoint.state)
        return FairseqHubertFeatures(model.to(device), config, layer=layer, normalize=normalize)
    model = build_model(config, rename_weights(checkpoint.state), layer=layer, source=path)
    return HubertFeatures(model.to(device), config, layer=layer, normalize=normalize)


def build_model(
    config: HubertConfig, state: dict[str, Tensor], *, layer: int, source: Path
) -> nn.Module:
    """Builds HubertModel up to `layer`: its last state is then hidden_states[layer].

    Where each block begins with its norm (not so in base models), the norm after the last block
    is not part of that state.
    """
    from transformers import HubertModel

    if not 1 <= layer <= config.num_hidden_layers:
        raise ValueError(f"{source}: has {config.num_hidden_layers} layers, layer {layer} is asked")
    config.num_hidden_layers = layer
    config.mask_time_prob = config.mask_feature_prob = 0.0  # then there is no mask embedding
    model = HubertModel(config)
    encoder: Any = model.encoder
    later = re.compile(r"encoder\.layers\.(\d+)\.")
    wanted = {
        key: tensor
        for key, tensor in state.items()
        if not UNUSED.match(key) and not ((m := later.match(key)) and int(m[1]) >= layer)
    }
    if config.do_stable_layer_norm:
        encoder.layer_norm = nn.Identity()
        wanted = {k: v for k, v in wanted.items() if not k.startswith("encoder.layer_norm.")}
    try:
        model.load_state_dict(wanted)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{source}: the weights are not those of a HuBERT: {reason}") from error
    return model


def _read_folder(path: Path) -> tuple[HubertConfig, dict[str, Tensor], bool]:
    """Reads config, weights, and whether waveforms are normalized, of a Hugging Face folder."""
    from safetensors.torch import load_file
    from transformers import HubertConfig

    weights = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if weights is None or not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: a HuBERT folder holds config.json and {' or '.join(WEIGHT_FILES)}; of a "
            "fairseq checkpoint give the .pt file itself"
        )
    settings = json.loads((path / "config.json").read_text("utf-8"))
    if settings.get("model_type") != "hubert":
        raise ValueError(f"{path / 'config.json'}: model_type={settings.get('model_type')!r}")
    config = HubertConfig.from_dict(settings)
    try:
        if weights.suffix == ".safetensors":
            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may fail in any way
        raise ValueError(f"{weights}: not readable as weights: {error}") from error
    preprocessor = path / "preprocessor_config.json"
    normalize = config.feat_extract_norm == "layer"  # so were all published ones trained
    if preprocessor.is_file():
        normalize = json.loads(preprocessor.read_text("utf-8")).get("do_normalize", normalize)
    return config, rename_weights(state), bool(normalize)


def _build_fairseq_model(settings: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """Builds fairseq's own network. (Its own loader would run the file's pickle, and does not work
    with torch 2.6 and later.)"""
    try:
        from fairseq.models.hubert import (  # pyright: ignore[reportMissingImports]
            HubertConfig as FairseqConfig,
        )
        from fairseq.models.hubert import (  # pyright: ignore[reportMissingImports]
            HubertModel as FairseqModel,
        )
        from fairseq.tasks.hubert_pretraining import (  # pyright: ignore[reportMissingImports]
            HubertPretrainingConfig,
        )
    except ImportError as error:
        raise ValueError(
            f"unit_backend=fairseq needs fairseq, which cannot be imported ({error}). Install the "
            'extra, `pip install -e ".[fairseq]"` (Python 3.11 or 3.12), or leave unit_backend '
            "out: the default gives the same units without it."
        ) from error
    known = {key: settings[key] for key in FairseqConfig.__dataclass_fields__ if key in settings}
    known["label_rate"] = 50.0  # for training alone; stored as a reference to the task's
    model = FairseqModel(FairseqConfig(**known), HubertPretrainingConfig(), [None])
    model.load_state_dict({k: v for k, v in state.items() if k != "label_embs_concat"})
    return model


@contextmanager
def full_float32() -> Iterator[None]:
    """Turns TF32 off for what is inside, on GPUs that would use it."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv


def verify_sha256(path: Path, expected: str) -> None:
    """Raises ValueError when a file with the name of a released one is not that file."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path}: sha256 {found}, but the released file of that name has {expected}. Download "
            "it again; if it is a file of your own, rename it."
        )


def _digest_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
