"""The documented command on real videos: complete, resumable, the same for all process counts."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from data.make_videos import make_videos
from longcat_video_fft.dataset.captions import EMPTY_CAPTION
from longcat_video_fft.options import hub
from longcat_video_fft.options.load import load_data_config
from longcat_video_fft.precompute.encoding import read_failures
from longcat_video_fft.precompute.job import lock_cache
from longcat_video_fft.precompute.state import is_complete
from tests.longcat_video_fft.support.s3_server import put_objects
from tests.longcat_video_fft.support.tiny import (
    NUM_VIDEOS,
    ROOT,
    Tiny,
    command,
    contents,
    launch,
    launch_env,
    make_model,
    open_folder,
    precompute,
    write_configs,
)

if TYPE_CHECKING:
    from pathlib import Path

Both = tuple[dict[str, Any], dict[str, Any]]


def both(folder: Path) -> Both:
    return contents(folder / "vae"), contents(folder / "text")


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Makes both caches in one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert precompute(write_configs(folder, tiny)) == 0
    return both(folder)


def message(config: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Returns the one message of a run that must fail."""
    capsys.readouterr()
    assert precompute(config, *argv) in (1, 2)
    output = capsys.readouterr().err
    assert "Traceback" not in output
    (found,) = (line for line in output.splitlines() if line.startswith("error: "))
    return found


def test_every_video_and_caption_is_there_once(undisturbed: Both) -> None:
    latents, text = undisturbed
    assert len(latents) == NUM_VIDEOS
    assert {bucket for bucket, *_ in latents.values()} == {"9x32x48"}
    assert {len(raw) for *_, raw in latents.values()} == {16 * 3 * 4 * 6 * 2}
    assert len({raw for *_, raw in latents.values()}) == NUM_VIDEOS  # all different
    assert EMPTY_CAPTION in text


def test_a_second_run_does_no_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_configs(tmp_path, tiny)
    assert not is_complete(load_data_config(tmp_path / "databackend.json"))
    assert precompute(config) == 0
    assert is_complete(load_data_config(tmp_path / "databackend.json"))
    files = sorted(tmp_path.rglob("*.shard"))
    monkeypatch.setattr("longcat_video_fft.precompute.job.load_video_encoder", None)
    monkeypatch.setattr("longcat_video_fft.precompute.job.TextEncoder", None)
    assert precompute(config) == 0
    assert sorted(tmp_path.rglob("*.shard")) == files


def test_a_plan_makes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    assert precompute(write_configs(tmp_path, tiny), "--dry_run") == 0
    assert not list(tmp_path.rglob("*.shard"))


