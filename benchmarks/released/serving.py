"""Pools against all experts at the released size on a CPU: tokens/s, prefill, memory, start-up.

Makes a random checkpoint of the released sizes (`--layers`, 1.6 GiB each) and pools of 16 of its
128 experts, and compares servers on it in turn, as serving/throughput.py does:

    stock   vLLM's own API server and its own kernel, all experts in memory, no pools. vLLM has no
            class for EMO: the plugin's is used, kept from our kernel by hiding the compiler
    base    emo-serve with all experts in memory; every request in the base pool
    streamed  the same with slots for half of the experts: the base pool's are streamed
    one     emo-serve with slots for one pool; every request in it
    four    emo-serve with slots for four pools; requests in each of them, mixed
    *-spare the same, with a core left to the other processes, as vLLM does

Decoding: N clients at once, prompts of 8 tokens. Prefill: one client, prompts of 512 tokens, the
time to the first token. The weights are random, so nothing is said about accuracy.

    python -m benchmarks.released.serving --layers 4
    python -m benchmarks.released.serving --pairs one-spare:one four-spare:four
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness.page_cache import drop_from_page_cache
from benchmarks.harness.pairs import Spread, in_turn
from benchmarks.harness.random_checkpoint import write_pools
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from benchmarks.released.checkpoint import checkpoint_of
from benchmarks.serving.throughput import STOCK, load

POOLS = ("one", "two", "three", "four")
POOL_SIZE = 16
FLAGS = (
    *("--max-model-len", "1024", "--max-num-seqs", "32", "--dtype", "bfloat16"),
    *("--kv-cache-memory-bytes", str(2**30), "--no-enable-prefix-caching"),
    *("--served-model-name", "base"),
)


@dataclass(frozen=True)
class Load:
    """What clients send at once: `requests` each, one after the other."""

    what: str
    clients: int
    prompt: int
    tokens: int
    requests: int

    @property
    def name(self) -> str:
        """Return what tells it from the others."""
        return f"{self.what}-{self.clients}"


LOADS = (
    Load("prefill", clients=1, prompt=512, tokens=2, requests=4),
    Load("decode", clients=1, prompt=8, tokens=24, requests=4),
    Load("decode", clients=8, prompt=8, tokens=24, requests=2),
    Load("decode", clients=32, prompt=8, tokens=24, requests=2),
)


class Target(Protocol):
    """What is measured."""

    kind: str

    def rate(self, sent: Load) -> float:
        """Return tokens/s: of the prompt for prefill, of the answers for decoding."""


class Server(ServerProcess):
    """One of the kinds of server above."""

    def __init__(self, kind: str, model: Path, pools: Path, flags: Sequence[str] = ()) -> None:
        self.kind = kind
        base = kind.removesuffix("-spare")
        self.pools = POOLS if base == "four" else POOLS[:1]
        command = [sys.executable, "-m"]
        if base == "stock":
            command += [STOCK, "--model", str(model)]
        else:
            command += ["emo_serve", "serve", str(model), "--expert-slots"]
            if base in ("base", "streamed"):
                command += [str(num_experts(model) // (1 if base == "base" else 2))]
            else:
                command += [str(slots_for(pools / base)), "--stream-slots", "0"]
                command += ["--pools", str(pools / base)]
        variables = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"} if kind != base else {}
        if base == "stock":
            variables["CXX"] = shutil.which("false") or "false"
        super().__init__([*command, *FLAGS, *flags], variables=variables)

    def model_of(self, domain: str) -> str:
        """Return the model name for a request of a domain."""
        return "base" if self.kind.startswith(("stock", "base", "streamed")) else domain

    def texts_of(self, domain: str) -> list[list[int]]:
        """Return token ids that prompts of a domain are cut from."""
        return prompts_of(domain)

    def rate(self, sent: Load) -> float:
        """Load the server, which is suspended before and after."""
        with self.running():
            sample = asyncio.run(
                load(self, sent.clients, sent.requests, sent.tokens, prompt_characters=sent.prompt)
            )
        if sent.what == "prefill":
            return sent.prompt / sample.ttft_seconds
        return sample.tokens_per_second


def prompts_of(domain: str) -> list[list[int]]:
    """Return 64 prompts of 512 token ids: 32 clients at once send no two that are equal."""
    base = 1000 * POOLS.index(domain)
    return [[10 + (base + 37 * i + j * j + 7 * j) % 3000 for j in range(512)] for i in range(64)]


def slots_for(pools: Path) -> int:
    """Return the slots per layer that these pool files need together."""
    from emo_serve.pools.document import read_pool

    loaded = [read_pool(path) for path in sorted(pools.glob("*.json"))]
    layers = zip(*(pool.expert_ids for pool in loaded), strict=True)
    return max(len(set().union(*layer)) for layer in layers)


def num_experts(model: Path) -> int:
    """Return how many experts a layer has."""
    return int(json.loads((model / "config.json").read_text())["num_experts"])


def write_pool_files(place: Path, model: Path) -> Path:
    """Write the pools of each kind of server that has some; return the place."""
    for kind, names in (("one", POOLS[:1]), ("four", POOLS)):
        write_pools(place / kind, model, list(names), POOL_SIZE)
    return place


def add_load_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add --rounds and --loads, which `compare` takes."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"counted rounds [{rounds}]")
    names = [sent.name for sent in LOADS]
    parser.add_argument("--loads", nargs="+", choices=names, default=names, help="[all]")


def compare(a: Target, b: Target, rounds: int, loads: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row per load named: medians of both, and the ratio of each round."""
    rows = []
    for sent in LOADS:
        if sent.name not in loads:
            continue
        values = in_turn(rounds, *(partial(target.rate, sent) for target in (a, b)))
        rows.append(
            {"a": a.kind, "b": b.kind, "load": sent.what, "clients": sent.clients}
            | {"tokens_per_second": [statistics.median(each) for each in zip(*values, strict=True)]}
            | {"ratio": Spread.of_ratios(values).to_json()}
        )
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    rates = " | ".join(f"{rate:.1f}" for rate in row["tokens_per_second"])
    ratio = Spread(**row["ratio"])
    print(
        f"| {row['a']}, {row['b']} | {row['load']} | {row['clients']} | {rates} | {ratio} |",
        flush=True,
    )


