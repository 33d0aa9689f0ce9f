"""Units of speech: quantizing, extraction that survives a kill, and the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from llama_omni.speech.audio import load_audio, save_audio
from llama_omni.speech.hubert import load_hubert
from llama_omni.speech.kmeans import (
    KMeans,
    fit_kmeans,
    read_kmeans,
    save_kmeans,
)
from llama_omni.speech.log_mel import FLOOR, compute_log_mel, invert_log_mel
from llama_omni.speech.mel_voice import MelVoice
from llama_omni.speech.quantizer import Quantizer, extract_units, load_quantizer
from llama_omni.speech.unit_cache import load_unit_cache
from llama_omni.units import main
from tests.llama_omni.speech.test_hubert import make_hubert

ROOT = Path(__file__).parents[3]


def make_sound(seed: int, *, seconds: float = 0.5) -> torch.Tensor:
    """Notes of five pitches and silence, which make runs of units."""
    generator = torch.Generator().manual_seed(seed)
    time_axis = torch.arange(round(seconds * 16_000)) / 16_000
    notes = torch.randint(0, 6, (round(seconds * 10) + 1,), generator=generator) * 200.0
    pitch = notes[(time_axis * 10).long()]
    return torch.sin(2 * torch.pi * pitch * time_axis) * 0.3


def make_dataset(folder: Path, count: int, *, seconds: float = 0.5) -> Path:
    """A dataset of `count` records with answers' speech, in the source document's format."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        path = folder / f"answer{number:03d}.wav"
        save_audio(path, make_sound(number, seconds=seconds), sample_rate=16_000)
        record = {
            "speech_instruction_path": path.name,
            "text_instruction": "A question?",
            "text_response": "An answer.",
            "speech_response_path": path.name,
        }
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def log_mel_kmeans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = torch.cat([compute_log_mel(make_sound(seed)) for seed in range(8)])
    path = tmp_path_factory.mktemp("k") / "k.safetensors"
    save_kmeans(path, KMeans("log_mel", fit_kmeans(frames, 12), torch.full((12,), 2.5)))
    return path


def test_mhubert_units_and_kmeans_of_the_wrong_width(tmp_path: Path) -> None:
    hubert, path = tmp_path / "hubert", tmp_path / "k.safetensors"
    make_hubert(num_layers=12).save_pretrained(hubert)
    save_kmeans(path, KMeans("mhubert", torch.randn(7, 768)))
    with pytest.raises(ValueError, match=r"k.safetensors: .*hubert_model_path \(--hubert\) is"):
        load_quantizer(path)
    with pytest.raises(ValueError, match=r"centroids are 768 wide, .*hubert are 32 wide. Give"):
        load_quantizer(path, hubert_path=hubert)
    features = load_hubert(hubert)
    waveform = torch.randn(2000)
    save_kmeans(path, KMeans("mhubert", features(waveform)[3:20:2]))
    quantizer = load_quantizer(path, hubert_path=hubert)
    ids = quantizer.assign(waveform).tolist()
    assert ids[3:20:2] == list(range(9))
    assert ids == torch.cdist(features(waveform), quantizer.kmeans.centroids).argmin(1).tolist()


def test_units_are_deduplicated(log_mel_kmeans: Path) -> None:
    quantizer = load_quantizer(log_mel_kmeans)
    waveform = make_sound(3, seconds=2)
    frames = quantizer.assign(waveform).tolist()
    assert len(frames) == 2 * 50 + 1
    units = quantizer.extract(waveform)
    assert units == [u for i, u in enumerate(frames) if i == 0 or frames[i - 1] != u]
    assert 3 < len(units) < len(frames)
    assert quantizer.num_units == 12


def test_log_mel_and_back() -> None:
    log_mel = compute_log_mel(make_sound(5))
    back = torch.stft(
        make_sound(5), 1024, 320, window=torch.hann_window(1024), pad_mode="constant",
        return_complex=True,
    ).abs()  # fmt: skip
    assert (
        torch.corrcoef(torch.stack([invert_log_mel(log_mel).flatten(), back.T.flatten()]))[0, 1]
        > 0.9
    )
    silence = compute_log_mel(torch.zeros(3200))
    assert silence.shape == (11, 80)
    assert torch.allclose(silence.exp(), torch.tensor(FLOOR))
    assert MelVoice(KMeans("log_mel", silence[:1], torch.tensor([50.0])))([0]).abs().max() < 0.01


