"""The view of traffic: rates between two readings of the metrics, and what was refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.console_server import ConsoleServer


@pytest.fixture(scope="module")
def expect() -> Any:
    from playwright.sync_api import expect

    return expect


def stop_the_clock(page: Any) -> None:
    """Have time pass only when a test says so."""
    page.clock.install(time="2026-01-01T00:00:00")
    page.clock.pause_at("2026-01-01T00:00:02")


def metrics(requests: int, refused: int) -> str:
    """Return Prometheus text as the server writes it, after so many requests."""
    pools = {"math": requests, 'we\\"ird': 1}
    lines = ["# TYPE emo_serve_requests_total counter"]
    for pool, number in pools.items():
        lines += [
            f'emo_serve_requests_total{{outcome="finished",pool="{pool}"}} {number}.0',
            f'emo_serve_requests_total{{outcome="failed",pool="{pool}"}} 0.0',
            f'emo_serve_generation_tokens_total{{pool="{pool}"}} {16.0 * number}',
            f'emo_serve_prompt_tokens_total{{pool="{pool}"}} {4.0 * number}',
            f'emo_serve_pool_hits_total{{pool="{pool}"}} {0.75 * number}',
            f'emo_serve_pool_misses_total{{pool="{pool}"}} {0.25 * number}',
            f'emo_serve_waiting_requests{{pool="{pool}"}} 1.0',
        ]
    lines += [
        f'emo_serve_refused_requests_total{{reason="too_many_queued"}} {refused}.0',
        'emo_serve_refused_requests_total{reason="draining"} 0.0',
        f'vllm:time_to_first_token_seconds_sum{{engine="0"}} {0.25 * requests}',
        f'vllm:time_to_first_token_seconds_count{{engine="0"}} {requests}.0',
    ]
    return "\n".join(lines) + "\n"


def test_it_draws_what_the_metrics_say(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server)
    stop_the_clock(page)
    readings = iter([(0, 0), (40, 3), (40, 3)])
    page.route("**/metrics", lambda route: route.fulfill(body=metrics(*next(readings))))
    page.get_by_role("link", name="Traffic").click()
    expect(page.get_by_text("Since this view was opened")).to_be_visible()
    expect(page.get_by_text("Nothing was refused.")).to_be_visible()
    page.clock.run_for(5000)
    charts = page.locator(".chart")
    for title, now in (
        ("Requests per second", "8.00"),
        ("Generated tokens per second", "128"),
        ("Mean time to first token", "250 ms"),
        ("Hit rate", "75 %"),
        ("Requests waiting for a pool", "2.00"),
        ("Refusals per minute", "36.0"),
    ):
        expect(charts.filter(has_text=title).locator(".now")).to_have_text(now)
    image = page.get_by_role("img", name="Requests per second: now 8.00, at most 8.00")
    expect(image).to_be_visible()
    row = page.locator("tbody tr").filter(has_text="math")
    expect(row.locator('[data-label="Requests"]')).to_have_text("40")
    expect(row.locator('[data-label="Generated tokens"]')).to_have_text("640")
    expect(page.locator("tbody tr").filter(has_text='we"ird')).to_be_visible()
    refused = page.locator("tbody tr").filter(has_text="too_many_queued")
    expect(refused.locator('[data-label="In these minutes"]')).to_have_text("3")
    page.clock.run_for(5000)
    expect(charts.filter(has_text="Mean time to first").locator(".now")).to_have_text("-")


def test_it_asks_only_while_it_is_seen_and_says_what_is_wrong(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, statuses=(401,))
    stop_the_clock(page)
    asked = []

    def refuse(route: Any) -> None:
        asked.append(route)
        route.fulfill(status=401, json={"error": {"message": "no key was sent"}})

    page.route("**/metrics", refuse)
    page.get_by_role("link", name="Traffic").click()
    expect(page.get_by_text("The metrics cannot be read: no key was sent")).to_be_visible()
    page.get_by_role("link", name="Playground").click()
    expect(page.get_by_role("heading", name="Playground", level=1)).to_be_visible()
    number = len(asked)
    page.clock.run_for(20_000)
    assert len(asked) == number
