"""Downloads by hub id, each in a process of its own, as a user runs it, against a local hub."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from huggingface_hub import constants

from llama_omni.options.hub import check_free_disk, resolve_artifact
from tests.llama_omni.support.local_hub import COMMIT, Hub, Repository

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "hf_aTokenThatMustNeverBeShown"
WEIGHTS = bytes(range(256)) * 98304  # 24 MiB: written, and so kept, in chunks of 10 MiB
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running hub with one healthy repository, org/name."""
    server = Hub()
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "original/model.pt": b"old"}
    server.repositories["org/name"] = Repository(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Result:
    code: int
    output: str
    errors: str


class Client:
    """Runs `python -m llama_omni.tools.download` with a cache of its own."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        self.folder = folder
        self.blobs = folder / "hf_home" / "hub" / "models--org--name" / "blobs"
        self.environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            # However busy the machine: a request that is tried again is one that the hub broke off.
            "HF_HUB_DOWNLOAD_TIMEOUT": "600",
            "HF_HUB_ETAG_TIMEOUT": "600",
        }

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "llama_omni.tools.download", *arguments],
            env=self.environment | variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> Result:
        process = self.start(*arguments, **variables)
        output, errors = process.communicate(timeout=240)
        assert TOKEN not in output + errors
        return Result(process.returncode, output.strip(), errors)


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path)


def test_repository_is_downloaded_once_then_found_in_the_cache(hub: Hub, client: Client) -> None:
    wanted = ("org/name", "--allow", "*.json", "--allow", "*.safetensors")
    first = client.run(*wanted)
    assert first.code == 0, first.errors
    assert "2 files, 25.17 MB; downloading 25.17 MB" in first.errors
    folder = Path(first.output)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(hub.downloads) == [("config.json", 0), ("model.safetensors", 0)]

    assert client.run(*wanted).output == first.output
    assert client.run(*wanted, HF_HUB_OFFLINE="1").output == first.output
    hub.repositories["org/name"].refusal = (401, "")
    assert client.run(*wanted).output == first.output
    assert len(hub.downloads) == 2


def test_one_file_with_its_digest(hub: Hub, client: Client) -> None:
    result = client.run("org/name@main:model.safetensors", "--sha256", SHA256)
    assert result.code == 0, result.errors
    assert Path(result.output).read_bytes() == WEIGHTS
    assert hub.downloads == [("model.safetensors", 0)]

    result = client.run("org/name:original/model.pt", "--sha256", SHA256)
    assert result.code == 1
    assert f"expected {SHA256}. Not downloaded" in result.errors
    assert len(hub.downloads) == 1


def test_processes_of_one_node_download_once(hub: Hub, client: Client) -> None:
    processes = [client.start("org/name", LOCAL_RANK=str(rank)) for rank in range(3)]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({output for output, _ in outputs}) == 1
    assert sorted(name for name, _ in hub.downloads) == [
        "config.json",
        "model.safetensors",
        "original/model.pt",
    ]


def test_killed_download_keeps_the_files_that_were_complete(hub: Hub, client: Client) -> None:
    repository = hub.repositories["org/name"]
    repository.stall_after = 21_000_000
    process = client.start("org/name")
    assert hub.stalled.wait(240)
    snapshot = client.blobs.parent / "snapshots" / COMMIT
    deadline = time.monotonic() + 240
    while not all((snapshot / name).is_file() for name in ("config.json", "original/model.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=240)
    assert not (snapshot / "model.safetensors").exists()

    offline = client.run("org/name", HF_HUB_OFFLINE="1")
    assert offline.code == 1
    assert "not complete in" in offline.errors
    assert "HF_HUB_OFFLINE is set" in offline.errors

    repository.stall_after = None
    result = client.run("org/name")
    assert result.code == 0, result.errors
    assert "downloading 25.17 MB" in result.errors
    assert f"1 files of downloads that were killed lie in {client.blobs}" in result.errors
    small = [("config.json", 0), ("original/model.pt", 0)]
    assert sorted(hub.downloads) == sorted([*small, *2 * [("model.safetensors", 0)]])
    assert Path(result.output, "model.safetensors").read_bytes() == WEIGHTS


def test_broken_connection_is_resumed_within_the_run(hub: Hub, client: Client) -> None:
    hub.repositories["org/name"].hang_ups = 2
    result = client.run("org/name:model.safetensors")
    assert result.code == 0, result.errors
    starts = [start for _, start in hub.downloads]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] <= starts[2]
    assert Path(result.output).read_bytes() == WEIGHTS


def test_wrong_bytes_are_deleted(hub: Hub, client: Client) -> None:
    repository = hub.repositories["org/name"]
    repository.sent_instead["model.safetensors"] = WEIGHTS[::-1]
    result = client.run("org/name:model.safetensors")
    assert result.code == 1
    assert f"expected {SHA256}. It was deleted: run again" in result.errors
    assert not list(client.blobs.glob(f"{SHA256}*"))
    repository.sent_instead.clear()
    assert client.run("org/name:model.safetensors").code == 0


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Points calls in this process to the hub: what these variables set is read at import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.mark.parametrize(
    ("status", "error_code", "error", "message"),
    [
        (401, "GatedRepo", ValueError, r"denies access \(401\); HF_TOKEN is set, but has no"),
        (403, "GatedRepo", ValueError, r"denies access \(403\); .* accept its terms at http"),
        (403, "", ValueError, r"denies access \(403\)"),
        (404, "RepoNotFound", ValueError, "not found at .* no such folder or file here"),
        (500, "", FileNotFoundError, r"could not be fetched \(HfHubHTTPError"),
    ],
)
def test_refusals(
    here: Hub, status: int, error_code: str, error: type[Exception], message: str
) -> None:
    here.repositories["org/name"].refusal = (status, error_code)
    with pytest.raises(error, match=rf"^stage1_model_path=org/name: .*{message}") as raised:
        resolve_artifact("org/name", field="stage1_model_path")
    assert TOKEN not in str(raised.value)


def test_without_token_the_message_says_so(hub: Hub, client: Client) -> None:
    hub.repositories["org/name"].refusal = (401, "GatedRepo")
    del client.environment["HF_TOKEN"]
    result = client.run("org/name")
    assert result.code == 1
    assert "(401); HF_TOKEN is not set" in result.errors
    assert "Traceback" not in result.errors


def test_too_little_disk_is_reported_before_the_download(here: Hub) -> None:
    here.repositories["org/name"].listed_sizes["model.safetensors"] = 10**18
    message = r"^model=org/name needs 1000000000\.00 GB at .* free\. .* set HF_HOME to a folder"
    with pytest.raises(ValueError, match=message):
        resolve_artifact("org/name", field="model")
    with pytest.raises(ValueError, match=r"^model=org/name:config\.json needs 1000000000\.00 GB"):
        resolve_artifact("org/name:config.json", field="model", min_free_bytes=10**18)
    assert here.downloads == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("org/name:absent.pt", r"no file there matches \['absent.pt'\]; it has \['config.json'"),
        ("org/name@v9", "has no revision v9"),
    ],
)
@pytest.mark.usefixtures("here")
def test_absent_file_and_revision(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_artifact(spec, field="model")


def test_hub_that_does_not_answer(client: Client) -> None:
    result = client.run("org/name", HF_ENDPOINT="http://127.0.0.1:1")
    assert result.code == 1
    assert "could not be fetched (ConnectError" in result.errors
    assert "Traceback" not in result.errors


@pytest.mark.parametrize(
    "spec",
    ["./models/llama", "/nowhere/llama", "~/nowhere/llama", "kmeans/centroids.bin", "gpt", "a b/c"],
)
def test_missing_path_is_not_asked_of_the_hub(spec: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^kmeans=.*no such file or folder"):
        resolve_artifact(spec, field="kmeans")


def test_name_below_a_folder_that_exists_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder \(.*/runs/stage1\)"):
        resolve_artifact("runs/stage1", field="stage1_model_path")
    (tmp_path / "runs" / "stage1").mkdir()
    assert resolve_artifact("runs/stage1", field="stage1_model_path") == Path("runs/stage1")


def test_address_is_refused_with_the_command() -> None:
    with pytest.raises(ValueError, match=r"curl -L -C - -O 'https://example.org/km.bin'"):
        resolve_artifact("https://example.org/km.bin", field="kmeans_model_path")


def test_digest_of_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "km.bin"
    path.write_bytes(WEIGHTS)
    assert resolve_artifact(str(path), field="kmeans_model_path", sha256=SHA256) == path
    path.write_bytes(WEIGHTS[:-1])
    with pytest.raises(ValueError, match=rf"km.bin has sha256 \w+, expected {SHA256}. Delete"):
        resolve_artifact(str(path), field="kmeans_model_path", sha256=SHA256)


def test_free_disk_of_a_folder_to_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    check_free_disk(folder, 1, what="checkpoint")
    with pytest.raises(ValueError, match=r"^checkpoint needs 1000000000\.00 GB at .*/not/yet"):
        check_free_disk(folder, 10**18, what="checkpoint")
