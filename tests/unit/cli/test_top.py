"""`emo-serve pools top`: what the table shows, and how it follows a server."""

from __future__ import annotations

import io
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from emo_serve.cli import top
from emo_serve.cli.client import PoolServer
from emo_serve.cli.rendering.live_table import live_table
from emo_serve.errors import Unavailable
from tests.unit.cli.test_pools_of_server import API, Cli, Served, cli_of


def card(name: str, state: str = "absent", running: int = 0, **more: Any) -> dict[str, Any]:
    plain = {"waiting_requests": 0, "experts_per_layer": [0, 8, 9], "bytes": 2**21, "hits": 0}
    plain |= {"misses": 0, "coverage": None, "last_used": None, "pinned": False, "default": False}
    return {"name": name, "state": state, "running_requests": running, **plain, **more}


def drawn(*cards: dict[str, Any], height: int = 40, **more: Any) -> list[str]:
    slots = {"total": 60, "used": 30, "leased": 5, "used_bytes": 2**29}
    answer = {"data": list(cards), "slots": slots, "running_requests": 3, "waiting_requests": 1}
    console = Console(file=io.StringIO(), width=120, record=True)
    answer |= {"building": None, **more}
    console.print(live_table(answer, "http://emo", height, now=1000.0))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_slots_requests_and_pools_the_busiest_first() -> None:
    lines = drawn(
        card("idle"),
        card("hot", "resident", 3, pinned=True, hits=7, misses=2, coverage=0.514, last_used=940),
        card("old", "resident", last_used=1000 - 7300),
    )
    assert lines[1].startswith(f"slots     [{'#' * 15}{'.' * 15}] 30 of 60, 5 held by")
    assert lines[2] == "requests  3 running, 1 waiting"
    assert [line.split()[0] for line in lines[4:]] == ["POOL", "hot", "old", "idle"]
    assert lines[5].split() == ["hot", "resident,", "pinned", "3", "8-9", "2", "7", "2", "0.51"] + [
        "1",
        "m",
        "ago",
    ]
    assert lines[6].endswith("2 h ago")
    assert lines[7].split() == ["idle", "absent", "8-9", "2", "0", "0", "-", "-"]


def test_a_pool_in_building_and_pools_that_do_not_fit_are_told() -> None:
    building = {"name": "law", "done": 30, "total": 120}
    lines = drawn(*(card(f"p{number:03}") for number in range(200)), height=12, building=building)
    assert lines[3] == "building  law, 25%"
    assert lines[-1] == "and 195 more"
    assert len(lines) <= 12


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in "\n".join(drawn(card("a\x1b[31mb")))


def test_beside_a_terminal_the_table_is_printed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Served(tmp_path)) as served:
        cli: Cli = cli_of(served, monkeypatch, capsys, "top")
        status, out, err = cli()
    assert (status, err) == (0, "")
    names = [line.split()[0] for line in out.splitlines() if line]
    assert names[-5:] == ["POOL", "base", "code", "law", "math"]


def test_it_draws_what_the_stream_says_until_the_server_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = {"total": 60, "used": 30, "leased": 5, "used_bytes": 2**29}
    first = {"data": [card("math")], "slots": slots, "building": None}
    first |= {"running_requests": 0, "waiting_requests": 0}
    then = {**first, "data": [card("math", "loading")]}

    class Ending:
        url = "http://emo"

        def list_pools(self) -> dict[str, Any]:
            return first

        def follow(self) -> Any:
            return nullcontext(iter([("slots", {}), ("pools", then)]))

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, height=20)
    with pytest.raises(Unavailable, match="http://emo has ended its stream"):
        top._watch(Ending(), console)  # type: ignore[arg-type]
    assert "loading" in file.getvalue()


def test_follow_reads_the_server_sent_events(tmp_path: Path) -> None:
    content = b'event: slots\ndata: {"a": 1}\n\n: life\n\nevent: pools\ndata: {"b":\ndata: 2}\n\n'
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    with PoolServer("http://emo", API, transport=transport) as server, server.follow() as events:
        assert list(events) == [("slots", {"a": 1}), ("pools", {"b": 2})]
