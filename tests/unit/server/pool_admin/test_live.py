"""/v1/residency and its stream: what is told, when, and that nothing is done for nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from emo_serve.errors import EmoServeError, Unavailable
from emo_serve.server.asgi.errors import status_of
from emo_serve.server.pool_admin.feed import ResidencyFeed
from emo_serve.server.pool_admin.live import create_live_router
from tests.support.fake_engine import FakeEngine
from tests.support.pool_services import ServiceUnderTest, service_of


def feed_of(service: ServiceUnderTest, **options: Any) -> ResidencyFeed:
    """Return a feed that looks all the time."""
    return ResidencyFeed(service.statuses, **{"look_seconds": 0.0, "pause_seconds": 0.0, **options})


async def next_events(stream: AsyncIterator[bytes]) -> dict[str, Any]:
    """Return the next events by name, comments as an empty dictionary."""
    found = {}
    for event in (await asyncio.wait_for(anext(stream), 30)).decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in event.splitlines() if line[0] != ":")
        if lines:
            found[lines["event"]] = json.loads(lines["data"])
    return found


async def until(stream: AsyncIterator[bytes], name: str) -> Any:
    """Return the next event of that name."""
    while name not in (events := await next_events(stream)):
        pass
    return events[name]


def app_of(service: ServiceUnderTest, feed: ResidencyFeed) -> FastAPI:
    def to_http_error(error: EmoServeError) -> Exception:
        return HTTPException(status_of(error), str(error))

    app = FastAPI()
    app.include_router(create_live_router(service.statuses, feed, to_http_error))
    return app


# -- slots --


async def test_the_map_names_every_slots_expert_and_who_needs_it() -> None:
    engine = FakeEngine()
    service = service_of(engine)
    await service.residency.load("law")  # 4 5 6 and the shared 7
    await service.residency.load("hot")  # 6 and 7 at another temperature
    engine.is_holding = True
    loading = asyncio.create_task(service.residency.load("math"))  # 0 1 7
    await engine.next_held()
    transport = httpx.ASGITransport(app_of(service, feed_of(service)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = (await client.get("/v1/residency")).json()
    assert [pool["name"] for pool in answer["pools"]] == ["law", "hot", "math"]
    assert answer["pools"][0]["content_hash"] == service.lookup.find("law").content_hash
    layer = {
        "experts": [4, 5, 6, 7, 0, 1, None, None],
        "holders": [[0], [0], [0, 1], [0, 1, 2], [2], [2], [], []],
        "loading": [4, 5],
    }
    assert answer["layers"] == [None, layer, layer]
    engine.held[0].release()
    await loading
    assert service.statuses.slot_map().layers[1].loading == ()


# -- the stream --


async def test_a_reader_is_told_all_at_once_and_then_what_changes() -> None:
    service = service_of()
    feed = feed_of(service)
    stream = feed.follow()
    first = await next_events(stream)
    assert set(first) == {"slots", "pools"}
    assert [card["state"] for card in first["pools"]["data"]] == ["absent"] * 5
    await service.residency.load("math")
    slots = await until(stream, "slots")
    assert slots["pools"][0]["name"] == "math"
    async with service.residency.lease(service.lookup.find("math")):
        while (pools := await until(stream, "pools"))["running_requests"] != 1:
            pass
    assert pools["data"][-1]["hits"] == 1
    await stream.aclose()


async def test_nothing_is_told_when_nothing_changes_but_that_it_lives() -> None:
    service = service_of()
    stream = feed_of(service, sign_of_life_seconds=0.01).follow()
    await next_events(stream)
    assert [await next_events(stream) for _ in range(3)] == [{}, {}, {}]
    await stream.aclose()


async def test_a_new_pool_and_a_new_default_are_changes() -> None:
    service = service_of()
    stream = feed_of(service).follow()
    before = await until(stream, "pools")
    await service.definitions.remove("law")
    after = await until(stream, "pools")
    assert len(after["data"]) == len(before["data"]) - 1
    await stream.aclose()


async def test_one_snapshot_serves_all_readers_and_none_is_made_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = service_of()
    made = 0
    overview = service.statuses.overview

    def counted() -> Any:
        nonlocal made
        made += 1
        return overview()

    monkeypatch.setattr(service.statuses, "overview", counted)
    feed = feed_of(service)
    streams = [feed.follow() for _ in range(10)]
    for stream in streams:
        await next_events(stream)
    assert (made, feed.num_readers) == (1, 10)
    await service.definitions.remove("law")
    for stream in streams:
        await until(stream, "pools")
    assert made == 2
    for stream in streams:
        await stream.aclose()
    assert feed.num_readers == 0
    await service.definitions.remove("code")
    for _ in range(20):
        await asyncio.sleep(0)
    assert made == 2


async def test_a_reader_that_comes_back_is_told_the_newest() -> None:
    service = service_of()
    feed = feed_of(service)
    stream = feed.follow()
    await next_events(stream)
    await stream.aclose()
    await service.definitions.remove("law")
    stream = feed.follow()
    assert len((await until(stream, "pools"))["data"]) == 4
    await stream.aclose()


async def test_snapshots_pause_the_longer_the_longer_one_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter((0.0, 0.25))  # one snapshot takes a quarter of a second
    monkeypatch.setattr("emo_serve.server.pool_admin.feed.time.perf_counter", lambda: next(clock))
    feed = feed_of(service_of())
    stream = feed.follow()
    now = asyncio.get_running_loop().time()
    await next_events(stream)
    assert feed._not_before - now == pytest.approx(50.0, abs=5.0)
    await stream.aclose()


async def test_streams_end_with_the_server() -> None:
    service, is_ending = service_of(), False
    feed = ResidencyFeed(service.statuses, lambda: is_ending, look_seconds=0.0)
    stream = feed.follow()
    await next_events(stream)
    is_ending = True
    with pytest.raises(StopAsyncIteration):
        await next_events(stream)


async def test_readers_are_bounded() -> None:
    feed = feed_of(service_of(), max_readers=1)
    feed.check_room()
    stream = feed.follow()
    await next_events(stream)
    with pytest.raises(Unavailable, match="1 clients follow"):
        feed.check_room()
    await stream.aclose()
    feed.check_room()


async def test_the_route_streams_events_and_refuses_one_reader_too_many() -> None:
    service, is_ending = service_of(), True  # so that the stream ends after its first events
    feed = ResidencyFeed(service.statuses, lambda: is_ending, max_readers=1)
    transport = httpx.ASGITransport(app_of(service, feed))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/v1/residency/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        assert "event: slots\n" in answer.text and "event: pools\n" in answer.text
        feed.num_readers = 1
        assert (await client.get("/v1/residency/events")).status_code == 503
