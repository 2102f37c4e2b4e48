"""The playground: answers side by side as they stream, and what is wrong is said where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.console_server import ConsoleServer


@pytest.fixture(scope="module")
def expect() -> Any:
    from playwright.sync_api import expect

    return expect


def answer_of(page: Any, pool: str) -> Any:
    return page.get_by_role("article", name=f"Answer of {pool}", exact=True)


def choose(page: Any, *pools: str) -> None:
    """Have exactly these pools chosen."""
    while page.locator(".chips button").count():
        page.locator(".chips button").first.click()
    for pool in pools:
        page.get_by_label("Pools, unions").fill(pool)
        page.keyboard.press("Enter")


@pytest.mark.parametrize("mode", ["Completion", "Chat"])
def test_pools_answer_side_by_side(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any, mode: str
) -> None:
    page = open_page(server, "playground")
    page.get_by_label(mode).check()
    choose(page, "math", "math+code", "base", "auto")
    page.get_by_role("button", name="Answer").click()
    for pool in ("math", "math+code", "base", "auto"):
        answer = answer_of(page, pool)
        expect(answer.locator(".state")).to_have_text("done")
        expect(answer.locator(".text")).to_have_text("ab")
        expect(answer).to_contain_text("75.0 %")
        expect(answer.locator("dd").first).not_to_have_text("-")
    expect(answer_of(page, "auto")).to_contain_text("by math")
    expect(answer_of(page, "math+code")).to_contain_text("by code+math")
    expect(page.get_by_text("For this prompt: math.")).to_be_visible()


def test_an_answer_is_seen_while_it_streams_and_can_be_stopped(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    engine = server.site.engine
    page = open_page(server, "playground")
    choose(page, "math")
    server.call(engine.may_finish.clear)
    page.get_by_role("button", name="Answer").click()
    answer = answer_of(page, "math")
    expect(answer.locator(".text")).to_have_text("a")
    expect(answer.locator(".state")).to_have_text("running")
    expect(page.get_by_role("button", name="Answer")).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".state")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Answer")).to_be_enabled()
    server.call(engine.may_finish.set)
    page.get_by_role("button", name="Answer").click()
    expect(answer.locator(".text")).to_have_text("ab")


def test_an_engine_that_dies_ends_the_answer_with_its_reason(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    engine = server.site.engine
    page = open_page(server, "playground", statuses=(500,))
    choose(page, "math")
    server.call(engine.may_finish.clear)
    page.get_by_role("button", name="Answer").click()
    answer = answer_of(page, "math")
    expect(answer.locator(".text")).to_have_text("a")

    def die() -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        engine.failure = EngineDeadError()
        engine.may_finish.set()

    server.call(die)
    expect(answer.locator(".state")).to_have_text("failed")
    expect(answer.locator(".error")).not_to_be_empty()


def test_a_pool_that_is_not_there_fails_alone(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, "playground", statuses=(404,))
    choose(page, "math", "nope")
    page.get_by_role("button", name="Answer").click()
    expect(answer_of(page, "nope").locator(".text")).to_contain_text("nope")
    expect(answer_of(page, "nope").locator(".state")).to_have_text("failed")
    expect(answer_of(page, "math").locator(".state")).to_have_text("done")


def test_nothing_is_asked_without_a_pool_and_of_five(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, "playground")
    choose(page)
    page.get_by_role("button", name="Answer").click()
    expect(page.get_by_text("Choose a pool first.")).to_be_visible()
    choose(page, "math", "code", "law", "hot", "base")
    expect(page.get_by_text("At most 4 pools side by side")).to_be_visible()
    expect(page.locator(".chips li")).to_have_count(4)
