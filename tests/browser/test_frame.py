"""The frame of the console: the way in, keys, themes, a server that goes away, accessibility."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.console_server import ConsoleServer

VIEWS = ("residency", "pool/math", "memory", "playground", "traffic")


@pytest.fixture(scope="module")
def expect() -> Any:
    from playwright.sync_api import expect

    return expect


def test_a_browser_that_asks_for_the_server_gets_the_console(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    page.goto(server.url + "/")
    expect(page).to_have_url(server.url + "/console")
    expect(page).to_have_title("Residency - emo-serve")
    expect(page.get_by_role("heading", name="Residency", level=1)).to_be_visible()
    expect(page.locator("#status")).to_have_text("Live")


def test_the_theme_follows_the_system_and_the_switch(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, theme="dark")
    root, switch = page.locator("html"), page.get_by_role("button", name="Dark")
    expect(root).to_have_attribute("data-theme", "dark")
    expect(switch).to_have_attribute("aria-pressed", "true")
    switch.click()
    expect(root).to_have_attribute("data-theme", "light")
    page.emulate_media(color_scheme="light")
    expect(root).to_have_attribute("data-theme", "light")


def test_keys_are_asked_for_and_forgotten(
    guarded: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(guarded, statuses=(401,))
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This server needs a key.")
    for key, then in (("wrong", "does not know this key"), ("", "needs a key")):
        dialog.get_by_label("API key or admin key").fill(key)
        dialog.get_by_role("button", name="Use this key").click()
        expect(dialog).to_contain_text(then)
    dialog.get_by_label("API key or admin key").fill("Clients1")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Live")
    expect(page.locator("#refusal")).to_contain_text("this key may not change pools")
    load = page.get_by_role("button", name="Load math")
    expect(load).to_be_disabled()
    expect(load).to_have_attribute("title", re.compile("this key may not change pools"))
    page.get_by_role("button", name="Key: API").click()
    dialog.get_by_label("API key or admin key").fill("Operators1")
    dialog.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("button", name="Key: admin")).to_be_visible()
    expect(load).to_be_enabled()
    expect(page.locator("#refusal")).to_be_hidden()
    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]
    page.reload()
    expect(dialog).to_contain_text("This server needs a key.")


def test_a_server_that_goes_away_is_noticed_and_so_is_its_return(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    expect(page.locator("#status")).to_have_text("Live")
    page.route("**/v1/residency/events", lambda route: route.abort())
    page.on("console", lambda message: None)

    def end() -> None:
        server.site.is_ending = True

    server.call(end)
    expect(page.locator("#status")).to_have_text("No connection")
    expect(page.get_by_role("alert")).to_contain_text("What you see is old; trying again.")


def test_a_hidden_tab_follows_nothing(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    expect(page.locator("#status")).to_have_text("Live")

    def hide(is_hidden: bool) -> None:
        page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable:"
            " true}); document.dispatchEvent(new Event('visibilitychange')); }",
            is_hidden,
        )

    for is_hidden, readers in ((True, 0), (False, 1)):
        hide(is_hidden)
        while server.call(lambda: server.site.feed.num_readers) != readers:
            page.wait_for_timeout(20)
    expect(page.locator("#status")).to_have_text("Live")


@pytest.mark.parametrize("size", ["wide", "narrow"])
@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_as_wide_as_the_window(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any, view: str, size: str
) -> None:
    page = open_page(server, view, size=size)
    expect(page.locator("#status")).to_have_text("Live")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_axe_finds_nothing(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any, theme: str, size: str
) -> None:
    """axe-core looks at every view; the policy is set aside for it, since it makes markup."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs `dev`").Axe()
    page = open_page(server, theme=theme, size=size, bypass_csp=True)

    def check(what: str) -> None:
        found = axe.run(page).response["violations"]
        told = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]
        assert told == [], what

    for view in VIEWS:
        page.goto(f"{server.url}/console#{view}")
        expect(page.locator("#status")).to_have_text("Live")
        check(view)
    page.get_by_role("button", name="Key", exact=True).click()
    check("the dialog")


def test_the_keyboard_reaches_everything(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    expect(page.locator("#status")).to_have_text("Live")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.getAttribute('aria-label') ??"
                " document.activeElement.textContent"
            )
        )
    assert {"Skip to the content", "Residency", "Playground", "Key", "Dark"} <= reached
    assert {f"Load {name}" for name in ("code", "hot", "law", "math")} <= reached
    assert any("of slots" in (name or "") for name in reached)
