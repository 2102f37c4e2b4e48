"""The view of one pool: its map, pools like it, other sizes, its file, and a build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.console_server import ConsoleServer

SCORES = [0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0, 0]
SCORED = {
    "format": "emo-pool/1",
    "name": "scored",
    "layers": [None, *[{"experts": [0, 1], "scores": SCORES}] * 2],
    "calibration": {"method": "router", "documents": 3, "tokens": 1000},
}


@pytest.fixture(scope="module")
def expect() -> Any:
    from playwright.sync_api import expect

    return expect


@pytest.fixture
def scored(server: ConsoleServer) -> ConsoleServer:
    """The server with a pool that has scores."""
    from emo_serve.pools.document import parse_pool

    server.wait(lambda: server.site.service.definitions.add(parse_pool("test", SCORED)))
    return server


def row_of(page: Any, name: str) -> Any:
    return page.locator("tbody tr:visible").filter(has=page.get_by_role("link", name=name))


def test_it_shows_experts_and_pools_like_it(
    scored: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(scored, "pool/scored")
    grid = page.locator(".grid:visible canvas")
    expect(grid).to_have_attribute("aria-label", "2 layers of experts, of which pool scored has 6")
    expect(page.get_by_text("chosen by 0 tokens")).to_be_visible()
    expect(page.get_by_text("router, 3 documents, 1,000 tokens")).to_be_visible()
    grid.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".readout:visible")).to_contain_text("Layer 1, expert 0: chosen 0 times")
    like = row_of(page, "math")
    expect(like.locator('[data-label="Alike"]')).to_have_text("100 %")
    expect(row_of(page, "code").locator('[data-label="Alike"]')).to_have_text("20 %")
    together = row_of(page, "law").locator('[data-label="Slots per layer together"]')
    expect(together).to_have_text("6")
    page.get_by_role("link", name="law").click()
    expect(page.get_by_label("Pool", exact=True)).to_have_value("law")
    expect(page.get_by_text("It cannot be cut: it has no scores")).to_be_visible()


def test_it_shows_usage_as_heat(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    counts = [None, *[{"num_experts": 8, "experts": [0, 1, 7], "counts": [30, 10, 0]}] * 2]
    usage = {"object": "pool.usage", "name": "math", "tokens": 1234, "layers": counts}
    page.route("**/v1/pools/math/usage", lambda route: route.fulfill(json=usage))
    page.goto(server.url + "/console#pool/math")
    expect(page.get_by_text("chosen by 1,234 tokens")).to_be_visible()
    page.locator(".grid:visible canvas").hover(position={"x": 34 + 5, "y": 16 + 5})
    expect(page.locator(".readout:visible")).to_have_text(
        "Layer 1, expert 0: chosen 30 times, 75.0 % of its layer's choices"
    )


def test_a_union_and_a_pool_that_is_not_there(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, "pool/math%2Bcode", statuses=(404,))
    grid = page.locator(".grid:visible canvas")
    words = "2 layers of experts, of which pool code+math has 10"
    expect(grid).to_have_attribute("aria-label", words)
    expect(page.get_by_role("button", name="Export as JSON")).to_be_disabled()
    page.goto(server.url + "/console#pool/nope")
    expect(page.get_by_text("The pool cannot be read:")).to_contain_text("nope")


def test_usage_that_is_not_recorded_is_said(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, statuses=(503,))
    error = {"error": {"message": "this server does not record it"}}
    page.route("**/v1/pools/math/usage", lambda route: route.fulfill(status=503, json=error))
    page.goto(server.url + "/console#pool/math")
    expect(page.get_by_text("is not known: this server does not record it")).to_be_visible()
    expect(page.locator(".grid:visible canvas")).to_be_visible()


def test_it_is_cut_to_another_size(
    scored: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(scored, "pool/scored", statuses=(409,))
    size = page.get_by_label("Experts per layer").first
    expect(page.get_by_text("3 experts: 70.0 % kept")).to_be_visible()
    size.fill("2")
    expect(page.get_by_text("2 experts: 40.0 % kept")).to_be_visible()
    define = page.get_by_role("button", name="Define this pool")
    define.click()
    expect(page.get_by_label("Pool", exact=True)).to_have_value("scored-k2")
    experts = scored.call(lambda: scored.site.service.lookup.find("scored-k2").expert_ids)
    assert experts == ((), (0, 7), (0, 7))
    page.get_by_label("Pool", exact=True).select_option("scored")
    expect(page.get_by_text("3 experts: 70.0 % kept")).to_be_visible()
    size.fill("2")
    expect(page.get_by_text("2 experts: 40.0 % kept")).to_be_visible()
    define.click()
    expect(page.get_by_text("Not defined: pool 'scored-k2' is defined already")).to_be_visible()


def test_it_is_exported_as_its_file(
    scored: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(scored, "pool/scored")
    button = page.get_by_role("button", name="Export as JSON")
    expect(page.get_by_text("router, 3 documents")).to_be_visible()
    with page.expect_download() as download:
        button.click()
    assert download.value.suggested_filename == "scored.json"
    kept = json.loads(Path(download.value.path()).read_text())
    assert kept["layers"][1] == {"experts": [0, 1, 7], "scores": SCORES}


def test_one_is_built_from_texts_and_files(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any, tmp_path: Path
) -> None:
    page = open_page(server, "pool")
    sent: list[dict[str, Any]] = []
    found = {"coverage": 0.5, "tokens": 12, "documents": 4, "seconds": 1.25}
    notes = ["too little text: <b>12</b> tokens"]

    def build(route: Any) -> None:
        if route.request.method != "POST":
            route.continue_()
            return
        sent.append(route.request.post_data_json)
        route.fulfill(status=201, json={"name": "law", "calibration": found, "notes": notes})

    page.route("**/v1/pools", build)
    page.get_by_label("Name", exact=True).last.fill("poems")
    page.get_by_label("A text of the domain").fill("a rose is a rose")
    lines = ['"one"', '{"text": "two"}', '{"messages": [{"role": "user", "content": "three"}]}', ""]
    page.get_by_label("and files").set_input_files(
        [
            {"name": "a.jsonl", "mimeType": "", "buffer": "\n".join(lines).encode()},
            {"name": "bad.jsonl", "mimeType": "", "buffer": b"[]\n"},
        ]
    )
    expect(page.get_by_text("bad.jsonl, line 1 is neither a string")).to_be_visible()
    expect(page.get_by_text("a.jsonl: 3 documents")).to_be_visible()
    page.get_by_role("button", name="Build", exact=True).click()
    expect(page.get_by_text("law is defined: 50.0 % coverage on 12 tokens")).to_be_visible()
    expect(page.get_by_text(notes[0])).to_be_visible()
    (body,) = sent
    assert (body["name"], len(body["examples"]), body["examples"][3]) == (
        "poems",
        4,
        "a rose is a rose",
    )
    expect(page.get_by_label("Pool", exact=True)).to_have_value("law")


def test_a_build_under_way_is_seen_by_everybody(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    from emo_serve.server.pool_admin.status import BuildProgress

    page = open_page(server, "pool")
    note_build = server.site.service.statuses.note_build
    server.call(lambda: note_build(BuildProgress("poems", 3, 12)))
    expect(page.get_by_text("poems: 25 % of the examples' passes")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_be_visible()
    server.call(lambda: note_build(None))
    expect(page.get_by_role("progressbar")).to_be_hidden()


def test_a_build_that_the_server_refuses_says_why(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, "pool", statuses=(503,))
    page.get_by_label("Name", exact=True).last.fill("poems")
    page.get_by_role("button", name="Build", exact=True).click()
    expect(page.get_by_text("Give a text, or a file.")).to_be_visible()
    page.get_by_label("A text of the domain").fill("a rose")
    page.get_by_role("button", name="Build", exact=True).click()
    expect(page.get_by_text("Not built: this server does not build pools")).to_be_visible()
