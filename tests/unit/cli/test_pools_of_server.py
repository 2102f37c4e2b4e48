"""`emo-serve pools --server URL` as a user types it, over HTTP to our routes on a fake engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException
from starlette.requests import Request
from starlette.responses import Response

from emo_serve.cli.connection import KEY_VARIABLES
from emo_serve.errors import EmoServeError
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.asgi.errors import error_response, status_of
from emo_serve.server.asgi.keys import KeyGuard
from emo_serve.server.pool_admin.api import create_router
from emo_serve.vllm_plugin.contract import PoolUsage
from tests.support.fake_engine import FakeEngine
from tests.support.pool_services import (
    EXPERTS_PER_LAYER,
    MOE_LAYERS,
    ServiceUnderTest,
    service_of,
    service_over,
)
from tests.unit.cli.test_pools import run

API, ADMIN = "Clients1", "Operators1"


def a_pool(name: str, *experts: int) -> ExpertPool:
    layer = LayerExperts(experts)
    return ExpertPool(name, (None, layer, layer), description=f"about {name}")


class Served:
    """Our routes behind the key guard on a port of this machine, in a thread with its own loop."""

    def __init__(self, directory: Path) -> None:
        for pool in (a_pool("math", 0, 1), a_pool("code", 1, 2), a_pool("law", 3, 4, 5)):
            write_pool(pool, directory / f"{pool.name}.json")
        (directory / "broken.json").write_text("{")
        self.directory = directory
        self.engine = FakeEngine()
        self.usage: dict[str, PoolUsage] = {}  # by pool; none of the others
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()
        while not self.url:
            assert self._thread.is_alive()
            time.sleep(0.01)  # another thread; nothing here can be awaited

    def _router(self) -> APIRouter:
        """Return the routes, with `service` behind them."""
        catalog = PoolCatalog.read(self.directory, MOE_LAYERS, persists=True)
        base = service_of(self.engine)
        self.service = service_over(
            base.lookup.names, base.lookup.base_pool, catalog, base.manager, usage_of=self._usage_of
        )
        return create_router(self.service, to_http_error)

    async def _serve(self) -> None:
        app = FastAPI()
        app.include_router(self._router())
        app.add_exception_handler(HTTPException, _answer_error)
        guard = KeyGuard(app, [API], [ADMIN], [], is_local=True)
        config = uvicorn.Config(guard, port=0, log_config=None, lifespan="off")  # type: ignore[arg-type]
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server._serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        await serving

    async def _usage_of(self, pool: ExpertPool) -> PoolUsage:
        zeros = tuple((0,) * count for count in EXPERTS_PER_LAYER)
        return self.usage.get(pool.name, PoolUsage(0, zeros))

    def do(self, make: Callable[[ServiceUnderTest], Coroutine[Any, Any, Any]]) -> Any:
        """Run something on the server's own loop."""
        return asyncio.run_coroutine_threadsafe(make(self.service), self._loop).result(10)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._loop.close()


def to_http_error(error: EmoServeError) -> Exception:
    return HTTPException(status_of(error), str(error))


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(request.scope, HTTPStatus(error.status_code), error.detail)


Cli = Callable[..., tuple[int, str, str]]


def cli_of(
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *command: str,
    key: tuple[str, str] = ("EMO_SERVE_ADMIN_API_KEY", ADMIN),
) -> Cli:
    """Return what runs a command against the server, as its operator unless told otherwise.

    It returns status, stdout and stderr. `key` is a variable and what it holds.
    """
    for variable in KEY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(*key)

    def run_command(*arguments: object) -> tuple[int, str, str]:
        status = run(*command, *map(str, arguments), "--server", served.url)
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    directory = tmp_path / "pools"
    directory.mkdir()
    with closing(Served(directory)) as served:
        yield served


