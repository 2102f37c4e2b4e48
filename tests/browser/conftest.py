"""What the browser's tests share: Chromium, one server, and a page that must not go wrong.

The server is vLLM's app with our layers around a scripted engine, whose `generate` says "ab". The
browser is Debian's Chromium, driven by Playwright; without either, these tests are skipped, and
.ci/run sees to both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emo_serve.pools.pool import ExpertPool
from emo_serve.vllm_plugin.contract import PoolUsage
from tests.support.console_server import ConsoleServer, console_server
from tests.support.golden.checkpoints import write_checkpoint
from tests.support.pool_services import EXPERTS_PER_LAYER, POOLS, pool, service_of

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `dev`")
CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
MARKUP = "<img src=x onerror=alert(1)> & <b>bold</b>"
MANY = 200
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a browser where there is none."""
    if CHROMIUM is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs Chromium: apt-get install chromium"))


async def nothing_used(pool: ExpertPool) -> PoolUsage:
    """Return what a server has recorded of a pool that no request has used."""
    return PoolUsage(tokens=0, counts=tuple((0,) * count for count in EXPERTS_PER_LAYER))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("model") / "shared1")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Playwright's loop runs in this thread while it is open: no test of asyncio could."""
    # The server's stream rests for 200 times what a snapshot took: seconds on a busy machine.
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def server(checkpoint: Path) -> Iterator[ConsoleServer]:
    """A server with four pools; the description of `law` is markup."""
    pools = [replace(one, description=MARKUP) if one.name == "law" else one for one in POOLS]
    with console_server(
        checkpoint, lambda: service_of(pools=pools, usage_of=nothing_used)
    ) as running:
        yield running


@pytest.fixture
def guarded(checkpoint: Path) -> Iterator[ConsoleServer]:
    """A server that has keys: "Clients1" for clients and "Operators1" for operators."""
    keys = (("Clients1",), ("Operators1",))
    with console_server(checkpoint, service_of, keys) as running:
        yield running


@pytest.fixture
def crowded(checkpoint: Path) -> Iterator[ConsoleServer]:
    """A server with very many pools."""
    pools = [pool(f"pool-{number:03}", number % 7) for number in range(MANY)]
    with console_server(checkpoint, lambda: service_of(pools=pools)) as running:
        yield running


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open the page of a server; at the end of the test nothing may have gone wrong in it.

    That is: no error in the console, no exception, no request to another origin. A test that makes
    the server refuse something names the `statuses` that Chromium will complain about.
    """
    opened: list[tuple[Any, list[str]]] = []

    def open_page(
        server: ConsoleServer,
        view: str = "",
        *,
        size: str = "wide",
        theme: str = "light",
        statuses: tuple[int, ...] = (),
        **options: Any,
    ) -> Any:
        width, height = SIZES[size]
        viewport = {"width": width, "height": height}
        context = chromium.new_context(viewport=viewport, color_scheme=theme, **options)
        page, faults = context.new_page(), list[str]()
        page.set_default_timeout(60_000)
        expected = tuple(f"status of {status} " for status in statuses)

        def note(message: Any) -> None:
            is_expected = any(words in message.text for words in expected)
            if message.type in ("error", "warning") and not is_expected:
                faults.append(f"console: {message.text}")

        def check(request: Any) -> None:
            if not request.url.startswith(server.url + "/"):
                faults.append(f"asked for {request.url}")

        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
        page.on("request", check)
        page.goto(f"{server.url}/console{view and '#' + view}")
        opened.append((context, faults))
        return page

    yield open_page
    for context, faults in opened:
        context.close()
        assert faults == []
