"""The export loads with diffusers alone, in a process that does not know this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from longcat_video_fft import export, generate
from longcat_video_fft.generate import load_pipeline
from longcat_video_fft.media.video_file import read_frames, video_shape, write_mp4
from longcat_video_fft.model.loading import load_weights, save_transformer
from longcat_video_fft.model.sharding import local
from longcat_video_fft.model.transformer import LongCatVideoTransformer3DModel
from longcat_video_fft.options.config import TrainConfig
from longcat_video_fft.training import export as work
from longcat_video_fft.training.checkpoint import Checkpointer
from longcat_video_fft.training.parallel import Engine
from tests.longcat_video_fft.support.spawn import spawn
from tests.longcat_video_fft.support.tiny import ROOT, make_model

TOKENS = 16
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPT = ["--prompt", "a cat", "--height", "32", "--width", "48", "--num-frames", "5",
         "--num-inference-steps", "2"]  # fmt: skip
# The README's snippet, with a tiny model's numbers.
SNIPPET = """
import sys
sys.modules["longcat_video_fft"] = None  # importing it fails
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]), trust_remote_code=True
)
pipe.to("cpu")
video = pipe(
    prompt="a cat", num_frames=5, guidance_scale=4.0, num_inference_steps=2, height=32, width=48,
    generator=torch.Generator().manual_seed(0),
).frames
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe)
assert type(pipe.transformer).__module__.startswith("diffusers_modules.")
assert pipe.transformer.dtype == getattr(torch, sys.argv[2])
for number, frame in enumerate(video[0]):
    frame.save(f"{number}.png")
