"""What recording the router costs: two servers of the shipped model, one that does not record.

Coverage and usage come from what the workers record of every token's gate. Both servers live the
whole time; the one that is not being measured is suspended (SIGSTOP). A round sends the same
requests in three windows, whose order rotates from round to round:

    off     the server that does not record (EMO_SERVE_RECORD_ROUTING=0), the baseline
    on      the one that does, as served: its sums are read once per second
    told    the same, and every request asks for its coverage, which is read when it ends

Rates count generated tokens. The ratios to `off` within each round are robust against a machine
whose speed drifts; their median and quartiles over rounds are the result. Two processes of the same
program may differ by themselves: `--control` starts both without recording, and its ratios tell how
far from 1 that alone takes them.

Loads are `decode` (short prompts, `--tokens` tokens each, at each `--concurrency`) and `prefill`
(whole held-out texts, 4 tokens each, 8 clients). A window takes seconds; everything takes about a
quarter of an hour with two cores.

    python -m benchmarks.serving.coverage
    python -m benchmarks.serving.coverage --control
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.serving.throughput import Sample, Server, load
from emo_serve import demo

_WITHOUT = {"EMO_SERVE_RECORD_ROUTING": "0"}
_TOLD = {"x-emo-coverage": "true"}
_DECODE_CHARACTERS, _PREFILL_CHARACTERS = 200, 2000
_PREFILL_TOKENS, _PREFILL_CLIENTS = 4, 8
_LEAST_REQUESTS = 32  # of all clients, that a window is no matter of a second


@dataclass(frozen=True)
class Load:
    """What every window of a row sends."""

    name: str
    concurrency: int
    requests: int
    tokens: int
    prompt_characters: int


@dataclass(frozen=True)
class Window:
    """Which server answers, and what its requests ask for."""

    server: Server
    headers: Mapping[str, str]

    def measure(self, load_of: Load) -> Sample:
        """Send the load with no other server on the cores."""
        self.server.resume()
        sample = asyncio.run(
            load(
                self.server,
                load_of.concurrency,
                load_of.requests,
                load_of.tokens,
                prompt_characters=load_of.prompt_characters,
                headers=self.headers,
            )
        )
        self.server.pause()
        return sample


def compare(windows: Mapping[str, Window], load_of: Load, rounds: int) -> dict[str, Any]:
    """Measure every window in each round; return rates and the ratios to `off`."""
    rates: dict[str, list[float]] = {kind: [] for kind in windows}
    kinds = list(windows)
    for number in range(rounds + 1):
        turn = number % len(kinds)
        for kind in (*kinds[turn:], *kinds[:turn]):
            rate = windows[kind].measure(load_of).tokens_per_second
            if number:  # the first round warms up
                rates[kind].append(rate)
    ratios = {
        kind: _spread([mine / off for mine, off in zip(rates[kind], rates["off"], strict=True)])
        for kind in kinds
        if kind != "off"
    }
    return {
        "load": vars(load_of),
        "tokens_per_second": {kind: statistics.median(found) for kind, found in rates.items()},
        "ratio": ratios,
    }


def _spread(values: list[float]) -> dict[str, Any]:
    quarter, _, three_quarters = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "quartiles": [quarter, three_quarters],
        "all": [round(value, 4) for value in values],
    }


def loads_of(args: argparse.Namespace) -> list[Load]:
    """Return the loads to measure."""
    decode = [
        Load(
            "decode",
            count,
            max(args.requests, _LEAST_REQUESTS // count),
            args.tokens,
            _DECODE_CHARACTERS,
        )
        for count in args.concurrency
    ]
    requests = 4 * args.requests
    prefill = Load("prefill", _PREFILL_CLIENTS, requests, _PREFILL_TOKENS, _PREFILL_CHARACTERS)
    return [*decode, prefill]


def main() -> None:
    """Start both servers, measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds, 2 or more [15]")
    parser.add_argument("--requests", type=int, default=8, help="requests per client and round [8]")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per request [64]")
    parser.add_argument("--pools", nargs="+", default=demo.domains()[:4], help="pools mixed")
    parser.add_argument("--control", action="store_true", help="neither server records")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        off = stack.enter_context(Server("emo", args.pools, _WITHOUT))
        off.pause()
        on = stack.enter_context(Server("emo", args.pools, _WITHOUT if args.control else {}))
        on.pause()
        windows = {"off": Window(off, {}), "on": Window(on, {}), "told": Window(on, _TOLD)}
        print("| load | clients | off tok/s | on / off (quartiles) | told / off (quartiles) |")
        print("|---|---|---|---|---|")
        for load_of in steps(list(loads_of(args)), "loads"):
            row = compare(windows, load_of, args.rounds)
            rows.append(row)
            cells = (
                f"{found['median']:.3f} ({found['quartiles'][0]:.3f}-{found['quartiles'][1]:.3f})"
                for found in row["ratio"].values()
            )
            say(
                f"| {load_of.name} | {load_of.concurrency} | {row['tokens_per_second']['off']:.0f}"
                f" | {' | '.join(cells)} |"
            )
    if not args.no_record:
        arguments = {key: value for key, value in vars(args).items() if key != "no_record"}
        print(f"appended to {append_result('coverage', arguments, {'rows': rows})}")


if __name__ == "__main__":
    main()