@pytest.mark.dist
@pytest.mark.parametrize("processes", [2, 3])
def test_more_processes_make_the_same(
    tiny: Tiny, tmp_path: Path, undisturbed: Both, processes: int
) -> None:
    done = launch(command(write_configs(tmp_path, tiny), processes=processes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert both(tmp_path) == undisturbed
    ranks = {path.name[:9] for path in (tmp_path / "vae").glob("*.shard")}
    assert ranks == {f"rank{rank:05d}" for rank in range(processes)}


@pytest.mark.dist
def test_accelerate_launches_it(tiny: Tiny, tmp_path: Path, undisturbed: Both) -> None:
    config = write_configs(tmp_path, tiny)
    argv = ["--num_processes=2", "--mixed_precision=bf16", "--main_process_port=0"]
    argv += ["-m", "longcat_video_fft.precompute"]
    python = command(config)[0]
    done = launch([python, "-m", "accelerate.commands.launch", *argv, "--config", str(config)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert both(tmp_path) == undisturbed


def kill_and_restart(tiny: Tiny, folder: Path, kills: int, seed: int) -> None:
    """Starts the command, kills it at a random time of its work, and so on; then lets it end."""
    rng = random.Random(seed)
    config = write_configs(folder, tiny, decode_workers=1)
    for _ in range(kills):
        with subprocess.Popen(
            command(config), cwd=ROOT, env=launch_env(), stderr=subprocess.DEVNULL
        ) as process:
            before = sum(path.stat().st_size for path in folder.rglob("*.index"))
            deadline = time.monotonic() + 60
            # From the first entry on, or somewhere in the start: both happen.
            while process.poll() is None and time.monotonic() < deadline:
                now = sum(path.stat().st_size for path in folder.rglob("*.index"))
                if now > before or rng.random() < 0.002:
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)
            process.send_signal(signal.SIGKILL)
    done = launch(command(config))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.dist
def test_three_kills_change_nothing(tiny: Tiny, tmp_path: Path, undisturbed: Both) -> None:
    kill_and_restart(tiny, tmp_path, kills=3, seed=0)
    assert both(tmp_path) == undisturbed


@pytest.mark.dist
@pytest.mark.long
def test_twenty_kills_change_nothing(tiny: Tiny, tmp_path: Path, undisturbed: Both) -> None:
    kill_and_restart(tiny, tmp_path, kills=20, seed=1)
    assert both(tmp_path) == undisturbed


def test_growth_adds_and_keeps(tiny: Tiny, tmp_path: Path, undisturbed: Both) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    config = write_configs(tmp_path, Tiny(tiny.model, videos))
    assert precompute(config) == 0
    make_videos(videos, count=NUM_VIDEOS + 3, seconds=1.0, show_progress=False)
    assert precompute(config) == 0
    latents, _ = both(tmp_path)
    assert len(latents) == NUM_VIDEOS + 3
    assert {name: latents[name] for name in undisturbed[0]} == undisturbed[0]


def test_bad_videos_are_named_and_stop_nothing(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    files = sorted(videos.rglob("*.mp4"))
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-300])
    files[2].with_suffix(".txt").unlink()
    raw = bytearray(files[3].read_bytes())  # a sound header, pictures of zeros
    start = raw.index(b"mdat") + 4
    raw[start:] = bytes(len(raw) - start)
    files[3].write_bytes(raw)
    config = write_configs(tmp_path, Tiny(tiny.model, videos))
    with caplog.at_level("INFO"):
        assert precompute(config) == 0
    for reason in ("empty", "truncated", "missing_caption", "damaged"):
        assert reason in caplog.text
    assert len(both(tmp_path)[0]) == NUM_VIDEOS - 4
    failures = read_failures(tmp_path / "vae")
    assert {reason for reason, _ in failures.values()} == {"damaged"}
    count = len(list((tmp_path / "vae").glob("*.failures")))
    assert precompute(config) == 0  # what cannot be fixed is not tried again
    assert len(list((tmp_path / "vae").glob("*.failures"))) == count
    assert is_complete(load_data_config(tmp_path / "databackend.json"))
    assert precompute(config, "--retry_failed") == 0
    assert len(list((tmp_path / "vae").glob("*.failures"))) == count + 1


def test_a_cache_of_another_vae_or_rule_is_an_error(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert precompute(write_configs(tmp_path, tiny)) == 0
    config = write_configs(tmp_path, tiny, videos={"resolution": [[48, 48]]})
    assert "shapes is [[32, 48]] there and [[48, 48]] here" in message(config, capsys)
    make_model(tmp_path / "other", seed=1)
    config = write_configs(tmp_path, Tiny(tmp_path / "other", tiny.videos))
    assert "vae_sha256 is" in message(config, capsys)


def test_a_disk_that_is_too_small_is_an_error_before_work(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10_000

    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: Usage)
    found = message(write_configs(tmp_path, tiny), capsys)
    assert f"caches of {NUM_VIDEOS} more videos needs" in found
    assert not list(tmp_path.rglob("*.shard"))


def test_two_jobs_in_one_cache(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_configs(tmp_path, tiny)
    with lock_cache(tmp_path / "vae"):
        assert "another precompute is at work" in message(config, capsys)
    assert precompute(config) == 0


def test_a_model_without_a_part(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    config = write_configs(tmp_path, Tiny(tmp_path / "model", tiny.videos))
    assert "has no vae/" in message(config, capsys)


def test_verify_finds_and_repairs(tiny: Tiny, tmp_path: Path, undisturbed: Both) -> None:
    config = write_configs(tmp_path, tiny)
    assert precompute(config) == 0
    assert precompute(config, "--verify") == 0
    (shard,) = (tmp_path / "vae").glob("*.shard")
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 255
    shard.write_bytes(raw)
    assert precompute(config, "--verify") == 1
    assert precompute(config, "--verify", "--repair") == 0
    assert len(list(open_folder(tmp_path / "vae"))) == NUM_VIDEOS - 1
    assert precompute(config) == 0
    assert both(tmp_path) == undisturbed


def test_videos_in_a_bucket(
    tiny: Tiny, tmp_path: Path, undisturbed: Both, s3_url: str, s3_environment: None
) -> None:
    """A bucket gives over HTTP the bytes that a folder gives."""
    objects = {
        f"clips/v1/{path.relative_to(tiny.videos)}": path.read_bytes()
        for path in tiny.videos.rglob("*")
        if path.is_file()
    }
    put_objects(s3_url, "made-videos", objects)
    source = {
        "type": "aws",
        "instance_data_dir": "",
        "aws_bucket_name": "made-videos",
        "aws_region_name": "us-east-1",
        "aws_endpoint_url": s3_url,
        "aws_data_prefix": "clips/v1/",
    }
    assert precompute(write_configs(tmp_path, tiny, videos=source)) == 0
    assert both(tmp_path) == undisturbed


def test_the_parquet_backend(tiny: Tiny, tmp_path: Path, undisturbed: Both) -> None:
    """It reads the script's table, with and without a look at what is really there."""
    from longcat_video_fft.scripts.generate_metadata_parquet import main

    table = tmp_path / "metadata.parquet"
    assert main(["--folder", str(tiny.videos), "--output", str(table)]) == 0
    for scans in ("", "vae,aspect,metadata"):
        options = {
            "metadata_backend": "parquet",
            "caption_strategy": "parquet",
            "parquet": {"path": "../metadata.parquet"},
            "skip_file_discovery": scans,
        }
        folder = tmp_path / f"run{len(scans)}"
        assert precompute(write_configs(folder, tiny, videos=options)) == 0
        assert both(folder) == undisturbed


def test_a_kept_file_list_does_not_see_new_videos(tiny: Tiny, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    kept = {"preserve_data_backend_cache": True}
    config = write_configs(tmp_path, Tiny(tiny.model, videos), videos=kept)
    assert precompute(config) == 0
    make_videos(videos, count=NUM_VIDEOS + 1, seconds=1.0, show_progress=False)
    assert precompute(config) == 0
    assert len(both(tmp_path)[0]) == NUM_VIDEOS
    data = json.loads((tmp_path / "databackend.json").read_text())
    data[0]["preserve_data_backend_cache"] = False
    (tmp_path / "databackend.json").write_text(json.dumps(data))
    assert precompute(config) == 0
    assert len(both(tmp_path)[0]) == NUM_VIDEOS + 1