"""


def make_transformer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LongCatVideoTransformer3DModel(
        hidden_size=96, depth=2, num_heads=2, caption_channels=32, adaln_tembed_dim=32,
        text_tokens_zero_pad=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the model that a training begins from."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder)
    save_transformer(make_transformer(1), folder / "dit", dtype=torch.float32, is_main=True)
    return folder


def make_config(base: Path, **values: Any) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path=str(base), max_text_tokens=TOKENS, flow_shift=7.0,
        **{"mixed_precision": "no", **values},
    )  # fmt: skip


def write(base: Path, folder: Path, *, layout: str = "both", **values: Any) -> Any:
    """Writes an export of a new transformer, which is returned."""
    module = make_transformer()
    work.write_export(
        module, make_config(base), folder, base, layout=layout, is_main=True,
        **{"dtype": torch.float32, **values},
    )  # fmt: skip
    return module


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write(base, folder)
    return folder


def run_alone(folder: Path, dtype: str, tmp_path: Path) -> np.ndarray:
    """Returns frames (T, H, W, 3) of the snippet, from a process with nothing of this
    repository."""
    (tmp_path / "snippet.py").write_text(SNIPPET)
    argv = [sys.executable, "snippet.py", str(folder), dtype]
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr
    assert "cannot get type annotation" not in done.stderr
    return np.stack([np.asarray(Image.open(tmp_path / f"{n}.png")) for n in range(5)])


def test_snippet_runs_without_this_package_and_gives_the_same_video(
    exported: Path, tmp_path: Path
) -> None:
    alone = run_alone(exported, "float32", tmp_path)
    pipe = load_pipeline(exported)
    ours = pipe(
        "a cat", num_frames=5, guidance_scale=4.0, num_inference_steps=2, height=32, width=48,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]  # fmt: skip
    assert np.abs(alone.astype(int) - np.stack(ours)).max() <= 1
    assert alone.std() > 1
    assert pipe.scheduler.config.shift == 7
    assert pipe.max_tokens == TOKENS


def test_released_precision_loads_alone(base: Path, tmp_path: Path) -> None:
    module = write(base, tmp_path / "out", layout="diffusers", dtype=None)
    stored = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert stored.keys() == module.state_dict().keys()
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert not (tmp_path / "out" / "dit").exists()
    assert run_alone(tmp_path / "out", "bfloat16", tmp_path).shape == (5, 32, 48, 3)


def test_diffusers_asks_before_it_trusts_the_code(exported: Path) -> None:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(exported)


def test_files_are_linked_not_copied(base: Path, exported: Path) -> None:
    assert (exported / "dit" / WEIGHTS).samefile(exported / "transformer" / WEIGHTS)
    assert (exported / "vae" / WEIGHTS).samefile(base / "vae" / WEIGHTS)
    assert not list(exported.rglob("*.partial"))
    assert not list((exported / "dit").glob("*.py"))


def test_export_again_replaces_everything_and_spares_what_was_linked(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(base, out)
    first = (out / "dit" / WEIGHTS).read_bytes()
    vae = (base / "vae" / WEIGHTS).read_bytes()
    work.write_export(
        make_transformer(5), make_config(base), out, base, layout="both", is_main=True
    )
    again = (out / "dit" / WEIGHTS).read_bytes()
    assert again != first
    assert again == (out / "transformer" / WEIGHTS).read_bytes()
    assert (base / "vae" / WEIGHTS).read_bytes() == vae


def test_an_export_is_a_model_to_train_or_export_from(exported: Path, tmp_path: Path) -> None:
    assert work.find_companions(make_config(exported), tmp_path) == exported
    write(exported, tmp_path / "next", layout="official")
    made = {path.name for path in (tmp_path / "next").iterdir()}
    assert made == {"dit", "vae", "text_encoder", "tokenizer", "scheduler"}


def test_a_copy_is_made_where_links_cannot_be(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", deny)
    work.copy_folder(base / "vae", tmp_path / "vae")
    assert (tmp_path / "vae" / WEIGHTS).read_bytes() == (base / "vae" / WEIGHTS).read_bytes()
    assert not (tmp_path / "vae" / WEIGHTS).samefile(base / "vae" / WEIGHTS)


def test_a_link_of_the_hub_s_cache_becomes_its_file(base: Path, tmp_path: Path) -> None:
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached" / "config.json").symlink_to(base / "vae" / "config.json")
    work.copy_folder(tmp_path / "cached", tmp_path / "made")
    assert not (tmp_path / "made" / "config.json").is_symlink()
    assert (tmp_path / "made" / "config.json").read_bytes()


def test_model_is_not_written_over_what_it_began_from(base: Path) -> None:
    with pytest.raises(ValueError, match="holds the model that the training begins from"):
        work.find_companions(make_config(base), base)


def test_missing_companion_is_named(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match="has no text_encoder, tokenizer"):
        work.find_companions(make_config(tmp_path), tmp_path / "out")


def test_code_that_needs_another_module_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from longcat_video_fft.options.config import TrainConfig\n")
    with pytest.raises(ValueError, match=r"a\.py: imports longcat_video_fft\.options\.config"):
        work.join_modules(tmp_path / "a.py", [])


def test_generate_from_both_layouts(base: Path, exported: Path, tmp_path: Path) -> None:
    write(base, tmp_path / "official", layout="official")
    # The number of text keys is in model_index.json, which the released layout lacks: 512 there.
    made = []
    for number, folder in enumerate((exported, exported, tmp_path / "official")):
        path = tmp_path / f"{number}.mp4"
        assert generate.main(["--model", str(folder), "--output", str(path), *PROMPT]) == 0
        made.append(read_frames(path, (32, 48)))
    assert made[0].shape == (5, 32, 48, 3)
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0].astype(int) - made[2]).max() > 0


def test_generate_from_an_image_and_a_video(exported: Path, tmp_path: Path) -> None:
    red = np.zeros((9, 64, 96, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red[0]).save(tmp_path / "red.png")
    write_mp4(tmp_path / "red.mp4", red)
    out = ["--model", str(exported), "--output", str(tmp_path / "out.mp4"), *PROMPT]
    assert generate.main([*out, "--image", str(tmp_path / "red.png")]) == 0
    assert video_shape(tmp_path / "out.mp4") == (32, 48)
    video = ["--video", str(tmp_path / "red.mp4"), "--num-cond-frames", "5", "--num-frames", "9"]
    assert generate.main([*out, *video]) == 0
    assert read_frames(tmp_path / "out.mp4", (32, 48)).shape == (9, 32, 48, 3)


def train_and_save(base: str, out: str) -> None:
    """Saves a sharded model with averages of its own: a checkpoint, and OUT as training leaves
    it."""
    config = make_config(Path(base), output_dir=out, optimizer="adamw", ema_decay=0.9)
    with torch.device("meta"):
        model = make_transformer()
    load = partial(load_weights, folder=Path(base) / "dit", seed=0)
    engine = Engine(model, config, torch.device("cpu"), load_weights=load)
    assert engine.ema is not None
    for average in engine.ema.averages.values():
        local(average).mul_(0.5)
    checkpointer = Checkpointer(engine, Path(out), keep_last=2, identity=dict(model.config))
    checkpointer.save(3)
    checkpointer.wait()
    work.export_model(engine, config, Path(out))


@pytest.mark.dist
def test_export_of_two_devices_and_of_their_checkpoint(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    spawn(train_and_save, str(base), str(out))
    own = load_file(base / "dit" / WEIGHTS)
    (tmp_path / "databackend.json").write_text("[]")
    options = {
        "pretrained_model_name_or_path": str(base), "output_dir": str(out),
        "data_backend_config": str(tmp_path / "databackend.json"),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(options))
    argv = ["--config", str(tmp_path / "config.json"), "--checkpoint"]
    for number, flags in enumerate(([], ["--ema"])):
        made = tmp_path / f"made{number}"
        # As a user runs it: as a module that is `__main__`.
        command = [sys.executable, "-m", "longcat_video_fft.export", *argv, "latest"]
        subprocess.run([*command, "--output", str(made), *flags], check=True, cwd=ROOT)
        code = Path("transformer") / f"{work.MODULE}.py"
        assert (made / code).read_bytes() == (out / code).read_bytes()
        scale = 0.5 if flags else 1.0
        for name, value in load_file(made / "transformer" / WEIGHTS).items():
            assert torch.equal(value, (own[name] * scale).bfloat16()), name
    averages = (tmp_path / "made1" / "transformer" / WEIGHTS).read_bytes()
    assert (out / "transformer" / WEIGHTS).read_bytes() == averages  # training's end takes them
    assert load_pipeline(out).scheduler.config.shift == 7
    assert export.main([*argv, "nowhere/checkpoint-1", "--output", str(tmp_path / "no")]) == 1
    assert "not a finished checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "vae, text_encoder, tokenizer is missing"),
        (["--output", "cat.gif"], "must end in .mp4"),
        (["--image", "none.png"], "image=none.png: no such file"),
        (["--num-frames", "6"], "num_frames=6: must be 4n + 1"),
        (["--height", "40"], "height=40: must be a multiple of 16"),
        (["--video", __file__, "--num-cond-frames", "13"], "num_cond_frames=13: must be below"),
        (["--image", __file__], "not a picture that can be read"),
        (["--video", __file__, "--num-cond-frames", "1"], "not a video that can be read"),
    ],
)
def test_generate_says_what_is_wrong(
    exported: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert generate.main(["--model", str(exported), "--output", "x.mp4", *PROMPT, *argv]) == 1
    assert message in capsys.readouterr().err
