"""A tiny random checkpoint of the whole model, as training leaves it, without training.

Written by `model/loading.py`'s save_released, so what reads it reads final_model folders.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import WhisperFeatureExtractor

from llama_omni.dataset.prompt import EOT_TOKEN, special_token_id
from llama_omni.model.loading import save_released
from llama_omni.model.omni import OmniSpeech2SConfig, OmniSpeech2SLlamaForCausalLM
from llama_omni.tools.make_model import build_tokenizer

NUM_UNITS = 12
SCALES = {
    "q_proj": 30,
    "k_proj": 30,
    "v_proj": 20,
    "o_proj": 20,
    "linear2.weight": 20,
    "speech_generator.output_proj.weight": 20,
}
TEXTS = ("Four.", "It is red.", "The capital is Paris.", "Größe, 你好, 🎉")


def make_omni_checkpoint(
    folder: Path, *, seed: int = 0, has_generator: bool = True, **changes: Any
) -> Path:
    """Writes config, weights, tokenizer and feature extractor; `changes` go into config.json.

    Weights are scaled up so that answers depend on the speech, units on the token, and answers
    never end by themselves.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(TEXTS, vocab_size=400)
    model = OmniSpeech2SLlamaForCausalLM(make_config(tokenizer, has_generator, **changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(next((scale for part, scale in SCALES.items() if part in name), 1))
            if name.endswith(("positional_embedding", "embed_tokens.weight", "lm_head.weight")):
                weight.normal_()
        model.lm_head.weight[special_token_id(EOT_TOKEN, tokenizer)] = 0
    save_released(
        model,
        folder,
        dtype=torch.float32,
        is_main=True,
        companions=(tokenizer, WhisperFeatureExtractor(feature_size=80)),
    )
    return folder


def make_config(tokenizer: Any, has_generator: bool, **changes: Any) -> OmniSpeech2SConfig:
    values: dict[str, Any] = {
        "architectures": ["OmniSpeech2SLlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "mel_size": 80,
        "speech_encoder_hidden_size": 64,
        "speech_encoder_layers": 1,
        "speech_encoder_ds_rate": 5,
        "speech_projector_type": "linear",
        "pad_audio_to_30s": False,
    }
    if has_generator:
        values |= {
            "speech_generator_type": "ctc",
            "ctc_decoder_config": "(2,32,4,48)",
            "ctc_upsample_factor": 5,
            "unit_vocab_size": NUM_UNITS,
        }
    return OmniSpeech2SConfig(**values | changes)
