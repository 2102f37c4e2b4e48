"""The replicas of a cluster as text. Input is the merged JSON of /v1/pools."""

from __future__ import annotations

from typing import Any

from emo_serve.cli.rendering.tables import columns, printable

__all__ = ["fleet_table"]


def fleet_table(answer: dict[str, Any]) -> str:
    """Lay out one replica per row, then the requests of all."""
    header = ["REPLICA", "RUNNING", "WAITING", "SLOTS", "PINNED", "RESIDENT"]
    rows = [header, *(_row(name, one) for name, one in sorted(answer["replicas"].items()))]
    total = f"{answer['running_requests']} running, {answer['waiting_requests']} waiting"
    return f"{columns(rows)}\n\nrequests  {total}"


def _row(name: str, replica: dict[str, Any]) -> list[str]:
    slots = replica["slots"]
    return [
        printable(name),
        str(replica["running_requests"]),
        str(replica["waiting_requests"]),
        f"{slots['used']}/{slots['total']}",
        printable(",".join(replica["pinned"])) or "-",
        printable(",".join(replica["resident"])) or "-",
    ]
