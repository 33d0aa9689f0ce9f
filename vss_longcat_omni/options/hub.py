"""Turns what the user wrote (a folder, a file or a hub id) into a path on this machine.

The first step of every run that needs a model or a file of weights: paths are checked, and what is
named by its hub id is downloaded by huggingface_hub, once a node, into the cache that transformers
uses too. To fetch ahead of a run:

    python -m vss_longcat_omni.tools.download org/name --allow "*.json" --allow "model*"

Syntax of a hub id: `org/name`, then `@revision` if wanted, then `:path/in/it` for one file of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import WeakFileLock, filter_repo_objects

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
# The base class of all transport errors: of httpx2, or of httpx under huggingface_hub 1.x.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]


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
    After a kill, files that were complete are kept. When the hub cannot be reached, a complete copy
    in the cache is used.

    Args:
        spec: a folder, a file, or a hub id (syntax in the module's docstring).
        field: the config key, for messages.
        allow_patterns: the files wanted of a hub repository, as ("*.json", "*.safetensors");
            empty: all of them.
        sha256: expected digest, checked when the artifact is a file.
        min_free_bytes: room that must be left on the disk after a download.

    Raises:
        FileNotFoundError: no such path, or the hub cannot be reached and the cache lacks it.
        ValueError: access denied, no such repository, revision or file, wrong digest, too little
            disk, or an address in place of a path.
    """
    path = Path(spec).expanduser()
    if not (spec.strip() and path.exists()):
        match = _match_hub_id(spec, field)
        repo, revision, file = match["repo"], match["revision"], match["file"]
        label = f"{field}={repo}" + (f":{file}" if file else "")
        patterns = [file] if file else list(allow_patterns) or None
        lock = Path(constants.HF_HUB_CACHE) / ".locks" / repo.replace("/", "--") / "artifact.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
                missing = _check_before_download(
                    info, label, patterns, sha256 if file else None, min_free_bytes
                )
                path = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
                _verify_downloaded(path, missing, label)
        except (HTTP_ERROR, OSError) as error:  # also a cache that may not be written to
            path = _cached_copy(repo, revision, patterns)
            if path is None or (file and not (path / file).is_file()):
                raise _explain(error, label, repo, revision) from error
            logger.warning("%s: %s; using the copy in %s", label, error, path)
        path = path / file if file else path
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
            f"(run again, it resumes) and give the path of the file."
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


def _check_before_download(
    info: ModelInfo,
    label: str,
    patterns: list[str] | None,
    sha256: str | None,
    min_free_bytes: int,
) -> list[RepoSibling]:
    """Return the files that the cache lacks, after refusing what could only fail after gigabytes.

    `sha256` is the expected digest of the one file that is wanted.
    """
    files = {file.rfilename: file for file in info.siblings or []}
    wanted = [files[name] for name in filter_repo_objects(files, allow_patterns=patterns)]
    if not wanted:
        raise ValueError(f"{label}: no file there matches {patterns}; it has {sorted(files)}")
    folder = Path(constants.HF_HUB_CACHE)
    snapshot = folder / f"models--{info.id.replace('/', '--')}" / "snapshots" / str(info.sha)
    missing = [file for file in wanted if not (snapshot / file.rfilename).is_file()]
    if not missing:
        return []
    lfs = missing[0].lfs
    if sha256 is not None and lfs is not None and lfs.sha256 != sha256:
        raise ValueError(
            f"{label}: the hub's file has sha256 {lfs.sha256}, expected {sha256}. Not downloaded: "
            f"it is another file or another version (org/name@revision:file names one)."
        )
    needed_bytes = sum(file.size or 0 for file in missing)
    check_free_disk(
        folder,
        needed_bytes + min_free_bytes,
        what=label,
        remedy="Free some space, or set HF_HOME to a folder on another disk.",
    )
    total = _size(sum(file.size or 0 for file in wanted))
    needed = _size(needed_bytes)
    logger.info("%s: %d files, %s; downloading %s to %s", label, len(wanted), total, needed, folder)
    if os.environ.get("HF_HUB_ENABLE_HF_TRANSFER"):
        logger.warning("HF_HUB_ENABLE_HF_TRANSFER has no effect with this huggingface_hub")
    if partial := list((snapshot.parents[1] / "blobs").glob("*.incomplete")):
        logger.warning(
            "%s: %d files of downloads that were killed lie in %s; the library does not resume "
            "them. Delete them when no other download runs.",
            label,
            len(partial),
            partial[0].parent,
        )
    return missing


def _verify_downloaded(snapshot: Path, files: list[RepoSibling], label: str) -> None:
    """Compare what was just downloaded with the hub's digests; the library compares sizes alone."""
    for file in files:
        path = snapshot / file.rfilename
        if file.lfs is not None:
            _verify_sha256(path.resolve(), file.lfs.sha256, label=label, link=path)


def _cached_copy(repo: str, revision: str | None, patterns: list[str] | None) -> Path | None:
    """Return the complete snapshot in the cache, or None."""
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except FileNotFoundError:  # LocalEntryNotFoundError
        return None
    return Path(folder)


def _explain(error: Exception, label: str, repo: str, revision: str | None) -> Exception:
    """Turn a failed request into one message that says what to do. Never shows the token."""
    page = f"{constants.ENDPOINT}/{repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return FileNotFoundError(
            f"{label}: not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set. Unset "
            f"it to download, or give the path of a folder or file."
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{label}: {page} has no revision {revision}")
    if status in (401, 403):
        token = "HF_TOKEN is set, but has no access" if get_token() else "HF_TOKEN is not set"
        return ValueError(
            f"{label}: the hub denies access ({status}); {token}. If the model is gated, accept "
            f"its terms at {page} and set HF_TOKEN to a token of that account. If you meant a "
            f"folder, there is none of that name here."
        )
    if status == 404:
        return ValueError(f"{label}: not found at {page}, and there is no such folder or file here")
    return FileNotFoundError(
        f"{label}: not complete in {constants.HF_HUB_CACHE}, and it could not be fetched "
        f"({type(error).__name__}: {error}). Run again: files that are complete are kept. Or give "
        f"the path of a folder or file."
    )


def _verify_sha256(path: Path, expected: str, *, label: str, link: Path | None = None) -> None:
    """Raise ValueError on another digest; a file of the cache, where `link` leads, is deleted."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found == expected:
        return
    if link is not None:
        link.unlink()
        path.unlink(missing_ok=True)
    remedy = "It was deleted: run again" if link else "Delete the file and download it again"
    raise ValueError(f"{label}: {path} has sha256 {found}, expected {expected}. {remedy}.")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