def main() -> None:
    """Make the checkpoint, start the servers, measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="of the released 16 [4]")
    parser.add_argument("--pairs", nargs="+", default=["stock:one", "stock:four"], help="A:B ...")
    add_load_options(parser, rounds=5)
    parser.add_argument("--model", type=Path, help="an existing checkpoint [a temporary one]")
    parser.add_argument("--directory", type=Path, help="for the temporary checkpoint")
    parser.add_argument("--cold", action="store_true", help="servers start from the disk")
    parser.add_argument("--compiled", action="store_true", help="without --enforce-eager")
    args = parser.parse_args()
    flags = [] if args.compiled else ["--enforce-eager"]
    rows: list[dict[str, Any]] = []
    figures: dict[str, dict[str, float]] = {}
    servers: dict[str, Server] = {}
    with ExitStack() as stack:
        place, model = stack.enter_context(checkpoint_of(args))
        write_pool_files(place / "pools", model)

        def started(kind: str) -> Server:
            if kind not in servers:
                if args.cold:
                    drop_from_page_cache(model)
                server = stack.enter_context(Server(kind, model, place / "pools", flags))
                own = server.own_bytes() / 2**30
                figures[kind] = {"start_seconds": server.start_seconds, "own_gib": own}
                print(f"{kind}: up in {server.start_seconds:.0f} s, {own:.2f} GiB", flush=True)
                server.pause()
                servers[kind] = server
            return servers[kind]

        pairs = [[started(kind) for kind in pair.split(":")] for pair in args.pairs]
        print("| A, B | load | clients | A tok/s | B tok/s | B/A (min-max) |")
        print("|---|---|---|---|---|---|")
        for a, b in pairs:
            rows += compare(a, b, args.rounds, args.loads)
    append_result("released_serving", vars(args), {"rows": rows, "servers": figures})


if __name__ == "__main__":
    main()
