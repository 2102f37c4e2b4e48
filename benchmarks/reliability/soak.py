"""Hours of mixed load on one server: what grows, what fails, what a request costs at the end.

The load (`traffic.py`) is moderate: `--clients` ask and pause in turn, beside an operator. Every
`--sample-seconds` it samples what front end, engine and worker hold. Growth per hour is the slope
over the second half of the run: by then every block of the (small) KV cache has been touched. A
probe, a short completion in a pinned pool, is sent all the time from a process of its own.

    python -m benchmarks.reliability.soak                # an hour
    python -m benchmarks.reliability.soak --minutes 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from typing import Any

from benchmarks.harness.progress import part_of, say
from benchmarks.harness.results import append_result
from benchmarks.reliability.probes import Probe, Probes
from benchmarks.reliability.sampling import ServerSample, growth, take_sample
from benchmarks.reliability.server import Server, is_alive, server, shared_memory_of
from benchmarks.reliability.state import refusals, residency, until_idle
from benchmarks.reliability.summary import percentiles, tenths
from benchmarks.reliability.traffic import Traffic

_PINNED = "python"
_PROBES = {
    "completion": Probe(
        "/v1/completions",
        {"model": _PINNED, "prompt": "def add(a, b):", "max_tokens": 8, "ignore_eos": True},
        pause_seconds=1.0,
    ),
    "health": Probe("/health", pause_seconds=1.0),
}


async def load(running: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Load the server until the time is up; return counts, samples and what is left in it."""
    samples: list[ServerSample] = []
    start = time.monotonic()
    end = start + 60 * args.minutes

    async def sample() -> None:
        shown = 0
        while (now := time.monotonic()) < end:
            samples.append(await asyncio.to_thread(take_sample, running, now - start))
            if running.process.poll() is not None:
                raise SystemExit(f"the server ended: {running.last_words()}")
            if (now - start) * 10 / (end - start) >= shown:
                shown += 1
                total = sum(traffic.counts.values())
                say(f"{now - start:.0f} s, {total} requests, {_memory(samples[-1])}")
            await asyncio.sleep(min(args.sample_seconds, max(0.1, end - now)))
            passed(time.monotonic() - now)

    async with running.session() as session:
        traffic = Traffic(session)
        with Probes(running, _PROBES) as probes, part_of(end - start, "soak") as passed:
            clients = [traffic.client(end, args.pause) for _ in range(args.clients)]
            await asyncio.gather(sample(), traffic.operator(end, args.operator_pause), *clients)
    async with running.observer() as observer:
        idle_seconds = await until_idle(observer)
        samples.append(take_sample(running, time.monotonic() - start))
        tables, refused = await residency(observer), await refusals(observer)
    return {
        "minutes": args.minutes,
        "requests": sum(traffic.counts.values()),
        "counts": dict(sorted(traffic.counts.items())),
        "refused": refused,
        "surprises": traffic.surprises,
        "probes": {
            name: {
                "not_200": sum(probe.status != 200 for probe in found),
                "all": percentiles([probe.seconds for probe in found]),
                "tenths": tenths([(probe.sent, probe.seconds) for probe in found], start, end),
            }
            for name, found in probes.samples.items()
        },
        "growth": growth(samples),
        "idle_after_seconds": idle_seconds,
        "residency": tables,
    }


def _memory(sample: ServerSample) -> str:
    sizes = (f"{role} {held.pss_bytes >> 20} MiB" for role, held in sample.roles.items())
    return ", ".join(sizes)


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Start the server, load it, stop it; return all figures."""
    flags = ["--expert-slots", str(args.slots), "--preload", "", "--pin", _PINNED]
    flags += ["--default-pool", _PINNED, "--kv-cache-memory-bytes", str(args.kv_cache_mib << 20)]
    with server(*flags, port=args.port) as running:
        result = asyncio.run(load(running, args))
        processes = running.processes()
        segments = shared_memory_of(processes)
        status, seconds = running.stop()
        time.sleep(1)
        result["stop"] = {"exit_status": status, "seconds": seconds}
        result["left"] = {
            "processes": sum(map(is_alive, processes)),
            "shared_memory": sum(map(os.path.exists, segments)),
            "temporary_files": len(running.temporary_files()),
        }
    return result


def print_tables(result: dict[str, Any]) -> None:
    """Print growth and probes as tables."""
    print("| process | what | first | middle | last | growth per hour |\n|---|---|---|---|---|---|")
    for role, quantities in result["growth"].items():
        for name, row in quantities.items():
            scale, unit = (2**20, " MiB") if name.endswith("_bytes") else (1, "")
            cells = [f"{row[key] / scale:.1f}{unit}" for key in ("first", "middle", "last")]
            label = name.removesuffix("_bytes").replace("_", " ")
            change = f"{row['per_hour'] / scale:+.2f}{unit}"
            print(f"| {role} | {label} | {' | '.join(cells)} | {change} |")
    for name, probe in result["probes"].items():
        rows = [part for part in probe["tenths"] if part["count"]]
        p50, p99 = (", ".join(f"{1e3 * part[key]:.0f}" for part in rows) for key in ("p50", "p99"))
        print(f"{name} by tenth, ms: p50 {p50}; p99 {p99}; not 200: {probe['not_200']}")
    for key in ("requests", "counts", "refused", "surprises", "idle_after_seconds", "residency"):
        print(f"{key}: {json.dumps(result[key])}")
    print(f"stop: {json.dumps(result['stop'])}; left: {json.dumps(result['left'])}")


def main() -> None:
    """Run the soak, print tables, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=60, help="how long to load [60]")
    parser.add_argument("--clients", type=int, default=6, help="clients at once [6]")
    parser.add_argument("--pause", type=float, default=0.5, help="a client's mean pause, s [0.5]")
    parser.add_argument("--operator-pause", type=float, default=3, help="the operator's, s [3]")
    parser.add_argument("--sample-seconds", type=float, default=10, help="between samples [10]")
    parser.add_argument("--slots", type=int, default=24, help="expert slots per layer [24]")
    parser.add_argument("--kv-cache-mib", type=int, default=64, help="size of the KV cache [64]")
    parser.add_argument("--port", type=int, help="of the server [a free one]")
    args = parser.parse_args()
    result = soak(args)
    print_tables(result)
    print(f"appended to {append_result('reliability_soak', vars(args), result)}")


if __name__ == "__main__":
    main()
