"""Turns what the user wrote (a folder, a file or a hub id) into a path on this machine.

The first step of every run that needs a model: paths are checked, and what is named by its hub id
is downloaded, once a node, into the cache that transformers uses too. To fetch ahead of a run:

    python -m longcat_video_fft.tools.download meituan-longcat/LongCat-Video --allow "vae/*"

Syntax of a hub id: `org/name`, then `@revision` if wanted, then `:path/in/it` for one file of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, filter_repo_objects

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

logger = logging.getLogger(__name__)

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>[^\s:@]+))?"
    r"(?::(?P<file>[^\s:]+))?"
)
# A name that ends like this is a file of the user's, not a repository.
FILE_ENDINGS = (".bin", ".ckpt", ".gguf", ".json", ".npy", ".npz", ".pt", ".pth", ".safetensors")
# The root of all that goes wrong on the wire: of httpx2, or of httpx under huggingface_hub 1.x.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]


@dataclass(frozen=True, kw_only=True)
class HubArtifact:
    """What is wanted of the hub: a repository, or one file of it."""

    field: str
    repo: str
    revision: str | None
    file: str | None
    allow_patterns: tuple[str, ...]
    sha256: str | None
    min_free_bytes: int

    @property
    def label(self) -> str:
        return f"{self.field}={self.repo}" + (f":{self.file}" if self.file else "")

    @property
    def patterns(self) -> list[str] | None:
        return [self.file] if self.file else list(self.allow_patterns) or None

    @property
    def cache(self) -> Path:
        """Where huggingface_hub keeps this repository: blobs/, snapshots/, refs/."""
        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"


def resolve_artifact(
    spec: str,
    *,
    field: str,
    allow_patterns: tuple[str, ...] = (),
    sha256: str | None = None,
    min_free_bytes: int = 0,
) -> Path:
    """Return the folder or file that `spec` names, downloading it when it is a hub id.

    Every process of a node may call this at once: the first one downloads, the others wait for it.
    An interrupted download goes on where it stopped. When the hub cannot be reached, a complete
    copy in the cache is used.

    Args:
        spec: a folder, a file, or a hub id (syntax in the module's docstring).
        field: the config key, for messages.
        allow_patterns: the files wanted of a hub repository, as ("*.json", "*.safetensors");
            empty: all of them.
        sha256: expected digest, checked when the artifact is a file.
        min_free_bytes: room that must be left on the disk after a download.

    Raises:
        FileNotFoundError: no such path, or the hub cannot be reached and the cache lacks it.
        ValueError: access refused, no such repository, revision or file, wrong digest, too little
            disk, or an address in place of a path.
    """
    local = Path(spec).expanduser()
    if spec.strip() and local.exists():
        path = local
    else:
        match = _match_hub_id(spec, field)
        artifact = HubArtifact(
            field=field,
            repo=match["repo"],
            revision=match["revision"],
            file=match["file"],
            allow_patterns=allow_patterns,
            sha256=sha256,
            min_free_bytes=min_free_bytes,
        )
        path = _fetch(artifact)
    if sha256 is not None and path.is_file():
        _verify_sha256(path, sha256, label=f"{field}={spec}")
    return path


def check_free_disk(path: Path, needed_bytes: int, *, what: str, remedy: str = "") -> None:
    """Raise ValueError unless `needed_bytes` are free where `path` is, or is to be made."""
    folder = path.expanduser().absolute()
    while not folder.is_dir():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        remedy = remedy or "Free some space, or choose a folder on another disk."
        raise ValueError(
            f"{what} needs {_size(needed_bytes)} at {path}, where {_size(free_bytes)} are free. "
            f"{remedy}"
        )


def _match_hub_id(spec: str, field: str) -> re.Match[str]:
    """Read a hub id, or say why `spec` is neither that nor a path that exists."""
    if re.match(r"https?://", spec):
        raise ValueError(
            f"{field}={spec}: addresses are not downloaded here. Run `curl -L -C - -O '{spec}'` "
            f"(when run again it goes on where it stopped) and give the path of the file."
        )
    match = HUB_ID.fullmatch(spec)
    is_path = (
        spec.startswith((".", "~", "/"))
        or (spec.endswith(FILE_ENDINGS) and ":" not in spec)
        or ("/" in spec and Path(spec).parent.is_dir())  # runs/stage1, and there is a runs/ here
    )
    if match is None or is_path:
        raise FileNotFoundError(
            f"{field}={spec}: no such file or folder ({Path(spec).expanduser().absolute()}). Give "
            f"a path that exists, or a hub id: org/name, org/name@revision or org/name:file."
        )
    return match


def _fetch(artifact: HubArtifact) -> Path:
    """Return the artifact's place in the cache, complete; one process of the node at a time."""
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / artifact.cache.name / "artifact.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            info = HfApi().model_info(
                artifact.repo, revision=artifact.revision, files_metadata=True, timeout=30
            )
            snapshot = _download(artifact, info)
    except (HTTP_ERROR, OSError) as error:  # also a cache that may not be written to
        snapshot = _cached_snapshot(artifact)
        if snapshot is None:
            raise _explain(artifact, error) from error
        logger.warning("%s: %s; using the copy in %s", artifact.label, error, snapshot)
    return snapshot / artifact.file if artifact.file else snapshot


