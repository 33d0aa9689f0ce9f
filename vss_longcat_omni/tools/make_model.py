"""Makes a small LongCat-Flash-Omni with random weights, in the released layout, to train whole.

    python -m vss_longcat_omni.tools.make_model OUT --data_dir data [--size small]

The same classes as the released model, a small tokenizer of the data's transcripts, and filter-bank
statistics of its questions. `tiny` (6M parameters) is for a first look on a CPU, `small` (164M) for
one GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from vss_longcat_omni.dataset.folders import find_samples, read_transcript
from vss_longcat_omni.dataset.prepare import ContentDigests, with_transcript
from vss_longcat_omni.dataset.special_tokens import build_byte_tokenizer
from vss_longcat_omni.media.audio import load_audio
from vss_longcat_omni.media.fbank import FbankConfig, compute_cmvn_stats, save_fbank
from vss_longcat_omni.model.config import LongcatOmniConfig
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.model.saving import save_config, save_weights

MAX_STATISTICS_SAMPLES = 500
VOCAB_SIZE = 1024  # at most: an answer has one frame every 60 ms, too few for a letter each
VISION = {  # few layers, and small pictures: 4 x 4 patches of 14 pixels and more
    "resize_factor": 2,
    "min_tokens": 16,
    "max_tokens": 64,
    "max_tokens_video_vit": 4096,
    "min_tokens_video": 4,
    "max_tokens_video": 2048,
    "initializer_factor": 1.0,  # a tenth, the released one, is for 32 layers
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 128,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "moe_topk": 3,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "expert_ffn_hidden_size": 32,
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "adaptor_dim": 64,
            **VISION,
        },
        "audio_config": {
            "hidden_size": 64,
            "proj_size": 32,
            "vocab_size": 8,
            "nlayer": 3,
            "num_right_layers": 1,
        },
    },
    "small": {  # shallow: a GPU waits for the process that starts so small kernels
        "hidden_size": 768,
        "num_layers": 3,
        "num_attention_heads": 8,
        "ffn_hidden_size": 2048,
        "q_lora_rank": 384,
        "kv_lora_rank": 192,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 96,
        "moe_topk": 4,
        "n_routed_experts": 16,
        "zero_expert_num": 8,
        "expert_ffn_hidden_size": 384,
        "vision_config": {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "adaptor_dim": 768,
            **VISION,
        },
        "audio_config": {
            "hidden_size": 1024,
            "proj_size": 384,
            "vocab_size": 8,
            "nlayer": 5,
            "num_right_layers": 2,
        },
    },
}


def make_model(
    out: Path, *, size: str, data_dir: Path, cache_dir: Path = Path("cache"), seed: int = 0
) -> LongcatOmniForCausalLM:
    """Write the folder and return the model; what `out` held of a model is replaced.

    `cache_dir` may hold transcripts of transcribe.py, for samples without their own.
    """
    digests = ContentDigests(cache_dir / "digests.json")
    samples = find_samples(data_dir)[:MAX_STATISTICS_SAMPLES]
    samples = [with_transcript(sample, digests, cache_dir) for sample in samples]
    texts = [read_transcript(s.transcript) for s in samples if s.transcript is not None]
    tokenizer = build_byte_tokenizer(texts, vocab_size=VOCAB_SIZE)
    torch.manual_seed(seed)
    config = LongcatOmniConfig(
        vocab_size=len(tokenizer), initializer_range=init_std(SIZES[size]), **SIZES[size]
    )
    model = LongcatOmniForCausalLM(config)
    initialize(model)
    save_config(config, out)
    save_weights(model.state_dict(), out)
    tokenizer.save_pretrained(out)
    fbank = FbankConfig()
    clips = (load_audio(sample.input_audio) for sample in samples)
    save_fbank(out / "audio", fbank, compute_cmvn_stats(clips, fbank))
    return model


def init_std(sizes: dict[str, Any]) -> float:
    """Scale the released config's, for activations as large as there: with its 0.02 itself a model
    a tenth as wide learns speech and pictures, and begins to use sound hundreds of steps later."""
    released = LongcatOmniConfig()
    return released.initializer_range * (released.hidden_size / sizes["hidden_size"]) ** 0.5


@torch.no_grad()
def initialize(model: LongcatOmniForCausalLM) -> None:
    """Draw the language model's weights as its config says; the encoders keep torch's own."""
    std = model.config.initializer_range
    for name, param in model.named_parameters():
        is_encoder = name.startswith(("vision_", "audio_encoder.", "audio_projector."))
        if param.ndim > 1 and not is_encoder:
            param.normal_(0.0, std)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="make a small model with random weights")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--cache_dir", type=Path, default=Path("cache"), help="of transcribe.py")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        model = make_model(**vars(options))
    except ValueError as error:
        sys.exit(f"error: {error}")
    num_params = sum(param.numel() for param in model.parameters())
    sys.stdout.write(f"{options.out}: {num_params:,} parameters\n")


if __name__ == "__main__":
    main()
