"""A fleet that changes under traffic: who notices when replicas come, go, or are all replaced.

Six clients ask for short completions throughout, and before each change two long streams begin on
every replica. A change is another Serve config, deployed as an operator does it: `serve deploy` of
what `emo-serve cluster config` prints.

    scale      from two replicas to four, and back to two
    redeploy   other flags for the replicas, so all are replaced

    python -m benchmarks.cluster.changes --part scale
    python -m benchmarks.cluster.changes --part redeploy
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.cluster.on_ray import FLAGS
from benchmarks.harness.progress import say
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import free_port
from benchmarks.reliability.client import COMPLETIONS, Answer, ask, endings
from benchmarks.reliability.summary import percentiles
from emo_serve import demo
from emo_serve.ray_cluster.manifests import APPLICATION, DEPLOYMENT, serve_config
from emo_serve.ray_cluster.settings import FleetSettings

_POOLS = sorted(demo.domains())[:4]
_CLIENTS, _STREAMS_EACH = 6, 2
_LONGEST_SECONDS = 200.0
_CORES = 4  # that Ray believes to have: one for each replica


@dataclass(frozen=True)
class Place:
    """A Ray of this process's own, with the dashboard that `serve deploy` talks to."""

    port: int
    dashboard: str
    directory: Path

    def deploy(self, settings: FleetSettings) -> None:
        """Run `serve deploy`, which returns before the change is done."""
        file = self.directory / "fleet.yaml"
        file.write_text(yaml.safe_dump(serve_config(settings, "127.0.0.1", self.port)))
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(file)]
        subprocess.run([*command, "--address", self.dashboard], check=True, capture_output=True)

    def states(self) -> dict[str, int]:
        """Return how many replicas are in each of Ray's states."""
        from ray import serve

        found = serve.status().applications.get(APPLICATION)
        one = None if found is None else found.deployments.get(DEPLOYMENT)
        return {} if one is None else dict(one.replica_states)


@contextmanager
def own_ray() -> Iterator[Place]:
    """Have a Ray inside the block, and whatever was deployed on it."""
    from emo_serve.ray_cluster.environment import prepare_environment

    prepare_environment(is_alone=True)
    import ray
    from ray import serve

    port, dashboard = free_port(), free_port()
    ray.init(
        address="local",
        num_cpus=_CORES,
        object_store_memory=128 * 2**20,
        include_dashboard=True,
        dashboard_port=dashboard,
        logging_level="ERROR",
    )
    try:
        with tempfile.TemporaryDirectory() as directory:
            yield Place(port, f"http://127.0.0.1:{dashboard}", Path(directory))
        serve.shutdown()
    finally:
        ray.shutdown()


class Traffic:
    """Clients that ask all the time, and what they have been answered since the last look."""

    def __init__(self, session: aiohttp.ClientSession, pools: Sequence[str], clients: int) -> None:
        self._session, self._pools = session, pools
        self._answers: list[Answer] = []
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(clients)]

    async def _client(self, number: int) -> None:
        count = number
        while True:
            count += 1
            body = _body(self._pools[count % len(self._pools)], 8, stream=count % 2 == 0)
            self._answers.append(await ask(self._session, body))

    def taken(self) -> list[Answer]:
        """Return the answers since the last call."""
        found, self._answers = self._answers, []
        return found

    async def stop(self) -> None:
        """End the clients."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _body(pool: str, tokens: int, *, stream: bool) -> dict[str, Any]:
    document = {"model": pool, "prompt": "the ", "max_tokens": tokens, "ignore_eos": True}
    return {**document, "stream": stream}


async def replicas_of(session: aiohttp.ClientSession) -> list[str]:
    """Return the names of the replicas that take requests; none while nothing answers."""
    try:
        async with session.get("/v1/pools") as answer:
            return sorted((await answer.json())["replicas"]) if answer.ok else []
    except aiohttp.ClientError:
        return []


async def change(
    place: Place,
    session: aiohttp.ClientSession,
    traffic: Traffic,
    settings: FleetSettings,
    tokens: int,
) -> dict[str, Any]:
    """Make one change under traffic, and wait until it is done."""
    before = await replicas_of(session)
    traffic.taken()
    streams = [
        asyncio.create_task(
            ask(session, _body(_POOLS[0], tokens, stream=True), f"{COMPLETIONS}?replica={name}")
        )
        for name in before
        for _ in range(_STREAMS_EACH)
    ]
    await asyncio.sleep(1.0)
    start = time.monotonic()
    await asyncio.to_thread(place.deploy, settings)
    wanted = settings.min_replicas

    def is_done(now: list[str]) -> bool:
        is_new = wanted != len(before) or not set(now) & set(before)
        return len(now) == wanted and is_new and place.states() == {"RUNNING": wanted}

    await until(session, is_done)
    seconds = time.monotonic() - start
    long = await asyncio.gather(*streams)
    after = await replicas_of(session)
    short = traffic.taken()
    failed = [one for one in (*short, *long) if one.ending != "finished"]
    return {
        "replicas": [len(before), len(after)],
        "kept": len(set(before) & set(after)),
        "seconds": round(seconds, 1),
        "short": endings(short),
        "short_seconds": percentiles([one.seconds for one in short]),
        "streams": endings(long),
        "messages": sorted({one.message for one in failed})[:5],
    }


async def until(session: aiohttp.ClientSession, is_done: Callable[[list[str]], bool]) -> None:
    """Wait until the replicas are as they should be; raises TimeoutError."""
    async with asyncio.timeout(_LONGEST_SECONDS):
        while not is_done(await replicas_of(session)):
            await asyncio.sleep(0.5)


async def run(place: Place, part: str, tokens: int) -> list[dict[str, Any]]:
    """Start two replicas, and make the changes of a part."""
    two = FleetSettings(FLAGS, cpus=1.0, drain_seconds=60.0)
    four = replace(two, min_replicas=4, max_replicas=4)
    other = replace(two, argv=("--expert-slots", "24"))
    url = f"http://127.0.0.1:{place.port}"
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=_LONGEST_SECONDS)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        start = time.monotonic()
        await asyncio.to_thread(place.deploy, two)
        await until(session, lambda now: len(now) == 2)
        say(f"two replicas after {time.monotonic() - start:.0f} s")
        traffic = Traffic(session, _POOLS, _CLIENTS)
        found = []
        for settings in (four, two) if part == "scale" else (other,):
            found.append(await change(place, session, traffic, settings, tokens))
            say(found[-1])
        await traffic.stop()
        return found


def main() -> None:
    """Make the changes of one part, print what happened, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--part", choices=("scale", "redeploy"), default="scale")
    parser.add_argument("--tokens", type=int, default=500, help="of the long streams [500]")
    args = parser.parse_args()
    with own_ray() as place:
        result = asyncio.run(run(place, args.part, args.tokens))
    say(f"appended to {append_result('cluster_changes', vars(args), result)}")


if __name__ == "__main__":
    main()
