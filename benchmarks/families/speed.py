"""A model of another family on emo-serve against stock vLLM, in pairs: start-up and tokens/s.

    python -m benchmarks.families.speed                          # OLMoE
    python -m benchmarks.families.speed --starts 0               # tokens/s alone
    python -m benchmarks.families.speed --rounds 0 --starts 2    # start-up alone

Both have one tiny checkpoint of random weights in bfloat16, all experts in memory and vLLM's
default compilation: what differs is emo-serve's front end, its pool rows, and who computes the
experts. Servers start in turn; the first pair is not counted, since vLLM may compile for it. Then
one of each lives, suspended while the other is measured, as in serving/throughput.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.families.models import MODELS, write_checkpoint
from benchmarks.harness.pairs import Spread, in_turn
from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.serving.throughput import STOCK, Server, compare
from emo_serve import demo


class FamilyServer(Server):
    """`stock` or `ours` on a checkpoint directory; prompts are the held-out texts that ship."""

    def __init__(self, kind: str, directory: Path) -> None:
        self._directory = directory
        super().__init__(kind, demo.domains()[:4])

    def _command(self) -> list[str]:
        if self.base == "stock":
            return [sys.executable, "-m", STOCK, "--model", str(self._directory)]
        return [sys.executable, "-m", "emo_serve", "serve", str(self._directory)]

    def model_of(self, domain: str) -> str:
        """Return the name that both give the model."""
        return "emo-demo"


def _start_seconds(kind: str, directory: Path) -> float:
    with FamilyServer(kind, directory) as server:
        return server.start_seconds


def _starts(directory: Path, count: int) -> dict[str, Any]:
    both = (partial(_start_seconds, kind, directory) for kind in ("stock", "ours"))
    rounds = in_turn(count, *both)
    stock, ours = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    ratio = Spread.of_ratios(rounds)
    say(f"start-up: stock {stock:.1f} s, ours {ours:.1f} s, ours / stock {ratio}")
    return {"stock": stock, "ours": ours, "ratio": ratio.to_json()}


def _rates(directory: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        servers = []
        for kind in ("stock", "ours"):
            servers.append(stack.enter_context(FamilyServer(kind, directory)))
            servers[-1].pause()
        print(
            "| concurrent | stock tok/s | ours tok/s | ours / stock (min-max) |\n|---|---|---|---|"
        )
        for concurrency in steps(args.concurrency, "loads"):
            row = compare(*servers, concurrency, args)
            rows.append(row)
            stock, ours = (row[place]["tokens_per_second"] for place in "ab")
            say(f"| {concurrency} | {stock:.0f} | {ours:.0f} | {Spread(**row['ratio'])} |")
    return rows


def main() -> None:
    """Measure both, print, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--family", choices=MODELS, default="olmoe")
    parser.add_argument("--starts", type=int, default=2, help="counted starts of each [2]")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds [7]")
    parser.add_argument("--requests", type=int, default=4, help="requests per client and round [4]")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per request [64]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_checkpoint(args.family, Path(scratch) / args.family)
        starts = _starts(directory, args.starts) if args.starts else None
        rows = _rates(directory, args) if args.rounds else []
    result = {"start_seconds": starts, "rows": rows}
    print(f"appended to {append_result('families_speed', vars(args), result)}")


if __name__ == "__main__":
    main()
