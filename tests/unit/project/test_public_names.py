"""Every module's `__all__` lists its public top-level names, and what is imported exists."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PATHS = sorted([*(ROOT / "emo_serve").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Every module that logs has one, and no other module wants it.
PRIVATE = {"logger"}


def find_differences(source: str, *, is_package: bool) -> list[str]:
    """Return what `__all__` of a module leaves out, makes up or repeats.

    A module of private names alone needs no list. A package may list names that it imports: that
    is how it gives its modules' names away.
    """
    tree = ast.parse(source)
    listed = _listed(tree)
    defined, imported = _top_level_names(tree)
    if listed is None:
        return ["no __all__"] if defined else []
    known = defined | imported if is_package else defined
    found = [f"{name} is public and not listed" for name in sorted(defined - set(listed))]
    found += [f"{name} is listed and not here" for name in sorted(set(listed) - known)]
    found += [f"{name} is listed twice" for name in sorted(set(listed)) if listed.count(name) > 1]
    return found


def _listed(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            names: list[str] = ast.literal_eval(node.value)  # type: ignore[union-attr]
            return names
    return None


def _top_level_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    defined: set[str] = set()
    imported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {name.id for target in node.targets for name in _names(target)}
        elif isinstance(node, ast.AnnAssign):
            defined |= {name.id for name in _names(node.target)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
    public = {name for name in defined if not name.startswith("_") and name not in PRIVATE}
    return public | (defined & {"__version__"}), imported


def _names(target: ast.expr) -> list[ast.Name]:
    return [node for node in ast.walk(target) if isinstance(node, ast.Name)]


@pytest.mark.parametrize("path", PATHS, ids=[p.relative_to(ROOT).as_posix() for p in PATHS])
def test_all_is_the_public_names(path: Path) -> None:
    assert find_differences(path.read_text(), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("source", "difference"),
    [
        ("LIMIT = 3", "no __all__"),
        ("__all__ = []\ndef f(): ...", "f is public and not listed"),
        ("__all__ = []\nclass C: ...", "C is public and not listed"),
        ("__all__ = []\nLIMIT = 3", "LIMIT is public and not listed"),
        ("__all__ = ['f', 'g']\ndef f(): ...", "g is listed and not here"),
        ("__all__ = ['f', 'f']\ndef f(): ...", "f is listed twice"),
        ("from json import loads\n__all__ = ['loads']", "loads is listed and not here"),
    ],
)
def test_a_difference_is_reported(source: str, difference: str) -> None:
    assert find_differences(source, is_package=False) == [difference]


def test_private_names_and_a_packages_imports_are_no_difference() -> None:
    source = "from .a import f\n__all__ = ['f']\n_LIMIT = 3\nlogger = 1\ndef _g(): ..."
    assert find_differences(source, is_package=True) == []


# -- imports --

IMPORTING = sorted([*PATHS, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
OURS = {
    path.relative_to(base)
    .with_suffix("")
    .as_posix()
    .removesuffix("/__init__")
    .replace("/", "."): path
    for base in (ROOT, ROOT / "kernels")
    for top in ("emo_serve", "emo_kernels", "benchmarks", "tests")
    for path in (base / top).rglob("*.py")
}


def find_missing(source: str) -> list[str]:
    """Return what a module imports from ours, anywhere in it, that is not there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.module not in OURS:
            continue
        for alias in node.names:
            inside = f"{node.module}.{alias.name}"
            if alias.name not in _names_of(node.module) and inside not in OURS:
                found.append(f"{node.module} has no {alias.name}")
    return found


@cache
def _names_of(module: str) -> set[str]:
    """Return every name that a module binds somewhere."""
    tree = ast.parse(OURS[module].read_text())
    return {name for node in ast.walk(tree) for name in _bound(node)}


def _bound(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return {node.id}
    return set()


@pytest.mark.parametrize("path", IMPORTING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_imported_exists(path: Path) -> None:
    assert find_missing(path.read_text()) == []


def test_an_import_of_nothing_is_found() -> None:
    source = "def f():\n    from emo_serve.names import BASE_POOL, NOTHING"
    assert find_missing(source) == ["emo_serve.names has no NOTHING"]