def count_lines(cache: Path) -> dict[str, int]:
    """Whole lines for each audio file."""
    counts: dict[str, int] = {}
    for shard in cache.glob("rank*.jsonl"):
        for line in shard.read_text("utf-8").split("\n")[:-1]:
            path = Path(json.loads(line)["path"]).name
            counts[path] = counts.get(path, 0) + 1
    return counts


# The command, but that it is never done: it waits at the hundredth clip.
HELD = """
import sys, time
from llama_omni import units
from llama_omni.speech import quantizer

load_audio, others = quantizer.load_audio, iter(range(99))

def load_or_wait(path):
    if next(others, None) is None:
        time.sleep(600)
    return load_audio(path)

quantizer.load_audio = load_or_wait
units.main()
"""


def test_extraction_survives_a_kill(tmp_path: Path, log_mel_kmeans: Path) -> None:
    data = make_dataset(tmp_path / "data", 150, seconds=3)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", HELD, "extract", str(data), "--device", "cpu"]
    command += ["--kmeans_model_path", str(log_mel_kmeans), "--cache_dir", str(cache)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while sum(path.stat().st_size for path in cache.glob("rank*.jsonl")) < 1000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = count_lines(cache)
    assert 0 < len(before) < 150
    (shard,) = cache.glob("rank*.jsonl")
    with shard.open("a", encoding="utf-8") as file:  # a kill in the middle of a line
        file.write('{"path":"half')

    paths = sorted(data.glob("*.wav"))
    quantizer = load_quantizer(log_mel_kmeans)
    extract_units(paths, quantizer, cache)
    assert count_lines(cache) == dict.fromkeys([path.name for path in paths], 1)
    units = load_unit_cache(cache)
    assert units == {str(path.resolve()): quantizer.extract(load_audio(path)) for path in paths}
    size = sum(path.stat().st_size for path in cache.glob("*"))
    extract_units(paths, quantizer, cache)
    assert sum(path.stat().st_size for path in cache.glob("*")) == size


def test_ranks_share_the_work(tmp_path: Path, log_mel_kmeans: Path) -> None:
    paths = sorted(make_dataset(tmp_path / "data", 7).glob("*.wav"))
    quantizer = load_quantizer(log_mel_kmeans)
    for rank in (2, 0):
        extract_units([*paths, paths[0]], quantizer, tmp_path / "c", rank=rank, world_size=3)
    assert sorted(count_lines(tmp_path / "c")) == [paths[i].name for i in (0, 2, 3, 5, 6)]
    for rank in range(2):  # with another number of processes
        extract_units(paths, quantizer, tmp_path / "c", rank=rank, world_size=2)
    assert count_lines(tmp_path / "c") == dict.fromkeys([path.name for path in paths], 1)


def test_changed_audio_is_done_again(
    tmp_path: Path, log_mel_kmeans: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = sorted(make_dataset(tmp_path / "data", 2).glob("*.wav"))
    quantizer, cache = load_quantizer(log_mel_kmeans), tmp_path / "cache"
    extract_units([first, second], quantizer, cache)
    old = load_unit_cache(cache)
    save_audio(first, make_sound(99, seconds=1), sample_rate=16_000)
    assert load_unit_cache(cache).keys() == {str(second.resolve())}
    assert "1 clips changed or are gone since their units were made" in caplog.text
    extract_units([first, second], quantizer, cache)
    new = load_unit_cache(cache)
    assert new[str(first.resolve())] == quantizer.extract(load_audio(first))
    assert new[str(first.resolve())] != old[str(first.resolve())]
    assert new[str(second.resolve())] == old[str(second.resolve())]
    assert count_lines(cache) == {first.name: 2, second.name: 1}


def test_cache_of_another_quantizer_is_refused(tmp_path: Path, log_mel_kmeans: Path) -> None:
    paths = sorted(make_dataset(tmp_path / "data", 1).glob("*.wav"))
    quantizer, cache = load_quantizer(log_mel_kmeans), tmp_path / "cache"
    extract_units(paths, quantizer, cache)
    manifest = json.loads((cache / "manifest.json").read_text("utf-8"))
    assert manifest == quantizer.identity
    assert len(manifest["kmeans_sha256"]) == 64
    other = KMeans("log_mel", quantizer.kmeans.centroids + 1)
    with pytest.raises(ValueError, match=r"cache: holds units of another quantizer \(kmeans_sha"):
        extract_units(paths, Quantizer(quantizer.features, other), cache)
    with pytest.raises(FileNotFoundError, match="no unit cache there"):
        load_unit_cache(tmp_path)


def test_unreadable_audio_is_named(
    tmp_path: Path, log_mel_kmeans: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = sorted(make_dataset(tmp_path / "data", 3).glob("*.wav"))
    paths[1].write_bytes(b"not audio")
    absent = tmp_path / "data/absent.wav"
    cache = tmp_path / "cache"
    with pytest.raises(
        ValueError, match=r"2 of 4 audio files gave no units: .*absent.wav.*001.wav"
    ):
        extract_units([*paths, absent], load_quantizer(log_mel_kmeans), cache)
    assert "answer001.wav" in caplog.text
    assert sorted(count_lines(cache)) == [paths[0].name, paths[2].name]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fit, extract with two processes, convert: as the module's docstring has them."""
    data, cache = make_dataset(tmp_path / "data", 6), tmp_path / "cache"
    kmeans = tmp_path / "out/k.safetensors"
    main(["fit", str(data), str(kmeans), "--num_units", "10"])
    assert "10 log-mel units in" in capsys.readouterr().out
    fitted = read_kmeans(kmeans)
    assert fitted.durations is not None
    assert 1 <= float(fitted.durations.min()) < float(fitted.durations.max()) < 30
    again = tmp_path / "again.safetensors"
    main(["fit", str(data / "data.jsonl"), str(again), "--num_units", "10"])
    assert read_kmeans(again).digest == fitted.digest

    command = [sys.executable, "-m", "llama_omni.units", "extract", data, "--num_processes", "2"]
    command += ["--kmeans_model_path", kmeans, "--cache_dir", cache, "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 clips" in done.stdout
    assert len(list(cache.glob("rank*.jsonl"))) == 2
    quantizer = load_quantizer(kmeans)
    for path, units in load_unit_cache(cache).items():
        assert units == quantizer.extract(load_audio(Path(path)))

    model = MiniBatchKMeans(4).fit(torch.randn(50, 6).numpy())
    joblib.dump(model, tmp_path / "km.bin")
    main(["convert", str(tmp_path / "km.bin"), str(tmp_path / "km.safetensors")])
    assert "4 centroids, 6 wide, over mhubert" in capsys.readouterr().out
    assert (
        read_kmeans(tmp_path / "km.safetensors").digest == read_kmeans(tmp_path / "km.bin").digest
    )


def test_commands_with_clear_messages(tmp_path: Path, log_mel_kmeans: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: data_path=.*absent: no such file"):
        main(["fit", str(tmp_path / "absent"), str(tmp_path / "k.safetensors")])
    data = make_dataset(tmp_path / "data", 1)
    with pytest.raises(SystemExit, match=r"error: .* cannot make 1000 units: give more audio"):
        main(["fit", str(data), str(tmp_path / "k.safetensors"), "--num_units", "1000"])
    extract = ["extract", str(data), "--cache_dir", str(tmp_path / "c"), "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"error: kmeans_model_path=.*absent.bin: no such file"):
        main([*extract, "--kmeans_model_path", str(tmp_path / "absent.bin")])
    (data / "answer000.wav").unlink()
    with pytest.raises(SystemExit, match=r"error: .*no record has answer speech"):
        main([*extract, "--kmeans_model_path", str(log_mel_kmeans)])
