"""train_vae.py: pieces as diffusers', a loss that falls, measured latents, messages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from data.make_videos import make_videos
from longcat_video_fft.model.vae import load_video_encoder
from tests.demos.longcat_video_fft import small_vae, train_vae

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_videos(folder, count=6, width=48, height=32, seconds=5 / 15, show_progress=False)
    return folder


@pytest.mark.parametrize("num_frames", [1, 9])
def test_two_pieces_give_what_diffusers_gives(num_frames: int) -> None:
    torch.manual_seed(0)
    vae = small_vae.build_vae(4, 1)
    video = torch.rand(2, 3, num_frames, 32, 48) * 2 - 1
    latents = torch.randn(2, 16, (num_frames - 1) // 4 + 1, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(small_vae.encode(vae, video), vae._encode(video))
        decoded = small_vae.decode(vae, latents).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(latents, return_dict=False)[0])


def test_the_command_trains_measures_and_saves(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "vae"
    argv = ["--num-frames", "5", "--base-dim", "4", "--batch-size", "2", "--steps", "8"]
    assert train_vae.main([str(videos), str(out), *argv, "--num-held-out", "2"]) == 0
    record = json.loads((out / "training.json").read_text())
    assert (record["steps"], record["videos"], record["shape"]) == (8, 4, [5, 32, 48])
    assert 0 < record["held_out_psnr_db"] < 60

    # The precompute's encoder normalizes what was trained on to mean 0 and deviation 1.
    pixels = torch.from_numpy(train_vae.read_videos(videos, num_frames=5))[:4]
    cpu = torch.device("cpu")
    encoder = load_video_encoder(out, cpu, dtype=torch.float32, chunk_frames=4)
    latents = torch.stack([encoder.encode(video).wait() for video in pixels]).float()
    assert latents.shape == (4, 16, 2, 4, 6)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    torch.testing.assert_close(mean, torch.zeros(16), atol=0.02, rtol=0)
    torch.testing.assert_close(std, torch.ones(16), atol=0.02, rtol=0)
    assert not list(tmp_path.glob("*.partial"))

    # Trained on, it begins where it was.
    more = [str(videos), str(out), "--start-from", str(out), "--steps", "1", "--num-held-out", "2"]
    assert train_vae.main([*more, "--num-frames", "5", "--learning-rate", "1e-9"]) == 0
    again = json.loads((out / "training.json").read_text())
    assert again["held_out_psnr_db"] == pytest.approx(record["held_out_psnr_db"], abs=0.02)


def test_the_loss_falls(videos: Path) -> None:
    torch.manual_seed(0)
    vae = small_vae.build_vae(4, 1)
    pixels = torch.from_numpy(train_vae.read_videos(videos, num_frames=1))
    args = train_vae.parse([str(videos), "out", "--steps", "40", "--batch-size", "4"])
    before = train_vae.measure_psnr(vae, pixels)
    train_vae.fit(vae, pixels, args)
    after = train_vae.measure_psnr(vae, pixels)
    assert before is not None
    assert after is not None
    assert after > before + 1


def test_time_ends_the_training(videos: Path) -> None:
    vae = small_vae.build_vae(4, 1)
    pixels = torch.from_numpy(train_vae.read_videos(videos, num_frames=1))
    args = train_vae.parse([str(videos), "out", "--minutes", "0.01", "--batch-size", "1"])
    steps, seconds = train_vae.fit(vae, pixels, args)
    assert 0 < steps < args.steps
    assert seconds < 300  # 0.6 were asked for


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-frames", "12"], "num_frames=12: must be 4n + 1"),
        (["--steps", "0"], "steps=0: must be above 0"),
        (["--kl-weight", "-1"], "kl_weight=-1.0: must not be negative"),
        (["--num-frames", "5", "--num-held-out", "6"], "num_held_out=6: leaves none of the 6"),
        (["--num-frames", "9"], "gives 5 frames"),
        (["--start-from", "nowhere"], "start_from=nowhere: has no config.json"),
    ],
)
def test_messages(
    videos: Path, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_vae.main([str(videos), str(tmp_path / "vae"), *argv]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "vae").exists()


def test_folders_without_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_vae.main([str(tmp_path / "none"), str(tmp_path / "vae")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert train_vae.main([str(tmp_path), str(tmp_path / "vae")]) == 1
    assert "holds no .mp4 file" in capsys.readouterr().err


def test_the_saved_folder_is_diffusers_own(tmp_path: Path) -> None:
    vae = small_vae.build_vae(4, 1)
    small_vae.save(vae, tmp_path / "vae")
    small_vae.save(vae, tmp_path / "vae")  # replaces
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert loaded.config["base_dim"] == 4
