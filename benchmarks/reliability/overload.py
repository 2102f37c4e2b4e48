"""More work than a server can hold: who is served, who is refused, and what the others feel.

    flood   `--requests` at once to one resident pool, each on a connection of its own, half of them
            streams; clients that are refused obey Retry-After, up to `--tries` times
    fan     one request with n=5000, one with 20,000 prompts, one with the largest n allowed
    tight   slots for two pools; 600 clients ask for ten pools at once, and obey too

Meanwhile a process of its own asks `/health` and completes one token in another pool (in the pools
that are waited for, in the last part).

    python -m benchmarks.reliability.overload
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.progress import part_of, steps
from benchmarks.harness.results import append_result
from benchmarks.reliability.client import Answer, ask, endings, obey, summary_of, tries_of
from benchmarks.reliability.probes import Probe, Probes
from benchmarks.reliability.server import Server, server
from benchmarks.reliability.state import refusals, residency, until_idle
from benchmarks.reliability.summary import percentiles
from emo_serve import demo

_FLOODED, _OTHER = "python", "math"
_MAX_RUNNING = 128  # what the server runs at once with vLLM's default of --max-num-seqs
_EXPERTS_A_POOL = 8


def probes_of(running: Server, pool: str) -> Probes:
    """Return probes of `/health` and of a pool that the load leaves alone."""
    body = {"model": pool, "prompt": "a", "max_tokens": 1}
    return Probes(running, {"health": Probe("/health"), "other": Probe("/v1/completions", body)})


def probe_figures(probes: Probes) -> dict[str, Any]:
    """Return the percentiles of each probe, and how many were not answered with 200."""
    return {
        name: {
            **percentiles([sample.seconds for sample in samples]),
            "not_200": sum(sample.status != 200 for sample in samples),
        }
        for name, samples in probes.samples.items()
    }


async def many(
    running: Server, bodies: Sequence[Mapping[str, Any]], tries: int, probed: str
) -> dict[str, Any]:
    """Send all bodies at once, obey Retry-After, and return how all of it went."""
    with probes_of(running, probed) as probes:
        async with running.session(seconds=300) as session:
            start = time.monotonic()
            with part_of(len(bodies), "clients") as ended:

                async def client(body: Mapping[str, Any]) -> list[Answer]:
                    answers = await obey(session, body, tries)
                    ended(1)
                    return answers

                clients = await asyncio.gather(*map(client, bodies))
            seconds = time.monotonic() - start
        async with running.observer() as observer:
            idle_seconds = await until_idle(observer)
            after, reasons = await residency(observer), await refusals(observer)
    first = [answers[0] for answers in clients]
    return {
        "requests": len(bodies),
        "first_try": endings(first),
        **tries_of(clients),
        "admitted": summary_of(_with_status(first, 200)),
        "refused": summary_of(_with_status(first, 503)),
        "refused_for": reasons,
        "seconds": seconds,
        "idle_after_seconds": idle_seconds,
        "after": after,
        **probe_figures(probes),
    }


def _with_status(answers: Sequence[Answer], status: int) -> list[Answer]:
    return [answer for answer in answers if answer.status == status]


def flood_bodies(requests: int) -> list[dict[str, Any]]:
    """Return completions of 8 tokens in one pool, every second one as a stream."""
    return [
        {
            "model": _FLOODED,
            "prompt": f"x {index} " + "word " * 60,
            "max_tokens": 8,
            "ignore_eos": True,
            "stream": index % 2 == 1,
        }
        for index in range(requests)
    ]


def tight_bodies(requests: int) -> list[dict[str, Any]]:
    """Return streams of 16 tokens over all pools in turn."""
    pools = demo.domains()
    return [
        {
            "model": pools[index % len(pools)],
            "prompt": f"x{index}",
            "max_tokens": 16,
            "ignore_eos": True,
            "stream": True,
        }
        for index in range(requests)
    ]


async def fan(running: Server) -> dict[str, Any]:
    """Send each request that asks for very much; return its end and what the probes felt."""
    bodies: dict[str, dict[str, Any]] = {
        "n=5000": {"prompt": "a", "n": 5000, "max_tokens": 4},
        "20,000 prompts": {"prompt": ["a"] * 20_000, "max_tokens": 1},
        f"n={_MAX_RUNNING}": {"prompt": "a", "n": _MAX_RUNNING, "max_tokens": 64},
    }
    results: dict[str, Any] = {}
    for name, body in steps(bodies.items(), "large requests"):
        with probes_of(running, _OTHER) as probes:
            async with running.session(seconds=60) as session:
                await asyncio.sleep(1)
                answer = await ask(session, {"model": _FLOODED, **body})
                await asyncio.sleep(1)
        message = answer.message if answer.ending != "finished" else ""
        results[name] = {"status": answer.status, "seconds": answer.seconds, "message": message}
        results[name] |= probe_figures(probes)
    return results


def main() -> None:
    """Run the parts, print their figures, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=5000, help="of the flood [5000]")
    parser.add_argument("--tight-requests", type=int, default=600, help="with few slots [600]")
    parser.add_argument("--tries", type=int, default=4, help="of a client that is refused [4]")
    parser.add_argument("--port", type=int, help="of the server [a free one]")
    args = parser.parse_args()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # the server inherits it
    result: dict[str, Any] = {}
    with server(port=args.port) as running:
        bodies = flood_bodies(args.requests)
        result["flood"] = asyncio.run(many(running, bodies, args.tries, _OTHER))
        print("flood", json.dumps(result["flood"], indent=1), flush=True)
        result["fan"] = asyncio.run(fan(running))
        print("fan", json.dumps(result["fan"], indent=1), flush=True)
    slots = ["--expert-slots", str(2 * _EXPERTS_A_POOL), "--default-pool", _OTHER]
    with server(*slots, "--preload", _OTHER, port=args.port) as running:
        bodies = tight_bodies(args.tight_requests)
        result["tight"] = asyncio.run(many(running, bodies, args.tries, _OTHER))
        print("tight", json.dumps(result["tight"], indent=1), flush=True)
    print(f"appended to {append_result('reliability_overload', vars(args), result)}")


if __name__ == "__main__":
    main()