def _download(artifact: HubArtifact, info: ModelInfo) -> Path:
    """Bring the files listed in `info` into the cache, checked first; return their folder."""
    files = {file.rfilename: file for file in info.siblings or []}
    names = list(filter_repo_objects(files, allow_patterns=artifact.patterns))
    if not names:
        raise ValueError(
            f"{artifact.label}: no file there matches {artifact.patterns}; it has {sorted(files)}"
        )
    snapshot = artifact.cache / "snapshots" / str(info.sha)
    missing = [files[name] for name in names if not (snapshot / name).is_file()]
    if not missing:
        return snapshot

    _check_before_download(artifact, [files[name] for name in names], missing)
    if not constants.HF_XET_HIGH_PERFORMANCE:
        for file in missing:
            _download_large_file(artifact, file, commit=str(info.sha))
    # Links the blobs, fetches the rest, and records the revision for use without a connection.
    return Path(
        snapshot_download(
            artifact.repo, revision=artifact.revision, allow_patterns=artifact.patterns
        )
    )


def _check_before_download(
    artifact: HubArtifact, wanted: list[RepoSibling], missing: list[RepoSibling]
) -> None:
    """Refuse what could only fail after gigabytes, and tell the size."""
    lfs = wanted[0].lfs if artifact.file else None
    if artifact.sha256 is not None and lfs is not None and lfs.sha256 != artifact.sha256:
        raise ValueError(
            f"{artifact.label}: the hub's file has sha256 {lfs.sha256}, expected "
            f"{artifact.sha256}. Not downloaded: it is another file or another version "
            f"(org/name@revision:file names one)."
        )
    total_bytes = sum(file.size or 0 for file in wanted)
    needed_bytes = sum((file.size or 0) - _bytes_here(artifact, file) for file in missing)
    folder = Path(constants.HF_HUB_CACHE)
    check_free_disk(
        folder,
        needed_bytes + artifact.min_free_bytes,
        what=artifact.label,
        remedy="Free some space, or set HF_HOME to a folder on another disk.",
    )
    logger.info(
        "%s: %d files, %s; downloading %s to %s (%s)",
        artifact.label,
        len(wanted),
        _size(total_bytes),
        _size(needed_bytes),
        folder,
        "HF_XET_HIGH_PERFORMANCE=1: an interrupted file starts again"
        if constants.HF_XET_HIGH_PERFORMANCE
        else "HF_XET_HIGH_PERFORMANCE=1 is faster, but cannot resume within a file",
    )
    if os.environ.get("HF_HUB_ENABLE_HF_TRANSFER"):
        logger.warning("HF_HUB_ENABLE_HF_TRANSFER has no effect with this huggingface_hub")


def _download_large_file(artifact: HubArtifact, file: RepoSibling, *, commit: str) -> None:
    """Put one LFS file among the cache's blobs, going on where an earlier process stopped.

    huggingface_hub resumes within one process only: its partial files belong to a process. What is
    above its limit for plain HTTP (50 GB) is left to it.
    """
    if file.lfs is None or (file.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return
    blob = artifact.cache / "blobs" / file.lfs.sha256
    if blob.is_file():
        return
    partial = _partial(blob)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as stream:
        http_get(
            hf_hub_url(artifact.repo, file.rfilename, revision=commit),
            stream,
            resume_size=stream.tell(),
            headers={**build_hf_headers(), "Accept-Encoding": "identity"},
            expected_size=file.size,
            displayed_filename=file.rfilename,
        )
    _verify_sha256(partial, file.lfs.sha256, label=artifact.label, delete=True)
    partial.replace(blob)


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _bytes_here(artifact: HubArtifact, file: RepoSibling) -> int:
    """Return how much of a file the cache has, whole or partial."""
    blob = artifact.cache / "blobs" / str(file.lfs.sha256 if file.lfs else file.blob_id)
    return next((path.stat().st_size for path in (blob, _partial(blob)) if path.is_file()), 0)


def _cached_snapshot(artifact: HubArtifact) -> Path | None:
    """Return the complete snapshot in the cache, or None."""
    try:
        folder = snapshot_download(
            artifact.repo,
            revision=artifact.revision,
            allow_patterns=artifact.patterns,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    snapshot = Path(folder)
    return snapshot if artifact.file is None or (snapshot / artifact.file).is_file() else None


def _explain(artifact: HubArtifact, error: Exception) -> Exception:
    """Turn a failed request into one message that says what to do. Never shows the token."""
    page = f"{constants.ENDPOINT}/{artifact.repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return FileNotFoundError(
            f"{artifact.label}: not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is "
            f"set. Unset it to download, or give the path of a folder or file."
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{artifact.label}: {page} has no revision {artifact.revision}")
    if status in (401, 403):
        token = "HF_TOKEN is set, but has no access" if get_token() else "HF_TOKEN is not set"
        return ValueError(
            f"{artifact.label}: the hub refuses access ({status}); {token}. If the model is gated, "
            f"accept its terms at {page} and set HF_TOKEN to a token of that account. If you meant "
            f"a folder, there is none of that name here."
        )
    if status == 404:
        return ValueError(
            f"{artifact.label}: not found at {page}, and there is no such folder or file here"
        )
    return FileNotFoundError(
        f"{artifact.label}: not complete in {constants.HF_HUB_CACHE}, and it could not be "
        f"fetched ({type(error).__name__}: {error}). Run again to go on where it stopped, or give "
        f"the path of a folder or file."
    )


def _verify_sha256(path: Path, expected: str, *, label: str, delete: bool = False) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found == expected:
        return
    if delete:
        path.unlink()
    remedy = "It was deleted: run again" if delete else "Delete the file and download it again"
    raise ValueError(f"{label}: {path} has sha256 {found}, expected {expected}. {remedy}.")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
