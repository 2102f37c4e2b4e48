"""A server that is sent everything but what it expects stays whole; see conftest for how long."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import chain, takewhile

import httpx
import pytest

from tests.abuse.asking import Asked, ask, ask_all
from tests.abuse.bodies import BAD_BODIES, mutations, post_paths, valid_bodies
from tests.abuse.conftest import MINUTES, URL, Abused
from tests.abuse.faults_of_vllm import FAULTS, FaultOfVllm, shown_status
from tests.abuse.generated import ask_generated_cases, run_generated_sequences
from tests.abuse.raw_http import PARTS_OF_REQUESTS, WHOLE_REQUESTS, exchange
from tests.abuse.watching import broken_tables, memory_of
from tests.support.progress import START_SECONDS
from tests.support.server_process import RunningServer

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(START_SECONDS + MINUTES * 60)]

needs_process = pytest.mark.skipif(URL is not None, reason="needs emo-serve's own process")

SEED = 0
MUTATIONS = int(5000 * MINUTES)
LEAST_MUTATIONS = 1000  # however slow the machine is
EXAMPLES = int(5 * MINUTES)  # per route and kind
SEQUENCES = int(5 * MINUTES)

MAX_BODY_BYTES = 8 * 2**20
HALF_OPEN = 200
SILENCE_SECONDS = 30.0  # after which a connection that says nothing more is closed
LAST_SECONDS = 10.0  # for the tests after the mutations

MEMORY_BOUND_BYTES = {"front end": 256 * 2**20, "engine": 128 * 2**20, "worker": 256 * 2**20}
"""How much each process may grow; the worker touches its KV cache of 128 MiB meanwhile."""


def noted(all_asked: Iterable[Asked], sent: list[Asked]) -> Iterator[Asked]:
    for asked in all_asked:
        sent.append(asked)
        yield asked


def report(faults: list[str]) -> str:
    return f"{len(faults)} went wrong:\n" + "\n".join(faults[:40])


# -- what is sent --


async def test_valid_bodies_are_answered(abused: Abused, http: httpx.AsyncClient) -> None:
    wrong = []
    for path, body in valid_bodies(abused.model):
        answer = await ask(http, Asked(path, json.dumps(body).encode(), "valid"))
        is_ours = path.startswith("/v1/pools")
        if answer.status not in (200, 201, 501) and not (URL and is_ours):
            wrong.append(f"{path} {body} -> {answer.status} {answer.body[:300]!r}")
    assert not wrong, report(wrong)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.about} {fault.path}")
async def test_the_faults_of_vllm_are_as_the_table_says(
    abused: Abused, http: httpx.AsyncClient, fault: FaultOfVllm
) -> None:
    answer = await ask(http, fault.asked(abused.model))
    is_ours = "/v1/pools" in abused.document["paths"]
    assert shown_status(answer) == (400 if is_ours else fault.vllm), answer


async def test_bad_bodies(abused: Abused, http: httpx.AsyncClient) -> None:
    faults = await ask_all(
        http,
        (
            Asked(path, body, about)
            for path in post_paths(abused.document)
            for about, body in BAD_BODIES.items()
        ),
    )
    assert not faults, report(faults)


async def test_long_bodies(abused: Abused, http: httpx.AsyncClient) -> None:
    text = b"a b " * 2**18  # 1 MiB
    for path in post_paths(abused.document):
        body = b'{"model": "python", "prompt": "%b", "max_tokens": 1}' % text
        answer = await ask(http, Asked(path, body, "1 MiB of text"))
        assert 0 < answer.status < 500, (path, answer.status, answer.body[:300])


@needs_process
async def test_bodies_beyond_the_limit_are_refused(abused: Abused, http: httpx.AsyncClient) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)
    for path in post_paths(abused.document):
        answer = await ask(http, Asked(path, body, "1 byte beyond the limit"))
        assert answer.status == 413, (path, answer.status, answer.lost, answer.body[:300])


@needs_process
async def test_broken_http_and_half_open_connections(
    abused: Abused, http: httpx.AsyncClient
) -> None:
    port = httpx.URL(abused.url).port
    assert port is not None
    parts = [part for part, _ in PARTS_OF_REQUESTS.values()]
    half_open = [
        asyncio.create_task(exchange(port, parts[place % len(parts)], 10 * SILENCE_SECONDS))
        for place in range(HALF_OPEN)
    ]
    wrong = []
    for about, (data, wanted) in WHOLE_REQUESTS.items():  # answered beside those that are silent
        status, came = await exchange(port, data, 2 * SILENCE_SECONDS)
        if status not in wanted:
            wrong.append(f"{about}: {data[:80]!r} -> {status}, not {wanted}: {came[:200]!r}")
    wanted_of = [statuses for _, statuses in PARTS_OF_REQUESTS.values()]
    for place, (status, came) in enumerate(await asyncio.gather(*half_open)):
        if status not in wanted_of[place % len(parts)]:
            wrong.append(f"half open: {parts[place % len(parts)]!r} -> {status}: {came[:200]!r}")
    assert not wrong, report(wrong)


@needs_process
def test_generated_requests_to_our_routes(abused: Abused) -> None:
    half_time = abused.deadline - MINUTES * 30
    faults = ask_generated_cases(abused.url, abused.document, EXAMPLES, half_time)
    assert not faults, report(faults)


@needs_process
def test_generated_sequences_of_requests_to_our_routes(abused: Abused) -> None:
    faults = run_generated_sequences(abused.url, abused.document, SEQUENCES)
    assert not faults, report(faults)


@pytest.mark.usefixtures("unpinned")
async def test_valid_bodies_with_one_field_changed(abused: Abused, http: httpx.AsyncClient) -> None:
    wanted = mutations(abused.document, abused.model, SEED)[:MUTATIONS]
    in_time = takewhile(lambda _: abused.seconds_left > LAST_SECONDS, wanted[LEAST_MUTATIONS:])
    sent: list[Asked] = []
    faults = await ask_all(http, noted(chain(wanted[:LEAST_MUTATIONS], in_time), sent))
    logger.info("sent %d of %d mutations", len(sent), len(wanted))
    assert not faults, report(faults)


# -- what is left: these come last --


def test_health_was_answered_throughout(abused: Abused) -> None:
    assert abused.health.num_good > 0
    assert not abused.health.faults, report(abused.health.faults)


@needs_process
@pytest.mark.usefixtures("unpinned")
async def test_the_tables_of_residency_are_whole(abused: Abused, http: httpx.AsyncClient) -> None:
    pools = (await http.get("/v1/pools")).json()
    names = [card["name"] for card in pools["data"] if card["kind"] in ("base", "pool")]
    for name in names:  # an abuser's definition may be too large for the slots, as the base pool is
        body = {"model": name, "prompt": "hi", "max_tokens": 2}
        answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, (name, answer.text)
        assert answer.headers["x-emo-pool"] == name
    assert len(names) >= 3
    assert broken_tables((await http.get("/v1/pools")).json()) == []


@needs_process
def test_memory_is_bounded(abused: Abused) -> None:
    assert isinstance(abused.process, RunningServer) and abused.memory is not None
    now = memory_of(abused.process.process.pid)
    grown = {role: now[role] - abused.memory[role] for role in abused.memory}
    logger.info("bytes grown: %s", grown)
    beyond = {
        role: grown[role]
        for role, bound in MEMORY_BOUND_BYTES.items()
        if grown.get(role, 0) > bound
    }
    assert not beyond, f"grew by {grown} bytes; the bounds are {MEMORY_BOUND_BYTES}"
