"""The view of slots and pools: what it shows, live, and every button of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.browser.conftest import MANY, MARKUP
from tests.support.console_server import ConsoleServer


@pytest.fixture(scope="module")
def expect() -> Any:
    from playwright.sync_api import expect

    return expect


def held(server: ConsoleServer, name: str) -> tuple[Callable[[], Awaitable[None]], asyncio.Event]:
    """Return a coroutine that leases a pool until the event is set."""
    done = asyncio.Event()
    residency, lookup = server.site.service.residency, server.site.service.lookup

    async def hold() -> None:
        async with residency.lease(lookup.find(name)):
            await done.wait()

    async def start() -> None:
        server.task = asyncio.create_task(hold())  # type: ignore[attr-defined]

    return start, done


def row_of(page: Any, name: str) -> Any:
    return page.locator(f'tr[data-pool="{name}"]')


def test_every_button_does_what_it_says(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    row, said = row_of(page, "math"), page.locator(".result").first
    expect(row).to_contain_text("absent")
    for button, state, after in (
        ("Load", "resident", "Evict"),
        ("Pin", "resident, pinned", "Unpin"),
        ("Unpin", "resident", "Pin"),
        ("Evict", "absent", "Load"),
    ):
        row.get_by_role("button", name=f"{button} math").click()
        expect(said).to_have_text(f"math: {button.lower()} done.")
        expect(row.locator(".state")).to_have_text(state)
        expect(row.get_by_role("button", name=f"{after} math", exact=True)).to_be_enabled()
    row.get_by_role("button", name="Remove math").click()
    page.get_by_role("button", name="Cancel").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Remove math").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(row).to_have_count(0)
    expect(row_of(page, "base").get_by_role("button", name="Remove base")).to_be_disabled()


def test_what_fails_is_said(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, statuses=(404,))
    button = row_of(page, "math").get_by_role("button", name="Load math")
    expect(button).to_be_enabled()
    page.route("**/v1/pools/math/load", lambda route: route.fulfill(status=404, json=ERROR))
    button.click()
    expect(page.locator(".result").first).to_have_text("math: load failed: it is gone")


ERROR = {"error": {"message": "it is gone", "type": "NotFoundError", "param": None, "code": 404}}


def test_a_running_request_is_seen_and_can_be_drained(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    start, done = held(server, "math")
    server.wait(start)
    row = row_of(page, "math")
    expect(row.locator('[data-label="Running"]')).to_have_text("1")
    expect(row.locator('[data-label="Hits"]')).to_have_text("0 of 1")
    expect(row.locator('[data-label="Last used"]')).not_to_have_text("never")
    leased = page.locator(".legend li").filter(has_text="leased").locator(".count")
    expect(leased).to_have_text("6")
    row.get_by_role("button", name="Evict math").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("It has 1 request running.")
    dialog.get_by_role("button", name="Drain and evict").click()
    expect(row.locator(".state")).to_have_text("closing")
    server.call(done.set)
    expect(row.locator(".state")).to_have_text("absent")


def test_the_map_is_read_with_mouse_and_keyboard(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    server.wait(lambda: server.site.service.residency.load("math"))
    page = open_page(server)
    grid, readout = page.locator(".grid canvas").first, page.locator(".readout").first
    expect(grid).to_have_attribute(
        "aria-label",
        "2 layers of slots: 6 one pool needs it; 0 several"
        " pools need it; 0 leased: a running request uses it; 0 being loaded; 10 free",
    )
    grid.focus()
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text("Layer 1, slot 0: expert 0, needed by math")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text("Layer 2, slot 1: expert 1, needed by math")
    grid.hover(position={"x": 34 + 7 * 20 + 5, "y": 16 + 5})
    expect(readout).to_have_text("Layer 1, slot 7: free")
    page.get_by_label("Outline the slots of").select_option("math")


def test_markup_in_a_description_is_shown_as_text(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    expect(row_of(page, "law")).to_contain_text(MARKUP)
    assert page.locator("tr[data-pool=law] img, tr[data-pool=law] b").count() == 0


def test_a_union_in_use_is_a_row_and_can_be_evicted(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    start, done = held(server, "math+code")
    server.wait(start)
    row = row_of(page, "code+math")
    expect(row.locator('[data-label="Running"]')).to_have_text("1")
    server.call(done.set)
    expect(row.locator('[data-label="Running"]')).to_have_text("0")
    row.get_by_role("button", name="Pin code+math").click()
    expect(row.locator(".state")).to_have_text("resident, pinned")


def test_two_hundred_pools_can_be_filtered(
    crowded: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(crowded)
    rows = page.locator("tbody tr:visible")
    expect(rows).to_have_count(MANY + 1)
    page.get_by_label("Filter").fill("pool-19")
    expect(rows).to_have_count(10)