@pytest.fixture
def cli(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return cli_of(served, monkeypatch, capsys)


def test_list_is_a_table_and_an_account_of_slots(served: Served, cli: Cli) -> None:
    served.do(lambda service: service.residency.load("math"))
    served.do(lambda service: service.residency.load("code", pin=True))
    status, out, err = cli("list")
    lines = out.splitlines()
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith(f"emo-serve: refused {served.directory}/broken.json: is not UTF-8 JSON")
    assert lines[0].split() == [
        *("POOL", "STATE", "PINNED", "RUNNING", "WAITING", "EXPERTS/LAYER"),
        *("MIB", "ALONE", "SHARED", "MISSING", "VERSION"),
    ]
    rows = [line.split() for line in lines[1:5]]
    assert rows == [
        ["base", "(default)", "absent", "-", "0", "0", "8", "0.000977", "0", "8", "8", "1"],
        ["code", "resident", "yes", "0", "0", "3", "0.000366", "2", "4", "0", "1"],
        ["law", "absent", "-", "0", "0", "4", "0.000488", "0", "2", "6", "1"],
        ["math", "resident", "-", "0", "0", "3", "0.000366", "2", "4", "0", "1"],
    ]
    assert all(line.startswith(row[0]) for line, row in zip(lines[1:5], rows, strict=True))
    assert lines[0].index("VERSION") == lines[2].rindex("1")
    assert lines[6].startswith("slots     8 of 16 used (0.000488 of 0.000977 MiB), 8 free, 0 held")
    assert lines[7] == "requests  0 running, 0 waiting"


def test_the_map_shows_which_experts_are_resident_and_shared(served: Served, cli: Cli) -> None:
    for name in ("math", "code"):
        served.do(lambda service, name=name: service.residency.load(name))
    status, out, _ = cli("list", "--map")
    assert status == 0
    assert out.splitlines()[-5:] == [
        "experts across: . not resident, 1-9 resident pools that hold it, + more than 9",
        "         0",
        "layer 0  dense",
        "layer 1  121....2",
        "layer 2  121....2",
    ]


def test_show_draws_whom_a_pool_shares_with(served: Served, cli: Cli) -> None:
    for name in ("math", "code"):
        served.do(lambda service, name=name: service.residency.load(name))
    _, out, _ = cli("show", "math")
    assert out.splitlines()[-2:] == ["layer 1  #2.....2", "layer 2  #2.....2"]
    assert "state        resident" in out
    assert "held         2 alone, 4 shared, 0 missing" in out
    assert "version      1, survives a restart" in out
    assert "description  about math" in out
    _, out, _ = cli("show", "law")
    assert out.splitlines()[-2:] == ["layer 1  ...ooo.2", "layer 2  ...ooo.2"]
    _, out, _ = cli("show", "law+math")
    assert out.splitlines()[-1] == "layer 2  12.ooo.2"
    assert "version" not in out


def test_load_pin_unpin_evict(cli: Cli) -> None:
    line = "3 experts per layer, 0.000366 MiB, 6 alone, 0 shared, 0 missing\n"
    assert cli("load", "math") == (0, f"math: resident, {line}", "")
    assert cli("load", "math", "--pin") == (0, f"math: resident, pinned, {line}", "")
    status, out, err = cli("evict", "math")
    assert (status, out) == (2, "")
    assert err == "emo-serve: pool 'math' is pinned; unpin it first\n"
    assert cli("unpin", "math")[1] == f"math: resident, {line}"
    assert cli("pin", "math")[0] == cli("unpin", "math")[0] == 0
    assert cli("evict", "math", "--drain")[1].startswith("math: absent, 3 experts per layer")
    assert cli("load", "math+code")[1].startswith("code+math: resident, 4 experts per layer")


def test_evict_all_names_what_stays(cli: Cli) -> None:
    cli("load", "code")
    cli("load", "math", "--pin")
    status, out, _ = cli("evict", "--all", "--drain")
    left, slots = out.splitlines()
    assert status == 0 and left.startswith("math: resident, pinned, 3 experts per layer")
    assert slots.startswith("6 of ") and slots.endswith("free, 0 held by running requests")
    cli("unpin", "math")
    assert cli("evict", "--all")[1].startswith("0 of ")
    for neither in ((), ("math", "--all")):
        assert cli("evict", *neither) == (2, "", "emo-serve: give the NAME of one pool, or --all\n")


def test_a_size_is_named_like_a_pool(served: Served, cli: Cli, tmp_path: Path) -> None:
    layer = LayerExperts((0, 1, 2, 3), tuple(float(-expert) for expert in range(8)))
    write_pool(ExpertPool("sums", (None, layer, layer)), tmp_path / "sums.json")
    assert cli("add", tmp_path / "sums.json")[0] == 0
    _, out, _ = cli("show", "sums")
    assert "sizes        1 to 8 per layer, as sums@1" in out
    _, out, _ = cli("show", "sums@2")
    assert "state        absent" in out and "sizes" not in out
    assert "experts      2 per layer, 4 in all, 0.000244 MiB" in out
    assert out.splitlines()[-1] == "layer 2  o......o"
    assert cli("load", "sums@2")[1].startswith("sums@2: resident, 2 experts per layer")
    assert "\nsums@2 " in cli("list")[1]
    assert cli("usage", "sums@2")[1].startswith("pool sums@2: no token was routed")
    assert cli("evict", "sums@2")[1].startswith("sums@2: absent")
    status, _, err = cli("load", "sums@9")
    assert (status, "the sizes of pool 'sums' are 1 to 8" in err) == (2, True)


def test_add_and_remove_change_the_servers_directory(
    served: Served, cli: Cli, tmp_path: Path
) -> None:
    write_pool(a_pool("poems", 6), tmp_path / "mine.json")
    status, out, _ = cli("add", str(tmp_path / "mine.json"))
    assert (status, out.splitlines()[0]) == (0, "pool poems: version 1, stored")
    assert read_pool(served.directory / "poems.json") == a_pool("poems", 6)
    status, _, err = cli("add", str(tmp_path / "mine.json"))
    assert (status, "replace=true" in err) == (2, True)
    assert cli("add", str(tmp_path / "mine.json"), "--replace")[1].startswith(
        "pool poems: version 2"
    )
    assert cli("remove", "poems") == (0, "pool poems is removed\n", "")
    assert not (served.directory / "poems.json").exists()
    status, _, err = cli("remove", "base")
    assert (status, err.count("\n"), "cannot be removed" in err) == (2, 1, True)
    (tmp_path / "mine.json").write_text("{")
    status, _, err = cli("add", str(tmp_path / "mine.json"))
    assert (status, "is not UTF-8 JSON" in err) == (2, True)


@pytest.mark.parametrize(
    ("variable", "key", "remedy"),
    [
        (None, None, "set EMO_SERVE_API_KEY (EMO_SERVE_ADMIN_API_KEY to change pools)"),
        ("VLLM_API_KEY", "wrong", "set EMO_SERVE_API_KEY"),
        ("VLLM_API_KEY", API, "set EMO_SERVE_ADMIN_API_KEY, or give it by --api-key"),
        ("EMO_SERVE_API_KEY", API, "set EMO_SERVE_ADMIN_API_KEY, or give it by --api-key"),
    ],
)
def test_a_key_that_does_not_open_is_answered_with_the_variable_to_set(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    key: str | None,
    remedy: str,
) -> None:
    monkeypatch.delenv("EMO_SERVE_ADMIN_API_KEY")
    if variable is not None and key is not None:
        monkeypatch.setenv(variable, key)
    status, out, err = cli("load", "math")
    assert (status, out, remedy in err, err.count("\n")) == (2, "", True, 1)
    assert cli("list")[0] == (0 if key == API else 2)
    assert cli("load", "math", "--api-key", ADMIN)[0] == 0


def test_an_unknown_pool_is_answered_with_those_there_are(cli: Cli) -> None:
    for command in ("load", "show", "evict", "pin", "unpin", "remove"):
        status, out, err = cli(command, "nope")
        assert (status, out) == (2, "")
        assert "the pools are: code, law, math" in err


def test_a_load_that_takes_too_long_and_one_that_fails(served: Served, cli: Cli) -> None:
    served.engine.load_seconds = 0.5
    status, _, err = cli("load", "math", "--timeout", "0.1")
    assert (status, "within 0.1 s; a load or build that has begun continues" in err) == (1, True)
    served.engine.unreadable = {(1, 3)}
    status, _, err = cli("load", "law")
    assert (status, "expert 3 of layer 1 is unreadable" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list",), "give a directory of pool files, or --server URL"),
        (("list", "d", "--server", "x"), "DIR is for files and --server is not"),
        (("list", "--model", "m", "--server", "x"), "--model is for files"),
        (("show", "f", "--model", "m", "--server", "x"), "--model is for files"),
        (("list", "d", "--map"), "--map draws what is resident on a server"),
        (("load", "math", "--server", "x", "--timeout", "0"), "--timeout is 0"),
        (("load", "math", "--server", "ftp://x"), "--server is 'ftp://x'"),
    ],
)
def test_arguments_that_cannot_go_together(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_no_server_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("load", "math", "--server", "http://127.0.0.1:1") == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err
