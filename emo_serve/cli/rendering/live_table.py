"""A running server as a table that is drawn again and again. Input is the JSON of /v1/pools."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from emo_serve.cli.rendering.tables import printable, size_range

__all__ = ["live_table"]

_STATES = {
    "resident": "green",
    "streamed": "blue",
    "loading": "cyan",
    "waiting": "yellow",
    "closing": "magenta",
}
_ORDER = ("loading", "closing", "resident", "waiting", "streamed", "absent")
_COLUMNS = (
    ("POOL", "left"),
    ("STATE", "left"),
    ("RUNNING", "right"),
    ("WAITING", "right"),
    ("EXPERTS", "right"),
    ("MIB", "right"),
    ("HITS", "right"),
    ("MISSES", "right"),
    ("COVERAGE", "right"),
    ("LAST USED", "right"),
)
_FRAME_LINES = 6
_BAR = 30


def live_table(answer: dict[str, Any], url: str, height: int, now: float | None = None) -> Group:
    """Lay out what fits in `height` lines: slots, requests, then pools, the busiest first."""
    cards = sorted(answer["data"], key=_busyness)
    room = max(1, height - _FRAME_LINES)
    shown = cards if len(cards) <= room else cards[: room - 1]
    table = Table(box=None, pad_edge=False)
    for name, justify in _COLUMNS:
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    for card in shown:
        table.add_row(*_row(card, time.time() if now is None else now))
    parts: list[RenderableType] = [*_head(answer, url), Text(), table]
    if len(shown) < len(cards):
        parts.append(Text(f"and {len(cards) - len(shown)} more", style="dim"))
    return Group(*parts)


def _busyness(card: dict[str, Any]) -> tuple[Any, ...]:
    work = -card["running_requests"], -card["waiting_requests"]
    return (*work, _ORDER.index(card["state"]), -(card["last_used"] or 0), card["name"])


def _head(answer: dict[str, Any], url: str) -> list[Text]:
    slots = answer["slots"]
    full = round(_BAR * slots["used"] / slots["total"]) if slots["total"] else 0
    gib = slots["used_bytes"] / 2**30
    lines = [
        Text(f"{printable(url)}  {time.strftime('%H:%M:%S')}", style="bold"),
        Text(
            f"slots     [{'#' * full}{'.' * (_BAR - full)}] {slots['used']} of {slots['total']},"
            f" {slots['leased']} held by running requests, {gib:.3g} GiB"
        ),
        Text(
            f"requests  {answer['running_requests']} running, {answer['waiting_requests']} waiting"
        ),
    ]
    if (building := answer["building"]) is not None:
        share = building["done"] / building["total"] if building["total"] else 0
        lines.append(Text(f"building  {printable(building['name'])}, {share:.0%}", style="cyan"))
    return lines


def _row(card: dict[str, Any], now: float) -> list[Text]:
    state = card["state"] + (", pinned" if card["pinned"] else "")
    coverage, last_used = card["coverage"], card["last_used"]
    cells = [
        Text(printable(card["name"]) + (" (default)" if card["default"] else "")),
        Text(state, style=_STATES.get(card["state"], "dim")),
    ]
    plain = (
        card["running_requests"] or "",
        card["waiting_requests"] or "",
        size_range([count for count in card["experts_per_layer"] if count]),
        f"{card['bytes'] / 2**20:.3g}",
        card["hits"],
        card["misses"],
        "-" if coverage is None else f"{coverage:.2f}",
        "-" if last_used is None else _ago(now - last_used),
    )
    return cells + [Text(str(value)) for value in plain]


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
