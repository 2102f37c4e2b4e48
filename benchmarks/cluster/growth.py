"""Ray's autoscaler with our policy on real replicas: from one to two under load, and back.

Clients ask for ten pools, for two of which one replica has slots, so requests wait for loads and
few find their pool: the policy asks for another replica. When it is there, the clients leave, and
the policy gives one up. Its times are shortened, so that this takes minutes; all else is as
`emo-serve cluster serve --replicas 1..2` has it.

    python -m benchmarks.cluster.growth
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import aiohttp

from benchmarks.cluster.changes import Traffic, replicas_of
from benchmarks.cluster.on_ray import running
from benchmarks.harness.progress import say
from benchmarks.harness.results import append_result
from benchmarks.reliability.client import endings
from emo_serve import demo
from emo_serve.ray_cluster.settings import FleetSettings

_PHASE_SECONDS = 110.0


async def until(session: aiohttp.ClientSession, wanted: int, start: float) -> float | None:
    """Wait until so many replicas take requests; return the seconds since `start`."""
    while time.monotonic() - start < _PHASE_SECONDS:
        if len(await replicas_of(session)) == wanted:
            return round(time.monotonic() - start, 1)
        await asyncio.sleep(0.5)
    return None


async def grow_and_shrink(url: str, clients: int) -> dict[str, Any]:
    """Load one replica until there are two, and leave them alone until there is one."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        start = time.monotonic()
        traffic = Traffic(session, sorted(demo.domains()), clients)
        grown = await until(session, 2, start)
        say(f"two replicas after {grown} s")
        await asyncio.sleep(5.0)
        await traffic.stop()
        start = time.monotonic()
        shrunk = await until(session, 1, start)
        say(f"one replica after {shrunk} s without requests")
        return {
            "grown_after_seconds": grown,
            "shrunk_after_seconds": shrunk,
            "answers": endings(traffic.taken()),
        }


def main() -> None:
    """Grow and shrink once, print what happened, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--up-seconds", type=float, default=5.0, help="of the policy [5]")
    parser.add_argument("--down-seconds", type=float, default=20.0, help="of the policy [20]")
    args = parser.parse_args()
    scaling = FleetSettings((), 1, 2).replica_options()["autoscaling_config"]
    limits = {"up_seconds": args.up_seconds, "down_seconds": args.down_seconds}
    scaling["policy"]["policy_kwargs"] = limits
    with running((1, 2), autoscaling_config=scaling) as fleet:
        result = asyncio.run(grow_and_shrink(fleet.url, args.clients))
    say(result)
    say(f"appended to {append_result('cluster_growth', vars(args), result)}")


if __name__ == "__main__":
    main()
