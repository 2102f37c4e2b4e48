"""The pools of a running server as text. Input is the JSON of /v1/pools.

The server's strings are shown as they are, except for terminal control characters.
"""

from __future__ import annotations

from typing import Any

from emo_serve.cli.rendering.tables import columns, facts, grid, printable, size_range

__all__ = ["describe_card", "slab_map", "slots_line", "status_line", "status_table"]

_HELD = ("resident", "closing")
_MANY = 10  # counts from here on share one mark


def status_table(answer: dict[str, Any]) -> str:
    """Lay out one pool per row, then slots and requests."""
    header = ["POOL", "STATE", "PINNED", "RUNNING", "WAITING", "EXPERTS/LAYER", "MIB"]
    header += ["ALONE", "SHARED", "MISSING", "VERSION"]
    rows = [header, *map(_row, answer["data"])]
    lines = [
        columns(rows),
        "",
        f"slots     {slots_line(answer['slots'])}",
        f"requests  {answer['running_requests']} running, {answer['waiting_requests']} waiting",
    ]
    if not answer["persists"]:
        lines.append("pools added or removed now last until the server stops")
    return "\n".join(lines)


def status_line(card: dict[str, Any]) -> str:
    """Describe the state of a pool in one line."""
    parts = [card["state"], *(["pinned"] if card["pinned"] else [])]
    parts += [f"{_per_layer(card)} experts per layer", f"{_mib(card['bytes'])} MiB"]
    parts += [f"{card[f'experts_{how}']} {how}" for how in ("alone", "shared", "missing")]
    return f"{printable(card['name'])}: {', '.join(parts)}"


def slots_line(slots: dict[str, Any]) -> str:
    """Say in one line how many of the slab's slots are used."""
    total_bytes = slots["total"] * slots["bytes_per_slot"]
    return (
        f"{slots['used']} of {slots['total']} used"
        f" ({_mib(slots['used_bytes'])} of {_mib(total_bytes)} MiB),"
        f" {slots['free']} free, {slots['leased']} held by running requests"
    )


def slab_map(answer: dict[str, Any]) -> str:
    """Draw how many resident pools hold each expert: `.` none, 1 to 9, `+` more."""
    legend = "experts across: . not resident, 1-9 resident pools that hold it, + more than 9"
    holders: list[list[int]] = answer["holders"]
    rows = ["".join(_count(count) if count else "." for count in layer) for layer in holders]
    return f"{legend}\n{grid(rows)}"


def describe_card(card: dict[str, Any]) -> str:
    """Describe one pool, with a map of how many resident pools hold each of its experts."""
    total = sum(card["experts_per_layer"])
    used = f"{card['running_requests']} running, {card['waiting_requests']} waiting"
    stored = "survives a restart" if card["persisted"] else "until the server stops"
    version = None if card["version"] is None else f"{card['version']}, {stored}"
    held = ", ".join(f"{card[f'experts_{how}']} {how}" for how in ("alone", "shared", "missing"))
    described = facts(
        {
            "pool": printable(card["name"]) + (" (default)" if card["default"] else ""),
            "description": printable(card["description"]),
            "state": card["state"] + (", pinned" if card["pinned"] else ""),
            "requests": used,
            "experts": f"{_per_layer(card)} per layer, {total} in all, {_mib(card['bytes'])} MiB",
            "sizes": _sizes(card),
            "held": held,
            "temperature": f"{card['router_temperature']:g}",
            "version": version,
            "hash": card["content_hash"],
        }
    )
    legend = (
        "experts across: # held only for this pool, 2-9 resident pools that hold it, + more than 9"
        if card["state"] in _HELD
        else "experts across: o not resident, 1-9 resident pools that hold it, + more than 9"
    )
    return "\n".join([described, "", legend, grid(_marks(card))])


def _row(card: dict[str, Any]) -> list[str]:
    return [
        printable(card["name"]) + (" (default)" if card["default"] else ""),
        card["state"],
        "yes" if card["pinned"] else "-",
        str(card["running_requests"]),
        str(card["waiting_requests"]),
        _per_layer(card),
        _mib(card["bytes"]),
        *(str(card[f"experts_{how}"]) for how in ("alone", "shared", "missing")),
        "-" if card["version"] is None else str(card["version"]),
    ]


def _marks(card: dict[str, Any]) -> list[str]:
    """Return one string per layer, `.` for an expert the pool does not have."""
    is_held = card["state"] in _HELD
    rows: list[str] = []
    for ids, counts in zip(card["experts"], card["holders"], strict=True):
        marks = ["."] * len(counts)
        for expert in ids:
            count = counts[expert]
            marks[expert] = "o" if not count else "#" if is_held and count == 1 else _count(count)
        rows.append("".join(marks))
    return rows


def _count(count: int) -> str:
    return str(count) if count < _MANY else "+"


def _per_layer(card: dict[str, Any]) -> str:
    return size_range([count for count in card["experts_per_layer"] if count])


def _sizes(card: dict[str, Any]) -> str | None:
    if card["sizes"] is None:
        return None
    least, most = card["sizes"]["least"], card["sizes"]["most"]
    return f"{least} to {most} per layer, as {printable(card['name'])}@{least}"


def _mib(num_bytes: int) -> str:
    mib = num_bytes / 2**20
    return f"{mib:.3g}" if mib < 100 else f"{mib:.0f}"
