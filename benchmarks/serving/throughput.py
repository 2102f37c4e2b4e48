"""Paired serving benchmark: two servers on one checkpoint, loaded in turn, compared by round.

Both servers live the whole time, but the one that is not being measured is suspended (SIGSTOP): an
idle vLLM worker polls, and both are bound to the same cores. A round sends the same requests to A,
then to B: N clients at once, each sending `--requests` one after the other, with prompts from the
held-out texts of four domains, mixed, `--tokens` tokens each, greedy, streamed. Rates count
generated tokens; the ratio B/A of each round is robust against a machine whose speed drifts, a
single rate is not.

Kinds of server (`--a`, `--b`):
    stock       vLLM's own API server with the plugin, all experts, no pools (the base pool)
    emo         emo-serve, all experts resident, each request in its domain's pool
    emo-base    emo-serve, all experts resident, every request in the base pool
    emo-slots   emo-serve with room for the four pools only
    *-ngram     the same with n-gram speculative decoding, 4 tokens drafted
    *-eager     the same with --enforce-eager
    *-spare     the same, with a core left to the other processes, as vLLM does

With `--repeated` a prompt is the beginning of a text twice, and then its first half: a model that
copies what it reads, as in edits of code, goes on with the second half.

    python -m benchmarks.serving.throughput --a stock --b emo
    python -m benchmarks.serving.throughput --a emo --b emo-eager
    python -m benchmarks.serving.throughput --a emo --b emo-ngram --repeated \
        --pools python javascript c html
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from benchmarks.harness.pairs import Spread, in_turn
from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.harness.servers import ServerProcess
from emo_serve import demo

STOCK = "vllm.entrypoints.launchers.api_server.entry"
"""The module of vLLM's own API server."""

_PROMPT_CHARACTERS = 200
_REPEATED_CHARACTERS = 3 * _PROMPT_CHARACTERS  # at most
_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2}
_ENGINE_FLAGS = (
    *("--max-model-len", "1024", "--max-num-seqs", "32", "--dtype", "bfloat16"),
    *("--kv-cache-memory-bytes", str(512 << 20), "--no-enable-prefix-caching"),
)


@dataclass(frozen=True)
class Sample:
    """One load of one server."""

    tokens_per_second: float
    ttft_seconds: float
    gap_seconds: float


class Server(ServerProcess):
    """One of the kinds of server above, asked with plain texts or repeated ones.

    `variables` are added to its environment.
    """

    def __init__(
        self,
        kind: str,
        pools: Sequence[str],
        variables: Mapping[str, str] | None = None,
        *,
        is_repeated: bool = False,
    ) -> None:
        self.kind, self.is_repeated = kind, is_repeated
        self.base = kind.removesuffix("-spare").removesuffix("-eager").removesuffix("-ngram")
        self.pools = pools
        flags = [*_ENGINE_FLAGS, "--served-model-name", "emo-demo"]
        if "-eager" in kind:
            flags.append("--enforce-eager")
        if "-ngram" in kind:
            flags += ["--speculative-config", json.dumps(_NGRAM)]
        if kind.endswith("-spare"):
            variables = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"} | dict(variables or {})
        super().__init__([*self._command(), *flags], variables=variables)

    def _command(self) -> list[str]:
        model = str(demo.model_dir())
        if self.base == "stock":
            return [sys.executable, "-m", STOCK, "--model", model]
        command = [sys.executable, "-m", "emo_serve", "serve", model]
        command += ["--pools", str(demo.pools_dir()), "--preload", ",".join(self.pools)]
        if self.base == "emo-slots":
            command += ["--expert-slots", str(slots_for(self.pools))]
        elif self.base not in ("emo", "emo-base"):
            raise SystemExit(f"unknown kind of server {self.kind!r}")
        return command

    def model_of(self, domain: str) -> str:
        """Return the model name for a request of a domain."""
        return domain if self.base in ("emo", "emo-slots") else "emo-demo"

    def texts_of(self, domain: str) -> list[str]:
        """Return the texts that prompts of a domain are cut from."""
        texts = demo.heldout(domain)
        return (
            [_repeated(text[:_PROMPT_CHARACTERS]) for text in texts] if self.is_repeated else texts
        )


def _repeated(text: str) -> str:
    return f"{text}\n{text}\n{text[: len(text) // 2]}"


def slots_for(pools: Sequence[str]) -> int:
    """Return the slots per layer that these pools need together."""
    files = [json.loads((demo.pools_dir() / f"{name}.json").read_text()) for name in pools]
    layers = zip(*(file["layers"] for file in files), strict=True)
    return max(len({e for layer in row if layer for e in layer["experts"]}) for row in layers)


