"""Imports point one way; this walks every module's syntax tree and fails on any other arrow.

Imports inside functions, under TYPE_CHECKING and through `import_module("...")` count as well: a
late import is still an arrow.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

_RULES = tomllib.loads((ROOT / "docs" / "arrows.toml").read_text())
ARROWS: dict[str, list[str]] = _RULES["arrows"]
OWNERS: dict[str, list[str]] = _RULES["owners"]


def find_violations(module: str, source: str) -> list[str]:
    """Return one line for each import or print in `source` that the rules above forbid."""
    part = _most_specific(module, ARROWS)
    if part is None:
        return [f"{module}: not on the map; add it to ARROWS"]
    found = []
    tree = ast.parse(source)
    for line, target in _imports(tree, module):
        top = target.partition(".")[0]
        if top in ("emo_serve", "emo_kernels"):
            own = _most_specific(target, ARROWS) == part
            if not own and not any(_allows(a, target) for a in ARROWS[part]):
                found.append(f"{module}:{line}: {part} may not import {target}")
        elif top in OWNERS and not any(_is_below(module, owner) for owner in OWNERS[top]):
            found.append(f"{module}:{line}: only {', '.join(OWNERS[top])} may import {top}")
    if not _is_below(module, "emo_serve.cli"):
        found += [
            f"{module}:{node.lineno}: print() outside cli"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
    return found


def _imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base]) if base else ".".join(package)
            for alias in node.names:
                # `from emo_serve import server` imports a module, `from emo_serve.errors import X`
                # a name; only the files tell them apart.
                name = f"{base}.{alias.name}"
                yield node.lineno, name if _is_module(name) else base
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def _is_below(name: str, ancestor: str) -> bool:
    return name == ancestor or (ancestor != "emo_serve" and name.startswith(ancestor + "."))


def _allows(arrow: str, target: str) -> bool:
    return target == arrow[:-1] if arrow.endswith("!") else _is_below(target, arrow)


def _most_specific(module: str, parts: dict[str, list[str]]) -> str | None:
    return max((part for part in parts if _is_below(module, part)), key=len, default=None)


def _modules() -> list[tuple[str, Path]]:
    found = []
    for base, package in ((ROOT, "emo_serve"), (ROOT / "kernels", "emo_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            name = path.relative_to(base).with_suffix("").as_posix().replace("/", ".")
            found.append((name.removesuffix(".__init__"), path))
    return found


MODULES = _modules()


def test_the_walk_finds_both_packages() -> None:
    names = {name for name, _ in MODULES}
    assert {"emo_serve", "emo_kernels", "emo_serve.emo.config", "emo_serve.errors"} <= names


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_one_way(module: str, path: Path) -> None:
    assert find_violations(module, path.read_text()) == []


def test_no_file_leads_back_to_itself() -> None:
    known = dict(MODULES)
    arrows = {
        module: {target for _, target in _imports(ast.parse(path.read_text()), module)}
        & known.keys() - {module}
        for module, path in MODULES
    }
    with pytest.raises(graphlib.CycleError):  # the test can fail
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()
    graphlib.TopologicalSorter(arrows).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("emo_serve.residency.slots", "import torch"),
        ("emo_serve.residency.slots", "def late():\n    from vllm import LLM"),
        ("emo_serve.residency.manager", "from emo_serve.pools.catalog import PoolCatalog"),
        ("emo_serve.residency.manager", "from emo_serve.pools import catalog"),
        ("emo_serve.residency.manager", "from emo_serve.metrics import Metrics"),
        ("emo_serve.pools.pool", "from emo_serve.server import app"),
        ("emo_serve.pools.pool", "from emo_serve import server"),
        ("emo_serve.pools.pool", "from ..server.app import create_app"),
        ("emo_serve.emo.routing", "from emo_serve.pools.pool import ExpertPool"),
        ("emo_serve.emo.routing", "import importlib\nimportlib.import_module('vllm.config')"),
        ("emo_serve.vllm_plugin.worker", "from emo_serve.residency.slots import SlotTable"),
        ("emo_serve.server.serve", "import vllm.entrypoints"),
        ("emo_serve.server.serve", "from emo_serve.vllm_plugin.worker import EmoWorkerExtension"),
        ("emo_serve.server.serve", "import emo_serve.cli.main"),
        ("emo_serve.server.serve", "from prometheus_client import Counter"),
        ("emo_serve.server.serve", "print('started')"),
        ("emo_serve.pools.comparison", "print('alike')"),
        ("emo_serve.cli.pools", "def draw():\n    import matplotlib"),
        ("emo_serve.metrics", "from emo_serve.server.serve import create_app"),
        ("emo_serve", "from emo_serve.errors import ConfigError"),
        ("emo_serve.brand_new", "import json"),
        ("emo_serve.server.asgi.keys", "from emo_serve.server.auto.choice import PoolChooser"),
        (
            "emo_serve.server.pool_admin.api",
            "from emo_serve.server.vllm_adapter.coverage import CoverageBook",
        ),
        ("emo_serve.demo", "from emo_serve.demo.training.corpus import build_corpus"),
        ("emo_kernels.routing", "from emo_serve.errors import ConfigError"),
        ("emo_kernels.routing", "import transformers"),
    ],
)
def test_a_forbidden_arrow_is_reported(module: str, source: str) -> None:
    assert len(find_violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("emo_serve.residency.slots", "from emo_serve.pools.pool import ExpertPool"),
        ("emo_serve.residency.manager", "from emo_serve.residency.slots import SlotTable"),
        ("emo_serve.server.vllm_adapter.openai", "from vllm.v1.engine.async_llm import AsyncLLM"),
        (
            "emo_serve.server.vllm_adapter.flags",
            "from emo_serve.vllm_plugin import worker_cls_for",
        ),
        ("emo_serve.server.serve", "from emo_serve.vllm_plugin.contract import LOAD_FORMAT"),
        ("emo_serve.cli.pools", "print('math')"),
        ("emo_serve.cli.pool_files", "print('math')"),
        ("emo_serve.cli.main", "def run():\n    from emo_serve.server.serve import create_app"),
        ("emo_kernels.routing", "import torch\nimport triton.language as tl"),
    ],
)
def test_an_allowed_arrow_is_not_reported(module: str, source: str) -> None:
    assert find_violations(module, source) == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("emo_serve", ("torch", "transformers", "vllm", "numpy")),
        ("emo_serve.errors", ("torch", "transformers", "vllm", "numpy")),
        ("emo_serve.residency.manager", ("torch", "transformers", "vllm")),
        ("emo_serve.vllm_plugin", ("torch", "transformers", "vllm")),
        ("emo_serve.vllm_plugin.contract", ("torch", "transformers", "vllm", "numpy")),
        ("emo_serve.cli.main", ("torch", "transformers", "vllm")),
    ],
)
def test_importing_stays_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"
