"""Sampling: the official timesteps, direction, guidance and conditioning; inputs; mp4 files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from longcat_video_fft.media.video_file import read_frames, video_shape, write_mp4
from longcat_video_fft.model.pipeline import LongCatVideoPipeline, clean_prompt, optimized_scale
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from tests.longcat_video_fft.support.tiny import make_model

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 16
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
# What the official scheduler (longcat_video/modules/scheduling_flow_match_euler_discrete.py) gives
# at shift 12 for linspace(1, 0.001, N): the first, and the last five.
OFFICIAL_TIMES = {
    40: ([1000.0, 997.8141, 995.5204, 993.1109, 990.5765],
         [580.6801, 503.2322, 398.0653, 247.0547, 11.8694]),
    50: ([1000.0, 998.2686, 996.4701, 994.6002, 992.6550],
         [519.1721, 443.0223, 343.4708, 207.7716, 11.8694]),
}  # fmt: skip


class Exact(LongCatVideoTransformer3DModel):
    """A model that knows the clean video and predicts clean minus noise; it counts inputs."""

    clean: Tensor

    def forward(self, hidden_states: Tensor, timestep: Tensor, **others: Any) -> Tensor:  # pyright: ignore
        self.seen = {"hidden_states": hidden_states.clone(), "timestep": timestep, **others}
        sigma = (timestep / 1000)[:, None, :, None, None].clamp(min=1e-6)
        return (self.clean - hidden_states) / sigma  # x = (1 - s) clean + s noise


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    vae: Any = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    return {
        "tokenizer": AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": encoder,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=12.0),
    }


def make_transformer(cls: type = LongCatVideoTransformer3DModel) -> Any:
    torch.manual_seed(0)
    return cls(
        hidden_size=96, depth=2, num_heads=2, caption_channels=32, adaln_tembed_dim=32,
        text_tokens_zero_pad=True,
    ).eval()  # fmt: skip


def make_pipeline(parts: dict[str, Any], transformer: Any) -> LongCatVideoPipeline:
    pipe = LongCatVideoPipeline(**parts, transformer=transformer, max_sequence_length=TOKENS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(parts: dict[str, Any]) -> LongCatVideoPipeline:
    return make_pipeline(parts, make_transformer())


@pytest.fixture
def exact(parts: dict[str, Any]) -> LongCatVideoPipeline:
    pipe = make_pipeline(parts, make_transformer(Exact))
    pipe.transformer.clean = torch.randn(1, 16, 2, 4, 6, generator=seeded(5))
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("steps", [40, 50])
def test_timesteps_are_the_official_ones(pipe: LongCatVideoPipeline, steps: int) -> None:
    times = pipe.set_timesteps(steps, torch.device("cpu"))
    first, last = OFFICIAL_TIMES[steps]
    assert len(times) == steps
    np.testing.assert_allclose(times[:5], first, atol=1e-3)
    np.testing.assert_allclose(times[-5:], last, atol=1e-3)


def test_shift_gives_the_timesteps_that_users_report(pipe: LongCatVideoPipeline) -> None:
    # LongCat-Video#20: 1000, 992.8, 984.4 for a run whose steps are 0.08 apart
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.92, 0.84], device="cpu")
    np.testing.assert_allclose(pipe.scheduler.timesteps, [1000, 992.8, 984.4], atol=0.05)


def test_a_continuation_ends_in_even_steps(pipe: LongCatVideoPipeline) -> None:
    times = pipe.set_timesteps(40, torch.device("cpu"), enhance_hf=True)
    assert times[-11] > 500
    np.testing.assert_allclose(times[-10:], np.arange(500, 0, -50), atol=1e-3)
    np.testing.assert_allclose(pipe.scheduler.sigmas, [*(times / 1000).tolist(), 0], atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_steps_along_the_model_s_direction_end_in_the_clean_video(
    exact: LongCatVideoPipeline, guidance: float
) -> None:
    options = {**SMALL, "guidance_scale": guidance, "generator": seeded(1)}
    latents: Any = exact("a cat", output_type="latent", **options).frames
    torch.testing.assert_close(latents, exact.transformer.clean, atol=1e-4, rtol=0)
    exact.transformer.forward = lambda **inputs: -Exact.forward(exact.transformer, **inputs)
    latents = exact("a cat", output_type="latent", **options).frames
    assert (latents - exact.transformer.clean).abs().max() > 1  # the other sign does not


def test_guidance_is_the_official_formula() -> None:
    positive, negative = torch.randn(2, 3, 16, 2, 4, 6, generator=seeded(0)).unbind(0)
    scale = optimized_scale(positive, negative)
    assert scale.shape == (3, 1, 1, 1, 1)
    for row in range(3):
        p, n = positive[row].flatten().double(), negative[row].flatten().double()
        torch.testing.assert_close(scale[row].item(), (p @ n / (n @ n)).item(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimized", [True, False])
def test_one_step_of_guidance_by_hand(pipe: LongCatVideoPipeline, optimized: bool) -> None:
    noise = torch.randn(1, 16, 2, 4, 6, generator=seeded(2))
    options: dict[str, Any] = {**SMALL, "num_inference_steps": 1, "latents": noise}
    prompts = ("a cat", "blurred")
    made = pipe(
        prompts[0], prompts[1], **options, output_type="latent", use_optimized_scale=optimized
    ).frames
    p, n = (predict(pipe, noise, *pipe.encode_prompt(text)) for text in prompts)
    n = n * optimized_scale(p, n) if optimized else n
    torch.testing.assert_close(made, noise + n + 4 * (p - n), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def predict(pipe: Any, latents: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
    return pipe.transformer(latents, torch.full((1,), 1000.0), embeds[:, None], mask)


def test_a_batch_is_its_samples_alone(pipe: LongCatVideoPipeline) -> None:
    prompts, seeds = ["a red ball", "a blue square that moves"], [seeded(3), seeded(4)]
    both: Any = pipe(prompts, **SMALL, generator=seeds, output_type="latent").frames
    for row, prompt in enumerate(prompts):
        one: Any = pipe(prompt, **SMALL, generator=seeded(3 + row), output_type="latent").frames
        torch.testing.assert_close(both[row], one[0], atol=1e-4, rtol=1e-4)


def test_embeddings_do_as_well_as_prompts(parts: dict[str, Any]) -> None:
    whole = make_pipeline(parts, make_transformer())
    embeds = {name: whole.encode_prompt(text) for name, text in (("p", "a cat"), ("n", ""))}
    bare = make_pipeline({**parts, "tokenizer": None, "text_encoder": None}, whole.transformer)
    given = bare(
        prompt_embeds=embeds["p"][0], prompt_attention_mask=embeds["p"][1],
        negative_prompt_embeds=embeds["n"][0], negative_prompt_attention_mask=embeds["n"][1],
        **SMALL, generator=seeded(1), output_type="latent",
    ).frames  # fmt: skip
    asked = whole("  a \n cat ", **SMALL, generator=seeded(1), output_type="latent").frames
    torch.testing.assert_close(given, asked)
    with pytest.raises(ValueError, match="no text encoder"):
        bare("a cat", **SMALL)


def test_prompts_are_cleaned_by_the_official_rules() -> None:
    assert clean_prompt("  caf\u00c3\u00a9 \n &amp;lt;b&amp;gt;  ") == "caf\u00e9 <b>"


def pictures(count: int) -> list[Image.Image]:
    rows = np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), dtype=np.uint8)
    return [Image.fromarray(row) for row in rows]


def test_image_is_the_first_frame_at_time_0(exact: LongCatVideoPipeline) -> None:
    image = pictures(1)[0]
    made: Any = exact(
        "a cat", image=image, **SMALL, generator=seeded(1), output_type="latent"
    ).frames
    seen = exact.transformer.seen
    first = exact.encode_condition(image, None, 1, 32, 48)
    torch.testing.assert_close(made[:, :, :1], first)
    torch.testing.assert_close(seen["hidden_states"][:, :, :1], first.expand(2, -1, -1, -1, -1))
    assert seen["num_cond_latents"] == 1
    assert seen["timestep"][:, 0].tolist() == [0, 0]
    assert (seen["timestep"][:, 1] > 0).all()
    torch.testing.assert_close(made[:, :, 1:], exact.transformer.clean[:, :, 1:], atol=1e-4, rtol=0)
    as_bytes = exact.encode_condition(np.asarray(image), None, 1, 32, 48)
    torch.testing.assert_close(as_bytes, first)


def test_condition_latents_are_those_of_training(
    pipe: LongCatVideoPipeline, parts: dict[str, Any]
) -> None:
    from longcat_video_fft.model.vae import VideoEncoder

    video = np.stack([np.asarray(picture) for picture in pictures(5)])
    encoder = VideoEncoder(parts["vae"], torch.device("cpu"), chunk_frames=12)
    cached = encoder.encode(encoder.prepare(video)).wait().float()
    made = pipe.encode_condition(None, video, 5, 32, 48)[0]
    torch.testing.assert_close(made, cached, atol=0.02, rtol=0.02)  # the cache is bf16


def test_continuation_uses_the_last_frames(exact: LongCatVideoPipeline) -> None:
    exact.transformer.clean = torch.randn(1, 16, 6, 4, 6, generator=seeded(5))
    frames = pictures(20)
    options = {**SMALL, "num_frames": 21, "output_type": "latent"}
    made: Any = exact("a cat", video=frames, **options, generator=seeded(1)).frames
    last = exact.encode_condition(None, frames[-13:], 13, 32, 48)
    assert last.shape[2] == exact.transformer.seen["num_cond_latents"] == 4
    torch.testing.assert_close(made[:, :, :4], last)
    assert (exact.transformer.seen["timestep"][:, :4] == 0).all()
    torch.testing.assert_close(made[:, :, 4:], exact.transformer.clean[:, :, 4:], atol=1e-4, rtol=0)
    as_array = np.stack([np.asarray(frame) for frame in frames])
    again = exact("a cat", video=as_array, **options, generator=seeded(1)).frames
    torch.testing.assert_close(again, made)


def test_pictures_are_cut_not_squeezed(pipe: LongCatVideoPipeline) -> None:
    tall = np.zeros((96, 48, 3), np.uint8)
    tall[32:64] = 255  # what a 32 x 48 cut out of the middle shows
    white = np.full((32, 48, 3), 255, np.uint8)
    cut, whole = (pipe.encode_condition(Image.fromarray(p), None, 1, 32, 48) for p in (tall, white))
    torch.testing.assert_close(cut, whole, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("output_type", "shape"), [("np", (1, 5, 32, 48, 3)), ("pt", (1, 5, 3, 32, 48))]
)
def test_frames_of_each_kind(
    pipe: LongCatVideoPipeline, output_type: str, shape: tuple[int, ...]
) -> None:
    made: Any = pipe("a cat", **SMALL, generator=seeded(1), output_type=output_type).frames
    assert made.shape == shape
    assert 0 <= made.min() < made.max() <= 1
    shown: Any = pipe("a cat", **SMALL, generator=seeded(1)).frames  # PIL, as the README's snippet
    assert len(shown) == 1
    assert len(shown[0]) == 5
    last = np.asarray(made[0][4])
    last = last if output_type == "np" else last.transpose(1, 2, 0)
    np.testing.assert_allclose(np.asarray(shown[0][4]), last * 255, atol=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 6}, "num_frames=6 must be 4n \\+ 1, for example 5"),
        ({"height": 40}, "height=40 must be a multiple of 16, for example 32"),
        ({"width": 0}, "width=0 must be a multiple of 16, for example 16"),
        ({"prompt": None}, "Give either prompt"),
        ({"prompt_embeds": torch.zeros(1, TOKENS, 32)}, "Give either prompt"),
        ({"latents": torch.zeros(1, 16, 1, 4, 6)}, "not of the shape asked"),
        ({"image": pictures(1)[0], "video": pictures(5)}, "not both"),
        ({"image": pictures(3)}, "3 images were given for 1 prompts"),
        ({"video": pictures(5), "num_cond_frames": 4}, "num_cond_frames=4 must be 4n \\+ 1"),
        ({"video": pictures(5), "num_cond_frames": 5}, "below num_frames=5"),
        ({"video": pictures(5), "num_frames": 17}, "video has 5 frames, and num_cond_frames=13"),
    ],
)
def test_what_cannot_be_made_is_an_error(
    pipe: LongCatVideoPipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "a cat", **SMALL} | options))


def test_mp4_there_and_back(tmp_path: Path) -> None:
    frames = np.zeros((9, 64, 96, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[:, : 10 * (number + 1)] = (200, 40, 20)
    write_mp4(tmp_path / "new" / "0.mp4", frames)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["0.mp4"]
    assert video_shape(tmp_path / "new" / "0.mp4") == (64, 96)
    back = read_frames(tmp_path / "new" / "0.mp4", (64, 96))
    assert back.shape == frames.shape
    assert np.abs(back.astype(float) - frames).mean() < 4
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4: not a video"):
        read_frames(tmp_path / "text.mp4", (64, 96))
    with pytest.raises(ValueError, match=r"text\.mp4: not a video"):
        video_shape(tmp_path / "text.mp4")
