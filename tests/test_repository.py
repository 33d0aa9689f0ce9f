"""Rules of the repository that no linter knows: folders, pins, lock, file hygiene, documents."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = tuple(
    name
    for name in ("vss_longcat_omni", "longcat_video_fft", "llama_omni")
    if (ROOT / name).is_dir()
)
MAX_LINES = 400
LONG_FILES: dict[str, str] = {}  # path: why it is longer
ROOT_FILES = {
    ".gitignore", ".pre-commit-config.yaml", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "pyproject.toml", "requirements.lock",
}  # fmt: skip
MAX_BYTES = 600_000  # but tests/reference/*.safetensors
LOCKED_EXTRAS = ("data", "demo", "eval", "dev")
# Comes with another dependency that pins what fits, so that a pin of ours could only disagree.
COMES_WITH = {
    "botocore": "boto3", "threadpoolctl": "scikit-learn", "tokenizers": "transformers",
    "triton": "torch",
}  # fmt: skip
PACKAGE_OF_MODULE = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "espeakng_loader": "espeakng-loader",
    "fairseq": "fairseq-fixed",
    "flash_attn": "flash-attn-4",
    "sklearn": "scikit-learn",
    "utmos_pytorch": "utmos-pytorch",
    "yaml": "pyyaml",
}
REGISTRY_HOSTS = (
    # Bracketed, so that this line does not name them itself.
    r"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org|ana[c]onda\.org|npm[j]s\.(?:org|com)"
)
MACHINE_PATHS = r"(?<![\w.$})\]/-])/(?:work|root|home/\w+)(?![\w-])"
PRIVATE_KEY = r"BEGIN (?:[A-Z]+ )?PRIVATE KEY"


def _list_files(root: Path = ROOT) -> list[Path]:
    """All files that git tracks; without git, all but what .gitignore is about.

    A user's own files are none of the tests' business; a new one counts from `git add` on.
    """
    command = ["git", "ls-files", "--cached", "-z"]
    if shutil.which("git") and (root / ".git").exists():
        listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if listing.returncode == 0:
            names = [name for name in listing.stdout.split("\0") if name]
            return sorted({root / name for name in names if (root / name).is_file()})
    skipped = re.compile(r"^(\.git|\.venv|\.whl|runs|build|\..*_cache|.*\.egg-info|__pycache__)$")
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not any(map(skipped.match, path.relative_to(root).parts))
    )


FILES = _list_files()
CONTENTS = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in FILES}
TEXTS = {path: content.decode() for path, content in CONTENTS.items() if b"\0" not in content}


def _read_toml(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text("utf-8"))


def _imported_modules(source: str) -> set[str]:
    """Return the first names of all absolute imports, wherever in the file they are."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            modules.add(str(node.module).partition(".")[0])
    return modules


