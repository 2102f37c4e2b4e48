"""The console's page: who is sent there, what may run in it, and that its files are whole."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from emo_serve.server.console import routes
from emo_serve.server.console.routes import CONSOLE_PATHS, create_console_router

PAGE = Path(routes.__file__).parent / "page"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
FILES = sorted(path.name for path in PAGE.iterdir())


def client_of(root_path: str = "") -> httpx.AsyncClient:
    app = FastAPI(root_path=root_path)
    app.include_router(create_console_router())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("root", ["", "/emo"])
async def test_a_browser_is_sent_to_the_page(root: str) -> None:
    async with client_of(root) as client:
        answer = await client.get("/", headers={"accept": BROWSER})
    assert (answer.status_code, answer.headers["location"]) == (307, f"{root}/console")
    assert answer.headers["vary"] == "accept"


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
async def test_any_other_client_is_told_what_there_is(accept: str) -> None:
    async with client_of("/emo") as client:
        answer = await client.get("/", headers={"accept": accept})
    told = answer.json()
    assert answer.status_code == 200
    assert told["server"] == "emo-serve"
    assert told["links"]["pools"] == "/emo/v1/pools"
    assert told["links"]["console"] == "/emo/console"


async def test_the_page_and_all_its_files_are_served_and_nothing_else() -> None:
    async with client_of() as client:
        for path in CONSOLE_PATHS[1:]:
            answer = await client.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert "http" not in policy and "*" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("routes.py", "index.html", "..%2Froutes.py", "nope.js", "main.js%00"):
            assert (await client.get(f"/console/{path}")).status_code == 404, path
    assert set(CONSOLE_PATHS) == {
        "/",
        "/console",
        *(f"/console/{name}" for name in FILES if name != "index.html"),
    }


async def test_a_file_that_a_browser_has_is_not_sent_again() -> None:
    async with client_of() as client:
        first = await client.get("/console/main.js")
        again = await client.get(
            "/console/main.js", headers={"if-none-match": first.headers["etag"]}
        )
        other = await client.get("/console/main.js", headers={"if-none-match": '"older"'})
    assert (again.status_code, again.content) == (304, b"")
    assert other.content == first.content


# -- the files --


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_small_ascii_and_asks_nobody_else(name: str) -> None:
    text = (PAGE / name).read_bytes().decode("ascii")
    assert len(text.splitlines()) <= 500
    addresses = set(re.findall(r"\bhttps?://[^\s\"')]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, which nobody asks for


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_a_module_makes_no_markup_and_keeps_no_key(name: str) -> None:
    text = (PAGE / name).read_text()
    for word in (
        *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser"),
        *("eval(", "new Function", "localStorage", "sessionStorage", "indexedDB", "cookie"),
    ):
        assert word not in text, word


def test_the_page_names_files_that_are_there_and_has_no_code_of_its_own() -> None:
    html = (PAGE / "index.html").read_text()
    named = re.findall(r'(?:src|href)="console/([^"]+)"', html)
    assert len(named) >= 3 and set(named) <= set(FILES)
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son[a-z]+=", html)
    for name in FILES:
        if name.endswith(".js"):
            imported = re.findall(r'from "\./([^"]+)"', (PAGE / name).read_text())
            assert set(imported) <= set(FILES), name
