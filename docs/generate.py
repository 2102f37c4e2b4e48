"""Write the tables of these pages that come from the code: flags, metrics, HTTP API, imports.

A page holds markers, `<!-- generated: NAME -->` and `<!-- end -->`; what stands between them is
replaced and the text around them is left alone. The results are committed, so that they can be read
without building the site, and a test fails when one is stale.

    python -m docs.generate
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from fastapi import APIRouter
from prometheus_client import CollectorRegistry

from docs.openapi import render_openapi
from emo_serve.config import add_serve_flags
from emo_serve.metrics import MetricsSnapshot, PoolMetrics, PoolSnapshot, register_gauges
from emo_serve.server.access import create_access_router
from emo_serve.server.asgi.errors import REFUSAL_REASONS
from emo_serve.server.pool_admin.api import create_router
from emo_serve.server.pool_admin.live import create_live_router
from emo_serve.server.pool_admin.service import PoolService
from emo_serve.server.routes import document_of

__all__ = ["DOCS", "PARTS", "main", "render_page"]

DOCS = Path(__file__).resolve().parent
_MARKED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite every page whose generated part is stale."""
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        fresh = render_page(text)
        if fresh != text:
            path.write_text(fresh)
            print(f"{path.relative_to(DOCS.parent)}: updated")


def render_page(text: str) -> str:
    """Return a page with every generated part as the code now has it."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}"

    return _MARKED.sub(fill, text)


# -- flags --


def render_flags() -> str:
    """Return a table of the flags that `add_serve_flags` adds."""
    parser = argparse.ArgumentParser(add_help=False)
    add_serve_flags(parser)
    return _table(("flag", "meaning", "default"), map(_flag_row, parser._actions))


def _flag_row(action: argparse.Action) -> tuple[str, str, str]:
    (flag,) = action.option_strings
    text = (action.help or "") % {"default": action.default, "prog": "emo-serve serve"}
    told = re.search(r"\s*\(default: (.*)\)$", text)
    meaning = _code(text[: told.start()] if told else text)
    metavar = str(action.metavar or "")
    if "|" in metavar:
        choices = ", ".join(f"`{choice}`" for choice in metavar.split("|"))
        return f"`{flag}`", f"{meaning}; one of {choices}", _default(action, told)
    return f"`{flag} {metavar}`".replace(" `", "`"), meaning, _default(action, told)


def _default(action: argparse.Action, told: re.Match[str] | None) -> str:
    if action.default:
        return f"`{action.default}`"
    return _code(told[1]) if told else "not set"


# -- metrics --


def render_metrics() -> str:
    """Return a table of the metrics that PoolMetrics registers."""
    pool = PoolSnapshot("math", True, True, 1, 1)
    registry = CollectorRegistry()
    PoolMetrics(registry, ["math"], REFUSAL_REASONS)
    register_gauges(registry, lambda: MetricsSnapshot((pool,), 1, 1, 0, 1, 1), lambda: 1.0)
    return _table(("metric", "type", "meaning", "labels"), map(_metric_row, registry.collect()))


def _metric_row(family: Any) -> tuple[str, str, str, str]:
    name = family.name + ("_total" if family.type == "counter" else "")
    values: dict[str, dict[str, None]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le":
                values.setdefault(label, {})[value] = None
    labels = "; ".join(
        f"`{label}`" if label == "pool" else f"`{label}`: {', '.join(known)}"
        for label, known in values.items()
    )
    return f"`{name}`", family.type, family.documentation, labels


# -- HTTP API --


def render_http_api() -> str:
    """Return our routes and their objects, from their OpenAPI document."""
    # The routes only hold the service; none is called here.
    nothing = cast(Any, object())
    router = APIRouter()
    router.include_router(create_router(cast(PoolService, nothing), lambda error: error))
    router.include_router(create_live_router(nothing, nothing, lambda error: error))
    router.include_router(create_access_router())
    return render_openapi(document_of(router))


# -- imports --


def render_arrows() -> str:
    """Return the table of allowed imports that the layering test enforces."""
    arrows = tomllib.loads((DOCS / "arrows.toml").read_text())["arrows"]
    rows = (
        (f"`{part}`", ", ".join(f"`{target.removeprefix('emo_serve.')}`" for target in targets))
        for part, targets in arrows.items()
    )
    return _table(("module or package", "may import, of this project"), rows)


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _code(text: str) -> str:
    """Set flags in code, where a help text has them bare."""
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]+)(?!`)", r"`\1`", text)


PARTS: dict[str, Callable[[], str]] = {
    "flags": render_flags,
    "metrics": render_metrics,
    "http-api": render_http_api,
    "arrows": render_arrows,
}

if __name__ == "__main__":
    main()
