"""Memory against accuracy: the loss of pools and sizes on a pasted text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.browser.test_pool import SCORED
from tests.support.console_server import ConsoleServer

LOSSES = {"base": 2.0, "math": 2.5}


@pytest.fixture(scope="module")
def expect() -> Any:
    from playwright.sync_api import expect

    return expect


def answer(route: Any) -> None:
    """Answer as the server does a request for the log-probabilities of its prompt."""
    body, pool = route.request.post_data_json, route.request.headers["x-emo-pool"]
    assert (body["prompt_logprobs"], body["max_tokens"]) == (0, 1)
    logprob = {"logprob": -LOSSES.get(pool, 3.0), "rank": 1, "decoded_token": "a"}
    positions = [None, *({str(place): logprob} for place in range(len(body["prompt"]) - 1))]
    route.fulfill(json={"choices": [{"text": "", "prompt_logprobs": positions}]})


def test_it_measures_pools_and_sizes(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    from emo_serve.pools.document import parse_pool

    server.wait(lambda: server.site.service.definitions.add(parse_pool("test", SCORED)))
    page = open_page(server, "memory")
    page.route("**/v1/completions", answer)
    models = {"data": [{"id": "emo", "max_model_len": 512}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    pools = page.get_by_label("Pools and sizes")
    expect(pools).to_have_value("base, code, hot")
    page.get_by_label("Held-out text").fill("x" * 1001)
    pools.fill("base, math, scored@2")
    page.get_by_role("button", name="Measure").click()
    expect(page.get_by_text("Done: 2 pieces of text in 3 pools.")).to_be_visible()
    rows = page.locator("tbody tr:visible")
    expect(rows).to_have_count(3)
    for place, (name, experts, loss, more) in enumerate(
        (("base", "8", "2.000", "+0.000"), ("math", "3", "2.500", "+0.500"))
    ):
        cells = rows.nth(place).locator("th, td")
        assert cells.all_inner_texts()[0] == name
        texts = cells.all_inner_texts()
        assert (texts[1], texts[4], texts[5]) == (experts, loss, more)
    expect(rows.nth(2).locator("td").first).to_have_text("2")
    expect(page.get_by_role("img", name="Loss against memory: base 2.00 at")).to_be_visible()
    names = server.call(lambda: [pool.name for pool in server.site.service.lookup.named])
    assert not [name for name in names if name.startswith("measured")]


def test_what_cannot_be_measured_is_said(
    server: ConsoleServer, open_page: Callable[..., Any], expect: Any
) -> None:
    page = open_page(server, "memory", statuses=(400, 404))
    measure, pools = (
        page.get_by_role("button", name="Measure"),
        page.get_by_label("Pools and sizes"),
    )
    measure.click()
    expect(page.get_by_text("Give a text, or a file.")).to_be_visible()
    page.get_by_label("Held-out text").fill("some text")
    pools.fill("nope")
    measure.click()
    expect(page.get_by_text("Not measured:")).to_contain_text("nope")
    pools.fill("math@2")
    measure.click()
    expect(
        page.get_by_text("Not measured: there is no pool 'math@2': pool 'math' has no scores")
    ).to_be_visible()
