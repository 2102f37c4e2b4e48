"""Servers of the memory-accuracy benchmark, their pools, and the memory they report.

The figures are those that a server reports: the trunk in its start-up summary, the slab as
`/v1/pools` counts its slots. They leave out KV cache and activations, which do not depend on the
experts kept.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.accuracy.scoring import Endpoint, score_domain
from benchmarks.accuracy.texts import Domain
from benchmarks.harness.servers import ServerProcess
from emo_serve.pools.document import write_pool
from emo_serve.pools.pool import ExpertPool

__all__ = ["memory_of", "pools_served", "serve", "small_server"]

GIB = 2**30


@contextmanager
def serve(model: Path, flags: Sequence[str]) -> Iterator[tuple[Endpoint, dict[str, float]]]:
    """Start `emo-serve serve`; yield its endpoint and the memory it reports."""
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "emo_serve", "serve", str(model), *flags]
        with (
            ServerProcess(command, output) as process,
            httpx.Client(base_url=process.url, timeout=600) as http,
        ):
            endpoint = Endpoint(http)
            output.seek(0)
            yield endpoint, memory_of(output.read().decode(), endpoint.ask("GET", "/v1/pools"))


def memory_of(summary: str, pools: Mapping[str, Any]) -> dict[str, float]:
    """Return GiB of trunk and slab, from a start-up summary and the answer of `/v1/pools`."""
    found = re.search(r"^  trunk +([\d.]+) (GiB|bytes)", summary, re.MULTILINE)
    if found is None:
        raise SystemExit(f"the server's summary names no trunk: {summary[:500]!r}")
    trunk = float(found[1]) / (1 if found[2] == "GiB" else GIB)
    slab = pools["slots"]["total"] * pools["slots"]["bytes_per_slot"] / GIB
    return {"trunk_gib": trunk, "slab_gib": slab, "gib": trunk + slab}


@contextmanager
def pools_served(endpoint: Endpoint, pools: Sequence[ExpertPool]) -> Iterator[None]:
    """Register pools, and remove them on exit."""
    with tempfile.TemporaryDirectory() as directory:
        for pool in pools:
            write_pool(pool, Path(directory) / "pool.json")
            document = (Path(directory) / "pool.json").read_bytes()
            endpoint.ask("POST", "/v1/pools", content=document)
    yield
    for pool in pools:
        endpoint.ask("DELETE", f"/v1/pools/{pool.name}")


def small_server(
    model: Path, flags: Sequence[str], slots: int, pool: ExpertPool, domain: Domain
) -> dict[str, float]:
    """Return the memory of a server with so many slots per layer, and a domain's loss in `pool`."""
    with tempfile.TemporaryDirectory() as directory:
        write_pool(pool, Path(directory) / f"{pool.name}.json")
        flags = [*flags, "--expert-slots", str(slots), "--pools", directory]
        with serve(model, flags) as (endpoint, memory):
            loss = score_domain(endpoint, pool.name, domain).loss
            return {**memory, "first_domain_loss": loss}
