"""Makes a model that can be asked: its weights and adapter, its media settings and its codec.

Place in the data flow: dataset/prepare.py loads the inputs, dataset/template.py writes the prompt,
decoding.py continues it, answer.py reads what came; generate.py, measure.py and
tools/closed_questions.py ask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vss_longcat_omni.dataset.examples import plan_media, pool
from vss_longcat_omni.dataset.prepare import Settings, load_inputs
from vss_longcat_omni.dataset.special_tokens import read_special_tokens
from vss_longcat_omni.dataset.template import build_prompt
from vss_longcat_omni.inference.answer import read_answer
from vss_longcat_omni.inference.decoding import DecodingOptions, generate_frames
from vss_longcat_omni.media.pixels import PixelConfig, to_patches
from vss_longcat_omni.model.loading import CheckpointReader, load_config, load_weights
from vss_longcat_omni.model.omni import LongcatOmniForCausalLM
from vss_longcat_omni.model.saving import TRAINED_MODULES
from vss_longcat_omni.options.hub import resolve_artifact
from vss_longcat_omni.speech.codec import open_codec
from vss_longcat_omni.train_ds import preprocess_function

if TYPE_CHECKING:
    from pathlib import Path

    from vss_longcat_omni.dataset.prepare import MediaFeatures
    from vss_longcat_omni.inference.answer import SpokenAnswer
    from vss_longcat_omni.speech.codec import SpeechCodec


@dataclass
class Answerer:
    """A model ready to be asked; `load_answerer` makes it."""

    model: LongcatOmniForCausalLM
    tokenizer: Any
    settings: Settings
    codec: SpeechCodec
    system_prompt: str
    options: DecodingOptions

    def answer(self, video: Path, audio: Path) -> SpokenAnswer:
        """Answer; raises ValueError or FileNotFoundError for a file that cannot be used."""
        return self.answer_media(load_inputs(video, audio, self.settings), video.parent)

    def answer_media(self, media: MediaFeatures, folder: Path) -> SpokenAnswer:
        """Answer to features, which an evaluator may have blanked or silenced."""
        pixels, tokens = self.settings.pixels, self.model.tokens
        shape, num_audio_tokens = tuple(media.frames.shape), len(media.features)
        item = plan_media(shape, media.timestamps, media.strategy, num_audio_tokens, pixels=pixels)
        no_codes = torch.zeros(1, tokens.codec.num_streams, dtype=torch.long)
        turns = preprocess_function(folder, item, None, no_codes, system_prompt=self.system_prompt)
        prompt = build_prompt(turns[:-1], self.tokenizer, tokens=tokens)
        pixel_values, grids = to_patches(media.frames, pixels)
        pictures = {"grids": grids, "pooled_grids": pool(grids, pixels)}
        pictures["pixel_values"] = pixel_values
        sound = {"features": media.features[None], "num_tokens": num_audio_tokens}
        sound["lengths"] = torch.tensor([num_audio_tokens])
        inputs: Any = send_to_device((pictures, sound), self.model.lm_head.weight.device)
        text, audio = generate_frames(self.model, prompt, *inputs, self.options)
        return read_answer(text.cpu(), audio.cpu(), self.tokenizer, tokens=tokens)


def load_answerer(
    model_name_or_path: str,
    *,
    codec_folder: Path,
    adapter: str | None = None,
    device: str = "cpu",
    system_prompt: str = "",
    frame_sampling: Any = "multimodal_interleaved",
    use_audio_track: bool = False,
    max_vision_tokens: int = 28672,
    max_frames: int = 500,
    has_text: bool = True,
) -> Answerer:
    """Load a model and an adapter by their folders or hub ids.

    Raises ValueError or FileNotFoundError for one that is not there or not whole.
    """
    folder = resolve_artifact(model_name_or_path, field="model_name_or_path")
    adapter_folder = adapter and resolve_artifact(adapter, field="adapter")
    config = load_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = read_special_tokens(tokenizer)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model: Any = LongcatOmniForCausalLM(config, tokens=tokens).to(dtype)
    load_weights(model, CheckpointReader(folder), show_progress=False)
    if adapter_folder:
        beside = adapter_folder / TRAINED_MODULES
        if beside.is_file():
            model.load_state_dict(load_file(beside), strict=False)
        model = PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()  # pyright: ignore
    vision = (config.vision_config or {}) | {"max_vision_length": max_vision_tokens}
    settings = Settings(
        pixels=PixelConfig.from_dict(vision, source=f"{folder}/vision/config.json"),
        model_folder=folder,
        frame_sampling=frame_sampling,
        use_audio_track=use_audio_track,
    )
    codec = open_codec(str(codec_folder), device=device)
    options = DecodingOptions(
        max_frames=max_frames, num_codes=codec.codebook_sizes, has_text=has_text
    )
    return Answerer(model.to(device).eval(), tokenizer, settings, codec, system_prompt, options)
