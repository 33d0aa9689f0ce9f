"""The rooms of the three folders: their order, what imports what, what stands at the top."""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.test_repository import FOLDERS, TEXTS

if TYPE_CHECKING:
    from collections.abc import Mapping

# The rooms of a folder in the order in which they build on each other; ROOMS.index orders them.
ROOMS = (
    "options", "media", "storage", "speech", "dataset", "model", "precompute", "training", "plan",
    "train", "inference", "tools",
)  # fmt: skip
ROOM_OF_FILE = {
    "data_utils": "dataset", "stage1_trainer": "training", "stage2_trainer": "training",
    "train_ds": "train",
}  # fmt: skip


def _read_sources(folder: str) -> dict[str, str]:
    return {
        path: text
        for path, text in TEXTS.items()
        if path.startswith(f"{folder}/") and path.endswith(".py")
    }


def _room(module: str) -> int:
    """The place in ROOMS of `FOLDER.room.file`; files at the top that are no room come last."""
    name = [*module.split("."), ""][1]
    name = ROOM_OF_FILE.get(name, name)
    return ROOMS.index(name) if name in ROOMS else len(ROOMS)


def _read_imports(folder: str, sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Each module of a folder with the modules that it imports, lazily or for types too."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text
               for path, text in sources.items()}  # fmt: skip
    imports: dict[str, set[str]] = {module: set() for module in modules}
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imports[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                imports[module] |= (names & modules.keys()) or {str(node.module)}
    return {module: names & modules.keys() for module, names in imports.items()}


def _find_upward_imports(imports: Mapping[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in sorted(names)
        if _room(name) > _room(module)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_rooms_import_earlier_rooms_alone(folder: str) -> None:
    sources = _read_sources(folder)
    assert _find_upward_imports(_read_imports(folder, sources)) == []
    TopologicalSorter(_read_imports(folder, sources)).prepare()  # raises where there is a circle


def test_a_planted_upward_import_and_a_circle_are_found() -> None:
    sources = {
        "a/options/b.py": "def f():\n    from a.model import c\n",
        "a/model/c.py": "import a.model.d",
        "a/model/d.py": "if TYPE_CHECKING:\n    from a.model.c import x\n",
        "a/train.py": "from a.inference.e import y",
        "a/inference/e.py": "import a.train, a.generate",
        "a/generate.py": "import a.tools.f",
        "a/tools/f.py": "",
    }
    imports = _read_imports("a", sources)
    assert _find_upward_imports(imports) == [
        "a.options.b imports a.model.c",
        "a.train imports a.inference.e",
        "a.inference.e imports a.generate",
    ]
    with pytest.raises(CycleError):
        TopologicalSorter(imports).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_of_a_folder_is_what_users_run_and_edit(folder: str) -> None:
    names = {path.split("/")[1] for path in TEXTS if path.startswith(f"{folder}/")}
    uncounted = {"README.md", "pyproject.toml", "__init__.py", "logs"}
    assert len({n for n in names - uncounted if not n.endswith(".json")}) <= 18
    rooms = {Path(p).parts[1] for p in TEXTS if p.startswith(f"{folder}/") and p.count("/") > 1}
    assert rooms - {"configs", "scripts", "logs"} <= set(ROOMS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_installs_its_rooms(folder: str) -> None:
    packages = tomllib.loads(TEXTS[f"{folder}/pyproject.toml"])["tool"]["setuptools"]["packages"]
    parents = {Path(path).parent for path in _read_sources(folder)}
    assert sorted(packages) == sorted(".".join(parent.parts) for parent in parents)