async def load(
    server: Server,
    concurrency: int,
    requests: int,
    tokens: int,
    *,
    prompt_characters: int = _PROMPT_CHARACTERS,
    headers: Mapping[str, str] | None = None,
) -> Sample:
    """Let `concurrency` clients send `requests` each, after one request that is not counted."""
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=600, limits=limits, headers=headers
    ) as client:
        await request(client, server, 0, tokens, prompt_characters)

        async def one_client(number: int) -> list[list[float]]:
            numbers = range(number, concurrency * requests, concurrency)
            return [
                await request(client, server, index, tokens, prompt_characters) for index in numbers
            ]

        start = time.perf_counter()
        answers = await asyncio.gather(*map(one_client, range(concurrency)))
        seconds = time.perf_counter() - start
    times = [answer for client_answers in answers for answer in client_answers]
    return Sample(
        tokens_per_second=concurrency * requests * tokens / seconds,
        ttft_seconds=statistics.median(arrivals[1] - arrivals[0] for arrivals in times),
        gap_seconds=statistics.mean(
            (arrivals[-1] - arrivals[1]) / (tokens - 1) for arrivals in times
        ),
    )


async def request(
    client: httpx.AsyncClient,
    server: Server,
    index: int,
    tokens: int,
    prompt_characters: int = _PROMPT_CHARACTERS,
) -> list[float]:
    """Stream one completion; return when it was sent and then when each chunk came."""
    domain = server.pools[index % len(server.pools)]
    texts = server.texts_of(domain)
    body: dict[str, Any] = {
        "model": server.model_of(domain),
        "prompt": texts[index % len(texts)][:prompt_characters],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    arrivals = [time.perf_counter()]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{server.kind}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.perf_counter())
    return arrivals


def compare(a: Server, b: Server, concurrency: int, args: argparse.Namespace) -> dict[str, Any]:
    """Load both in turn; return medians and the ratio's spread."""

    def measure(server: Server) -> Sample:
        with server.running():
            characters = _REPEATED_CHARACTERS if server.is_repeated else _PROMPT_CHARACTERS
            return asyncio.run(
                load(
                    *(server, concurrency, args.requests, args.tokens),
                    prompt_characters=characters,
                )
            )

    rounds = in_turn(args.rounds, partial(measure, a), partial(measure, b))
    samples = dict(zip("ab", zip(*rounds, strict=True), strict=True))
    ratio = Spread.of_ratios([[sample.tokens_per_second for sample in pair] for pair in rounds])

    def median(key: str, field: str) -> float:
        return statistics.median(getattr(sample, field) for sample in samples[key])

    fields = ("tokens_per_second", "ttft_seconds", "gap_seconds")
    return {
        "concurrency": concurrency,
        "a": {field: median("a", field) for field in fields},
        "b": {field: median("b", field) for field in fields},
        "ratio": ratio.to_json(),
    }


def main() -> None:
    """Start both servers, measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--a", default="stock", help="first server, the baseline [stock]")
    parser.add_argument("--b", default="emo", help="second server [emo]")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds [7]")
    parser.add_argument("--requests", type=int, default=8, help="requests per client and round [8]")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per request [64]")
    parser.add_argument("--pools", nargs="+", default=demo.domains()[:4], help="pools mixed")
    parser.add_argument("--repeated", action="store_true", help="prompts that repeat their text")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with ExitStack() as stack:
        a = stack.enter_context(Server(args.a, args.pools, is_repeated=args.repeated))
        a.pause()
        b = stack.enter_context(Server(args.b, args.pools, is_repeated=args.repeated))
        b.pause()
        print(f"A = {a.kind}, up in {a.start_seconds:.0f} s; B = {b.kind}, {b.start_seconds:.0f} s")
        print("| concurrent | A tok/s | B tok/s | B/A (min-max) | TTFT ms A, B | gap ms A, B |")
        print("|---|---|---|---|---|---|")
        for concurrency in steps(args.concurrency, "loads"):
            row = compare(a, b, concurrency, args)
            results.append(row)
            ratio = Spread(**row["ratio"])
            ttft, gap = ([1e3 * row[k][f] for k in "ab"] for f in ("ttft_seconds", "gap_seconds"))
            say(
                f"| {concurrency} | {row['a']['tokens_per_second']:.0f}"
                f" | {row['b']['tokens_per_second']:.0f}"
                f" | {ratio}"
                f" | {ttft[0]:.0f}, {ttft[1]:.0f} | {gap[0]:.1f}, {gap[1]:.1f} |"
            )
        starts = {"a": a.start_seconds, "b": b.start_seconds}
    outcome = {"rows": results, "start_seconds": starts}
    print(f"appended to {append_result('serving', vars(args), outcome)}")


if __name__ == "__main__":
    main()
