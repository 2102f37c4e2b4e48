"""Three servers that the tests of this directory share, one after the other.

A test uses the fixture `server`, and its marker or its module's says which server that is, for
example `server("tight")`; without a marker it is `whole`. pytest runs the tests of one server
together and stops the server after the last of them. A test that changes a server puts it back; a
test that ends one belongs in test_ends.py, which runs last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from emo_serve.pools.document import write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts
from tests.support.golden.checkpoints import pools_of, write_checkpoint
from tests.support.server_process import RunningServer, serve
from tests.support.trace_collector import TraceCollector, trace_collector

POOLS = ("math", "code", "law", "tiny")
API, ADMIN = "clients-Ke9", "operators-Wa4"
TIGHT_SLOTS = 24  # math and code take up to 20 per layer together, all three with law 27
MAX_WAITING = 16

# Greedy answers in float32 do not depend on what else is in the batch.
GOLDEN = ("--served-model-name", "emo", "--dtype", "float32", "--max-model-len", "512")

WHOLE = (
    *GOLDEN,
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # random weights like white space, which JSON allows without end
    *("--structured-outputs-config.backend", "xgrammar"),
    *("--structured-outputs-config.disable_any_whitespace", "true"),
    "--enable-prompt-tokens-details",
)
"""The golden checkpoint, compiled, with all experts held."""

TIGHT = (
    *GOLDEN,
    *("--expert-slots", str(TIGHT_SLOTS), "--host-expert-memory", "4MiB", "--max-pools", "6"),
    *("--default-pool", "math", "--preload", "math,code", "--auto-tokens", "32"),
    *("--load-deadline", "300", "--drain-timeout", "300", "--max-waiting", str(MAX_WAITING)),
    *("--api-key", API, "--admin-api-key", ADMIN),
    *("--block-size", "32", "--enforce-eager", "--router-temperatures", "0.5,2"),
)
"""The golden checkpoint with room for two of three pools, and keys; pools may be defined."""

SHIPPED = (
    *("--expert-slots", "9", "--preload", "python,math", "--default-pool", "python"),
    *("--api-key", API, "--drain-timeout", "300", "--enforce-eager"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
"""The shipped model: pools of 8 experts per layer, and room for 9."""


def document(name: str, content: str = "", **fields: Any) -> dict[str, Any]:
    """Return the document of a pool with the experts of a golden one."""
    layers = [{"experts": ids} for ids in pools_of("shared1")[content or name]]
    return {"format": "emo-pool/1", "name": name, "layers": layers, **fields}


def hold_only(http: httpx.Client, *pools: str) -> None:
    """Have exactly these pools resident, whatever other tests left in the slots."""
    for card in http.get("/v1/pools").json()["data"]:
        path = f"/v1/pools/{card['name']}/evict"
        http.post(path, json={"drain": True}).raise_for_status()
    for pool in pools:
        http.post(f"/v1/pools/{pool}/load").raise_for_status()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that end a server last; pytest then groups by server and keeps this order."""
    items.sort(key=lambda item: item.path.name == "test_ends.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test the server that its marker names."""
    if "server" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("server")
        name = marker.args[0] if marker else "whole"
        metafunc.parametrize("server", [name], indirect=True, scope="session")


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the golden values."""
    return write_checkpoint("shared1", tmp_path_factory.mktemp("model") / "shared1")


@pytest.fixture(scope="session")
def golden_pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pools of that checkpoint, and a file that fits no model."""
    directory = tmp_path_factory.mktemp("pools")
    for name in POOLS:
        layers = tuple(LayerExperts(tuple(ids)) for ids in pools_of("shared1")[name])
        write_pool(
            ExpertPool(name, layers, description=f"golden {name}"), directory / f"{name}.json"
        )
    (directory / "broken.json").write_text('{"format": "emo-pool/1", "name": "broken"}')
    return directory


@pytest.fixture(scope="session")
def tight_pools(golden_pools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the four pools for a server that stores pools of its own there."""
    directory = tmp_path_factory.mktemp("tight-pools") / "pools"
    ignore = shutil.ignore_patterns("broken.json")
    return Path(shutil.copytree(golden_pools, directory, ignore=ignore))


@pytest.fixture(scope="session")
def collector() -> Iterator[TraceCollector]:
    """Where the shipped server sends its spans."""
    with trace_collector() as running:
        yield running


@pytest.fixture(scope="session")
def server(
    request: pytest.FixtureRequest,
    collector: TraceCollector,
    golden_checkpoint: Path,
    golden_pools: Path,
    tight_pools: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """The server of the name that `pytest_generate_tests` gives."""
    flags = {
        "whole": (str(golden_checkpoint), "--pools", str(golden_pools), *WHOLE),
        "tight": (str(golden_checkpoint), "--pools", str(tight_pools), *TIGHT),
        "shipped": (*SHIPPED, "--otlp-traces-endpoint", collector.url),
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in collector.variables.items():
            patched.setenv(name, value)
        with serve(tmp_path_factory.mktemp(request.param), *flags[request.param]) as running:
            yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.fixture
def restored(server: RunningServer) -> Iterator[None]:
    """After the test, remove every pool the server did not start with, and unpin all."""
    yield
    with server.http() as http:
        for card in http.get("/v1/pools").json()["data"]:
            if card["pinned"]:
                http.post(f"/v1/pools/{card['name']}/unpin").raise_for_status()
            if card["kind"] == "pool" and card["name"] not in POOLS:
                http.delete(f"/v1/pools/{card['name']}").raise_for_status()
