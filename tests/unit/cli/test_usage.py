"""`emo-serve pools usage` as a user types it, over HTTP to our route on a fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from emo_serve.vllm_plugin.contract import PoolUsage
from tests.support.pool_services import ServiceUnderTest
from tests.unit.cli.test_pools_of_server import API, Cli, Served, cli_of

# Of 1000 tokens in pool `law`, which has experts 3, 4, 5 and the shared one, 7.
COUNTS = ((), (0, 0, 0, 0, 500, 1, 0, 1000), (0, 0, 0, 1000, 1000, 250, 0, 1000))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    directory = tmp_path / "pools"
    directory.mkdir()
    with closing(Served(directory)) as served:
        served.usage["law"] = PoolUsage(1000, COUNTS)
        yield served


@pytest.fixture
def cli(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `usage` as a client; return status, stdout and stderr."""
    return cli_of(served, monkeypatch, capsys, "usage", key=("EMO_SERVE_API_KEY", API))


def test_it_is_a_table_a_map_and_the_least_taken(cli: Cli) -> None:
    status, out, err = cli("law")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[:2] == [
        "pool         law",
        "tokens       1000 routed since the engine started",
    ]
    start = next(i for i, line in enumerate(lines) if line.startswith("LAYER"))
    assert [line.split() for line in lines[start + 1 : start + 3]] == [
        *(["1", "4", "0.00", "%", "0.10", "%", "50.00", "%", "1", "2"],),
        *(["2", "4", "25.00", "%", "25.00", "%", "25.00", "%", "0", "4"],),
    ]
    assert lines[-10:-6] == [
        "         0",
        "layer 0  dense",
        "layer 1  ..._90.#",
        "layer 2  ...##9.#",
    ]
    assert [line.split() for line in lines[-5:]] == [
        ["LEAST", "TAKEN", "LAYER", "EXPERT"],
        ["0.00", "%", "1", "3"],
        ["0.10", "%", "1", "5"],
        ["25.00", "%", "2", "5"],
        ["50.00", "%", "1", "4"],
    ]


def test_experts_that_all_tokens_take_are_no_scale(served: Served, cli: Cli) -> None:
    counts = (*(0,) * 3, *(1000,) * 3, 0, 1000)
    served.usage["law"] = PoolUsage(1000, ((), counts, counts))
    status, out, _ = cli("law")
    assert (status, "layer 2  ...###.#" in out) == (0, True)
    assert out.splitlines()[-1] == "every token takes every expert of the pool"
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "4", "-", "-", "-", "0", "4"] in rows


def test_a_pool_nothing_was_routed_in(cli: Cli, tmp_path: Path) -> None:
    assert cli("math") == (
        0,
        "pool math: no token was routed in it since the engine started\n",
        "",
    )
    status, out, err = cli("math", "--png", str(tmp_path / "math.png"))
    assert (status, out, "nothing to draw" in err) == (2, "", True)


def test_png_is_drawn_or_refused(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    target = tmp_path / "law.png"
    status, out, _ = cli("law", "--png", str(target))
    assert (status, out.splitlines()[-1]) == (0, f"drew {target}")
    assert target.read_bytes().startswith(b"\x89PNG")
    status, _, err = cli("law", "--png", str(tmp_path))
    assert (status, f"--png {tmp_path} cannot be written" in err) == (2, True)


def test_an_unknown_pool_and_a_server_that_records_nothing(
    served: Served, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = cli("nope")
    assert (status, "the pools are: code, law, math" in err) == (2, True)
    served.do(lambda service: _forget_usage(service, monkeypatch))
    status, _, err = cli("law")
    assert (status, "does not record which experts its pools use" in err) == (1, True)


async def _forget_usage(service: ServiceUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.statuses, "_usage_of", None)
