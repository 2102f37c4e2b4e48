"""Two real replicas of the shipped model behind one address, on a Ray of the test's own.

The tests run in order: the last ones kill a replica and stop the fleet.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from emo_serve import demo
from emo_serve.cluster.rendezvous import Rendezvous
from tests.support.processes import ended_on_exit, free_port
from tests.support.progress import PATIENCE_SECONDS, START_SECONDS, Activity, wait_for
from tests.support.server_process import words_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `cluster`"),
]

SLOTS = 16  # of 32; a pool takes 8
MAX_WAITING = 2
POOLS = sorted(file.stem for file in demo.pools_dir().glob("*.json"))


class Fleet:
    """A running `emo-serve cluster serve`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, output: Path) -> None:
        self.process, self.url, self._output = process, f"http://127.0.0.1:{port}", output
        self.activity = Activity(process.pid, [output])
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.output[-4000:]
        return "replicas are ready" in self.output

    def replicas(self) -> list[str]:
        """Return the names of the replicas that answer."""
        return sorted(self.http.get("/v1/pools").raise_for_status().json()["replicas"])

    def processes(self) -> list[psutil.Process]:
        """Return the replicas' processes."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if "ServeReplica" in " ".join(words_of(one))]

    def complete(self, model: str, replica: str | None = None, **body: Any) -> httpx.Response:
        """Ask for a short completion, of one replica if it is named."""
        params = {} if replica is None else {"replica": replica}
        document = {"model": model, "prompt": "the ", "max_tokens": 2, "temperature": 0, **body}
        return self.http.post("/v1/completions", params=params, json=document)

    def loads(self) -> int:
        """Return how many loads there have been on all replicas."""
        total = 0.0
        for name in self.replicas():
            text = self.http.get("/metrics", params={"replica": name}).text
            lines = [line for line in text.splitlines() if line.startswith("emo_serve_pool_loads_")]
            total += sum(float(line.split()[-1]) for line in lines if "_total{" in line)
        return int(total)

    def evict_all(self) -> None:
        for name in POOLS:
            answer = self.http.post(f"/v1/pools/{name}/evict", json={"drain": True})
            assert answer.is_success, answer.text

    def run_trace(self, trace: Sequence[str], replicas: Sequence[str | None]) -> int:
        """Send a trace, in turn to these replicas (None: the router's choice); return its loads."""
        self.evict_all()
        before = self.loads()
        for place, pool in enumerate(trace):
            answer = self.complete(pool, replicas[place % len(replicas)])
            assert (answer.status_code, answer.headers["x-emo-pool"]) == (200, pool), answer.text
        return self.loads() - before


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    output = tmp_path_factory.mktemp("fleet") / "output"
    port = free_port()
    command = [sys.executable, "-m", "emo_serve", "cluster", "serve", "--replicas", "2"]
    command += ["--port", str(port), "--expert-slots", str(SLOTS), "--drain-timeout", "60"]
    command += ["--max-waiting", str(MAX_WAITING)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with output.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    with ended_on_exit(process):
        fleet = Fleet(process, port, output)
        wait_for(fleet.is_up, fleet.activity, START_SECONDS)
        yield fleet
        fleet.http.close()


class Stream:
    """A long stream, read to its end in a thread of its own."""

    def __init__(
        self,
        fleet: Fleet,
        replica: str | None = None,
        tokens: int = 900,
        pool: str = POOLS[0],
    ) -> None:
        self._fleet, self._replica, self._tokens, self._pool = fleet, replica, tokens, pool
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_for(lambda: len(self.lines) > 4, most_seconds=60)

    def ended(self) -> list[str]:
        """Wait for the end, and return the last event and what comes before it."""
        self._thread.join(PATIENCE_SECONDS)
        return [line for line in self.lines if line][-2:]

    def _read(self) -> None:
        with stream(self._fleet, self._replica, self._tokens, self._pool) as answer:
            for line in answer.iter_lines():
                self.lines.append(line)


@contextmanager
def stream(
    fleet: Fleet, replica: str | None, tokens: int, pool: str = POOLS[0]
) -> Iterator[httpx.Response]:
    body = {"model": pool, "prompt": "the ", "max_tokens": tokens, "stream": True}
    params = {} if replica is None else {"replica": replica}
    with httpx.Client(base_url=fleet.url, timeout=PATIENCE_SECONDS) as http:
        options: dict[str, Any] = {"params": params, "json": {**body, "ignore_eos": True}}
        with http.stream("POST", "/v1/completions", **options) as answer:
            assert answer.status_code == 200
            yield answer


def running(fleet: Fleet) -> int:
    return int(fleet.http.get("/v1/pools").json()["running_requests"])


def test_a_request_goes_where_its_pool_is_resident(fleet: Fleet) -> None:
    rng = random.Random(14)
    replicas = fleet.replicas()
    ranks = {pool: Rendezvous().ranks(pool, replicas) for pool in POOLS}
    # Each replica has slots for two; without news of the others, a pool goes to its first.
    at_home = ([pool for pool in POOLS if ranks[pool][one] == 0] for one in replicas)
    asked = [pool for pools in at_home for pool in pools[:2]]
    trace = rng.choices(asked, [1 / (rank + 1) for rank in range(len(asked))], k=48)
    in_turn = fleet.run_trace(trace, replicas)
    by_pool = fleet.run_trace(trace, [None])
    assert by_pool <= 0.75 * in_turn, f"{by_pool} loads by pool, {in_turn} in turn"


def test_every_name_is_answered_as_by_one_server(fleet: Fleet) -> None:
    first, second = POOLS[:2]
    assert fleet.complete(f"{second}+{first}").headers["x-emo-pool"] == f"{first}+{second}"
    assert fleet.complete("auto").headers["x-emo-pool"] in (*POOLS, "base")
    assert fleet.complete(f"emo-demo:{first}").headers["x-emo-pool"] == first
    unknown = fleet.complete("nope")
    assert unknown.status_code == 404
    assert "nope" in unknown.json()["error"]["message"]
    base = fleet.complete("emo-demo")  # needs 32 slots, and is streamed
    assert (base.status_code, base.headers["x-emo-pool"]) == (200, "base")


def test_a_change_is_on_both_replicas(fleet: Fleet) -> None:
    document = fleet.http.get(f"/v1/pools/{POOLS[0]}/document").json()
    assert fleet.http.post("/v1/pools", json={**document, "name": "mine"}).status_code == 201
    for name in fleet.replicas():
        card = fleet.http.get("/v1/pools/mine", params={"replica": name}).json()
        assert card["content_hash"] == fleet.http.get("/v1/pools/mine").json()["content_hash"]
    pinned = fleet.http.post("/v1/pools/mine/pin").json()
    assert [one["pinned"] for one in pinned["replicas"].values()] == [True, True]
    assert fleet.http.post("/v1/pools/mine/unpin").is_success
    assert fleet.http.delete("/v1/pools/mine").is_success
    for name in fleet.replicas():
        gone = fleet.http.get("/v1/pools/mine", params={"replica": name})
        assert gone.status_code == 404


def test_a_client_that_leaves_ends_its_request(fleet: Fleet) -> None:
    with stream(fleet, None, 900) as answer:
        lines = answer.iter_lines()  # dropped, it would close the connection
        next(lines)
        wait_for(lambda: running(fleet) == 1, most_seconds=60)
    wait_for(lambda: running(fleet) == 0, most_seconds=10)


def test_overload_is_refused_through_the_proxy_as_by_one_server(fleet: Fleet) -> None:
    name = fleet.replicas()[0]
    busy = [Stream(fleet, name, 400, pool) for pool in POOLS[:2]]  # they hold all slots
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: fleet.complete(POOLS[2], name), range(6)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == len(answers) - MAX_WAITING
    for answer in refused:
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == 503
    assert [answer.status_code for answer in answers if answer not in refused] == [200, 200]
    assert [one.ended()[-1] for one in busy] == ["data: [DONE]"] * 2


def test_a_replica_that_is_killed_ends_its_stream_and_comes_back(fleet: Fleet) -> None:
    streams = [Stream(fleet, name) for name in fleet.replicas()]
    fleet.processes()[0].kill()
    for _ in range(8):  # no new request goes to it
        assert fleet.complete(POOLS[0]).status_code == 200
    ends = [one.ended() for one in streams]
    assert [end[-1] for end in ends] == ["data: [DONE]"] * 2
    assert sorted("the replica that answered has ended" in end[0] for end in ends) == [False, True]

    document = fleet.http.get(f"/v1/pools/{POOLS[0]}/document").json()
    assert fleet.http.post("/v1/pools", json={**document, "name": "late"}).status_code == 201
    wait_for(lambda: len(fleet.replicas()) == 2, fleet.activity, START_SECONDS)
    for name in fleet.replicas():  # before its first request, also the new one has the pool
        late = fleet.http.get("/v1/pools/late", params={"replica": name})
        assert late.status_code == 200


def test_the_end_drains_streams_and_leaves_nothing(fleet: Fleet) -> None:
    last = Stream(fleet, tokens=200)
    everything = psutil.Process(fleet.process.pid).children(recursive=True)
    fleet.process.terminate()
    before, done = last.ended()
    assert done == "data: [DONE]"
    assert "error" not in before
    assert fleet.process.wait(PATIENCE_SECONDS) == 0
    wait_for(lambda: not any(is_alive(one) for one in everything), most_seconds=60)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
