"""Every module's `__all__` is the list of its public top-level names, no more and no less."""

from __future__ import annotations

import ast
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
