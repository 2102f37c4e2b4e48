"""The console against a real server of the shipped model, in Chromium where there is one."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import httpx
import pytest

from tests.engine.server.conftest import API, hold_only
from tests.support.server_process import RunningServer

pytestmark = [pytest.mark.vllm, pytest.mark.server("shipped")]

CHROMIUM = shutil.which("chromium")


def test_the_page_needs_no_key_and_its_data_does(server: RunningServer) -> None:
    with server.http(key="") as http:
        assert http.get("/", headers={"accept": "text/html"}).headers["location"] == "/console"
        assert "console" in http.get("/").json()["links"]
        assert http.get("/console").text.startswith("<!doctype html>")
        assert http.get("/console/main.js").is_success
        for path in ("/v1/pools", "/v1/residency", "/v1/residency/events", "/v1/access"):
            assert http.get(path).status_code == 401, path


def test_the_stream_tells_what_is_in_every_slot(server: RunningServer, http: httpx.Client) -> None:
    hold_only(http, "python")
    access = http.get("/v1/access").json()
    assert (access["key"], access["changes_pools"]) == ("api", True)  # on this machine
    found: dict[str, Any] = {}
    with http.stream("GET", "/v1/residency/events") as stream:
        lines = stream.iter_lines()
        while set(found) < {"slots", "pools"}:
            event = next(line for line in lines if line.startswith("event: "))
            found[event.removeprefix("event: ")] = json.loads(next(lines).removeprefix("data: "))
    assert found["slots"] == http.get("/v1/residency").json()
    assert [pool["name"] for pool in found["slots"]["pools"]] == ["python"]
    experts = http.get("/v1/pools/python").json()["experts"]
    for layer, ids in zip(found["slots"]["layers"], experts, strict=True):
        held = [expert for expert in layer["experts"] if expert is not None]
        assert sorted(held) == ids
        assert all(
            holders == ([] if expert is None else [0])
            for expert, holders in zip(layer["experts"], layer["holders"], strict=True)
        )
    (card,) = (card for card in found["pools"]["data"] if card["name"] == "python")
    assert card["state"] == "resident"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_an_operator_uses_it(server: RunningServer, http: httpx.Client) -> None:
    """Load, look, ask: a real engine is behind the page, and nothing goes wrong in it."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs the extra `dev`")
    hold_only(http, "python")
    faults: list[str] = []
    with sync.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        sync.expect.set_options(timeout=120_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: (
                faults.append(message.text)
                if message.type == "error" and "status of 401" not in message.text
                else None
            ),
        )
        page.goto(server.url + "/")
        page.get_by_label("API key or admin key").fill(API)
        page.keyboard.press("Enter")
        row = page.locator('tr[data-pool="math"]')
        row.get_by_role("button", name="Load math").click()
        sync.expect(row.locator(".state")).to_have_text("resident")
        sync.expect(page.locator('tr[data-pool="python"] .state')).to_have_text("absent")
        page.get_by_role("link", name="Playground").click()
        page.get_by_role("button", name="Answer").click()
        answers = page.get_by_role("article")
        for place in range(2):
            answer = answers.nth(place)
            sync.expect(answer.locator(".state")).to_have_text("done")
            assert answer.locator(".text").inner_text().strip()
            assert "%" in answer.locator("dl").inner_text()
        sync.expect(page.get_by_text(re.compile(r"For this prompt: [a-z]+\."))).to_be_visible()
        page.get_by_role("link", name="Traffic").click()
        row = page.locator("tbody tr:visible").filter(has_text="math")
        sync.expect(row).to_be_visible()
        browser.close()
    assert faults == []