def _imports_of(folder: str) -> dict[str, set[str]]:
    return {
        path: _imported_modules(text)
        for path, text in TEXTS.items()
        if path.startswith(f"{folder}/") and path.endswith(".py")
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_share_no_code(folder: str) -> None:
    foreign = {"data", "tests", "vss_longcat_omni", "longcat_video_fft", "llama_omni"} - {folder}
    imports = _imports_of(folder)
    assert imports
    assert {path: found for path, names in imports.items() if (found := names & foreign)} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_installs_what_it_imports(folder: str) -> None:
    project = _read_toml(f"{folder}/pyproject.toml")["project"]
    extras = project.get("optional-dependencies", {})
    required = [*project["dependencies"], *(item for extra in extras.values() for item in extra)]
    installed = {canonicalize_name(Requirement(item).name) for item in required}
    imported = set().union(*_imports_of(folder).values()) - sys.stdlib_module_names - {folder}
    packages = {canonicalize_name(PACKAGE_OF_MODULE.get(name, name)) for name in imported}
    assert {name for name in packages if COMES_WITH.get(name, name) not in installed} == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_pins_are_the_roots(folder: str) -> None:
    root, own = _read_toml("pyproject.toml"), _read_toml(f"{folder}/pyproject.toml")
    assert own["build-system"] == root["build-system"]
    assert own["project"]["requires-python"] == root["project"]["requires-python"]
    assert set(own["project"]["dependencies"]) <= set(root["project"]["dependencies"])
    root_extras = root["project"]["optional-dependencies"]
    allowed = {item for extra in root_extras.values() for item in extra}
    for name, items in own["project"].get("optional-dependencies", {}).items():
        assert set(items) <= allowed, name


TWINS = (  # llama_omni, longcat_video_fft, vss_longcat_omni: paths of one file
    ("options/hub.py", "options/hub.py", "options/hub.py"),
    ("options/parsing.py", "options/parsing.py", None),
    ("speech/audio.py", None, "media/audio.py"),
    ("speech/recognizer.py", None, "speech/recognizer.py"),
    ("inference/word_errors.py", None, "inference/word_errors.py"),
    ("model/sharding.py", "model/sharding.py", None),
    ("training/distributed.py", "training/distributed.py", None),
    ("training/optimizer.py", "training/optimizer.py", None),
    ("training/tracker.py", "training/tracker.py", None),
    ("tools/download.py", "tools/download.py", "tools/download.py"),
)


@pytest.mark.parametrize("paths", TWINS, ids=lambda paths: paths[0])
def test_copied_files_are_alike(paths: tuple[str | None, ...]) -> None:
    """What two folders hold alike has the same bytes but for the package's name."""
    folders = ("llama_omni", "longcat_video_fft", "vss_longcat_omni")
    texts = [
        TEXTS[f"{folder}/{path}"].replace(folder, "FOLDER")
        for folder, path in zip(folders, paths, strict=True)
        if path is not None and folder in FOLDERS
    ]
    assert texts
    assert set(texts) == {texts[0]}


def test_lock_has_digests_for_all_and_no_address() -> None:
    text = TEXTS["requirements.lock"]
    assert re.findall(r"://|^\s*-{1,2}(?!-?hash)[a-z].*| @ .*", text, flags=re.MULTILINE) == []
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    entries = [entry for entry in entries if not entry.startswith("#")]
    assert len(entries) > 50
    assert [
        entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)
    ] == []


def test_lock_agrees_with_pins() -> None:
    project = _read_toml("pyproject.toml")["project"]
    locked: dict[str, set[str]] = {}
    for name, version in re.findall(
        r"^([\w.-]+)==([^\s;\\]+)", TEXTS["requirements.lock"], flags=re.MULTILINE
    ):
        locked.setdefault(canonicalize_name(name), set()).add(version)
    extras = [project["optional-dependencies"][name] for name in LOCKED_EXTRAS]
    for item in [*project["dependencies"], *(item for extra in extras for item in extra)]:
        requirement = Requirement(item)
        versions = locked.get(canonicalize_name(requirement.name), set())
        assert versions, f"requirements.lock lacks {item}: run `make lock`"
        outside = {version for version in versions if version not in requirement.specifier}
        assert not outside, f"requirements.lock has {outside} for {item}: run `make lock`"


@pytest.mark.skipif(shutil.which("git") is None, reason="git tells which files are the user's")
def test_what_git_does_not_track_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # as in a hook
        monkeypatch.delenv(name)
    for name in ("tracked.py", "folder/tracked.md", "own.txt", "folder/own.md", "gone.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    tracked = ["tracked.py", "folder/tracked.md", "gone.py"]
    subprocess.run(["git", "add", *tracked], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    found = [path.relative_to(tmp_path).as_posix() for path in _list_files(tmp_path)]
    assert found == ["folder/tracked.md", "tracked.py"]


def test_root_has_no_stray_files() -> None:
    assert {path for path in CONTENTS if "/" not in path} == ROOT_FILES


def test_file_sizes() -> None:
    too_large = [
        path
        for path in FILES
        if path.stat().st_size > MAX_BYTES
        and not (path.parent == ROOT / "tests" / "reference" and path.suffix == ".safetensors")
    ]
    assert too_large == []


def test_python_files_are_short() -> None:
    lines = {path: text.count("\n") for path, text in TEXTS.items() if path.endswith(".py")}
    long_files = {path for path, count in lines.items() if count > MAX_LINES}
    assert long_files == set(LONG_FILES)
    assert all(LONG_FILES.values()), "say why"


def test_whitespace() -> None:
    trailing = [
        f"{path}:{number}"
        for path, text in TEXTS.items()
        for number, line in enumerate(text.split("\n"), start=1)
        if line != line.rstrip()
    ]
    assert trailing == []
    assert [path for path, text in TEXTS.items() if text and not text.endswith("\n")] == []
    assert [path for path, text in TEXTS.items() if text.endswith("\n\n")] == []


@pytest.mark.parametrize("pattern", [REGISTRY_HOSTS, MACHINE_PATHS, PRIVATE_KEY])
def test_no_hosts_machine_paths_or_keys(pattern: str) -> None:
    found = {path: hits for path, text in TEXTS.items() if (hits := re.findall(pattern, text))}
    assert found == {}


def test_no_other_lock_file() -> None:
    assert [path for path in TEXTS if Path(path).name in ("uv.lock", "poetry.lock")] == []


def test_data_files_parse() -> None:
    readers = {".json": json.loads, ".toml": tomllib.loads}
    readers |= {".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    for path, text in TEXTS.items():
        if reader := readers.get(Path(path).suffix):
            assert reader(text) is not None, path


def test_shell_scripts_are_strict() -> None:
    scripts = {path: text for path, text in TEXTS.items() if text.startswith("#!")}
    assert ".ci/run" in scripts
    for path, text in scripts.items():
        strict = "set -euo pipefail" if "bash" in text.split("\n")[0] else "set -eu"
        assert strict in text.split("\n"), path


DOCUMENTS = sorted(path for path in TEXTS if path.endswith(".md"))


def test_documents_exist() -> None:
    expected = {"README.md", "CONTRIBUTING.md", "data/README.md"}
    assert expected | {f"{folder}/README.md" for folder in FOLDERS} <= set(DOCUMENTS)
    assert "MIT License" in TEXTS["LICENSE"]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_make_targets_in_documents_exist(path: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", TEXTS["Makefile"], flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^(?:\$ )?)make ([a-z-]+)", TEXTS[path], flags=re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_in_documents_exist(path: str) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", TEXTS[path])
    assert [link for link in links if not (ROOT / path).parent.joinpath(link).exists()] == []


@pytest.fixture
def bare_copy(tmp_path: Path) -> Path:
    """The files that set-up reads, without a .venv."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/setup.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _run_setup(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", ".ci/setup.sh"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)} | variables,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_setup_without_a_suitable_python(bare_copy: Path) -> None:
    result = _run_setup(bare_copy, PYTHON="python-that-is-absent")
    assert result.returncode == 1
    assert "PYTHON=python-that-is-absent is not Python 3.11, 3.12 or 3.13" in result.stderr
    assert not (bare_copy / ".venv").exists()


def test_setup_with_too_little_disk(bare_copy: Path) -> None:
    """A `df` of ours in front tells a disk with 3 GB free: a really full one cannot be had."""
    (bare_copy / "df").write_text(
        "#!/bin/sh\necho header\necho disk 9000000 6000000 3000000 66% /\n"
    )
    (bare_copy / "df").chmod(0o755)
    path = f"{bare_copy}:/usr/bin:/bin"
    result = _run_setup(bare_copy, PYTHON=sys.executable, PATH=path)
    assert result.returncode == 1
    assert "installing needs about 8 GB free at ., and 3 GB are free" in result.stderr
    assert not (bare_copy / ".venv").exists()


def test_setup_that_is_done_says_and_does_nothing(bare_copy: Path) -> None:
    (bare_copy / ".venv" / "bin").mkdir(parents=True)
    (bare_copy / ".venv" / "bin" / "python").symlink_to(sys.executable)
    inputs = "cat requirements.lock pyproject.toml .ci/setup.sh | cksum"
    digest = subprocess.check_output(["sh", "-c", inputs], cwd=bare_copy, text=True).strip()
    (bare_copy / ".venv" / "installed-from").write_text(f"{digest} {bare_copy.resolve()}\n")
    result = _run_setup(bare_copy)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
