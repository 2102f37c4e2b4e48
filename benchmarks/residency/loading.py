"""Loads beside decoding: is the longest gap between two tokens longer while experts are loaded?

This process runs one engine. In a window, `--streams` requests of one pool decode `--tokens` tokens
each. In every second window the other pools are loaded and evicted one after the other without a
pause, through the calls the server makes; in the others nothing is loaded. A window's figure is its
longest gap between two tokens of one stream while all of them decode, so paired windows differ only
in the loads. The ratio of each pair, loading to quiet, is robust against a machine whose speed
drifts. The first pair warms up and is not counted. The same loads are made before each pair while
nothing decodes: what a load takes beside decoding is compared with that.

    python -m benchmarks.residency.loading                  # the model that ships
    python -m benchmarks.residency.loading --model wide     # random, 1.5 MiB an expert
    python -m benchmarks.residency.loading --model wide --host-memory 256   # MiB; reads no files
    python -m benchmarks.residency.loading --model released --pool-size 50 --streams 4
    python -m benchmarks.residency.loading --model released --pool-size 50 --streams 4 --cold
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import engine_arguments
from benchmarks.harness.page_cache import drop_from_page_cache
from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from benchmarks.residency.loading_models import MODELS, Pool, make_pools
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.residency.slots import SlotTable
from emo_serve.server.vllm_adapter.worker_calls import WorkerCalls
from emo_serve.vllm_plugin.contract import RequestTag

_SERVED_ROW, _LOADED_ROW = 0, 1
_PROMPT_TOKENS = 16
_IDLE_SECONDS = 0.3  # after a step, until a load takes the engine for idle


@dataclass
class Window:
    """What one window saw: every gap, and what was loaded in it."""

    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    loads: int = 0
    load_seconds: float = 0.0
    bytes_copied: int = 0
    bytes_read: int = 0
    host_hits: int = 0

    @property
    def longest(self) -> float:
        """Return the longest gap in seconds."""
        return max(self.gaps)


class Bench:
    """One engine with a pool to serve and others to load beside it."""

    def __init__(self, directory: Path, pools: Sequence[Pool], args: argparse.Namespace) -> None:
        self.args, self._directory = args, directory
        checkpoint = Checkpoint.open(directory)
        counts = checkpoint.facts.experts_per_layer
        self.served, *self.others = pools
        num_slots = max(
            len({*served, *other})
            for pool in self.others
            for served, other in zip(self.served, pool, strict=True)
        )
        self.table = SlotTable(counts, num_slots)
        self.llm = self._start(directory, num_slots)
        check = checkpoint.check_experts
        self.calls = WorkerCalls(self._rpc, lambda: bool(self.llm.errored), check)
        self._numbers = itertools.count()
        self._next_pool = itertools.cycle(self.others)

    def _start(self, directory: Path, num_slots: int) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        host_bytes = self.args.host_memory << 20
        engine_args = AsyncEngineArgs(
            **engine_arguments(directory, num_slots, 2, host_expert_bytes=host_bytes),
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=1024,
            max_num_seqs=self.args.streams,
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        return AsyncLLM.from_engine_args(engine_args)

    async def _rpc(self, method: str, call_args: tuple[Any, ...]) -> Any:
        return await self.llm.collective_rpc(method, args=call_args)

    async def window(self, *, is_loading: bool) -> Window:
        """Decode every stream once, with or without loads beside it."""
        seen, start = Window(), time.perf_counter()
        streams = [asyncio.create_task(self._stream()) for _ in range(self.args.streams)]
        if is_loading:
            while not all(stream.done() for stream in streams):
                await self._load(next(self._next_pool), seen)
        arrivals = await asyncio.gather(*streams)
        seen.seconds = time.perf_counter() - start
        seen.gaps = gaps_while_all_decode(arrivals)
        return seen

    async def idle(self) -> Window:
        """Load one pool while nothing decodes."""
        await asyncio.sleep(_IDLE_SECONDS)
        seen = Window()
        await self._load(next(self._next_pool), seen)
        return seen

    async def load_served(self) -> None:
        """Load the pool of the streams."""
        plan = self.table.plan_load("served", self.served)
        self.table.begin(plan)
        await self.calls.make_resident(_SERVED_ROW, self.served, 1.0, plan.copies)
        self.table.finish("served")

    async def _load(self, pool: Pool, seen: Window) -> None:
        if self.args.cold:
            await asyncio.to_thread(drop_from_page_cache, self._directory)
        plan = self.table.plan_load("loaded", pool)
        self.table.begin(plan)
        self.calls.check_readable(plan.copies)
        report = await self.calls.make_resident(_LOADED_ROW, pool, 1.0, plan.copies)
        self.table.finish("loaded")
        self.table.evict("loaded")
        seen.loads += 1
        seen.load_seconds += report.seconds
        seen.bytes_copied += report.bytes_copied
        seen.bytes_read += report.bytes_read
        seen.host_hits += report.host_hits

    async def _stream(self) -> list[float]:
        """Decode one request; return when each token came."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = next(self._numbers)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self.args.tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=RequestTag(_SERVED_ROW).to_extra_args(),
        )
        prompt = {"prompt_token_ids": [5 + (number * 31 + i) % 200 for i in range(_PROMPT_TOKENS)]}
        outputs = self.llm.generate(prompt, params, f"stream-{number}")
        return [time.perf_counter() async for _ in outputs]


def gaps_while_all_decode(arrivals: Sequence[Sequence[float]]) -> list[float]:
    """Return the gaps between tokens of a stream while every stream is decoding."""
    start = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    return [
        after - before
        for times in arrivals
        for before, after in itertools.pairwise(times)
        if start <= before and after <= end
    ]


# -- running --


async def run(directory: Path, pools: Sequence[Pool], args: argparse.Namespace) -> dict[str, Any]:
    """Alternate quiet and loading windows; return the figures."""
    bench = Bench(directory, pools, args)
    try:
        await bench.load_served()
        windows: dict[str, list[Window]] = {"quiet": [], "loading": [], "idle": []}
        for pair in steps(range(args.pairs + 1), "pairs"):
            # The order alternates too, since a drift would favour the second.
            order = ("quiet", "loading") if pair % 2 else ("loading", "quiet")
            windows["idle"].append(await bench.idle())
            for kind in order:
                window = await bench.window(is_loading=kind == "loading")
                if pair:
                    windows[kind].append(window)
        return summarise(windows, args)
    finally:
        bench.llm.shutdown()


def summarise(windows: dict[str, list[Window]], args: argparse.Namespace) -> dict[str, Any]:
    """Return medians over windows and the ratio of each pair."""
    quiet, loading = windows["quiet"], windows["loading"]
    ratios = sorted(b.longest / a.longest for a, b in zip(quiet, loading, strict=True))
    loads = sum(window.loads for window in loading)
    load_ms = 1e3 * sum(window.load_seconds for window in loading) / loads
    idle_ms = 1e3 * statistics.median(window.load_seconds for window in windows["idle"])

    def side(found: list[Window]) -> dict[str, Any]:
        gaps = sorted(gap for window in found for gap in window.gaps)
        tokens = args.streams * args.tokens
        return {
            "longest_gaps_ms": [1e3 * window.longest for window in found],
            "longest_gap_ms": 1e3 * statistics.median(window.longest for window in found),
            "median_gap_ms": 1e3 * statistics.median(gaps),
            "p99_gap_ms": 1e3 * gaps[int(0.99 * len(gaps))],
            "p999_gap_ms": 1e3 * gaps[int(0.999 * len(gaps))],
            "tokens_per_second": tokens / statistics.median(window.seconds for window in found),
        }

    return {
        "quiet": side(quiet),
        "loading": side(loading),
        "ratio_of_medians": (
            statistics.median(w.longest for w in loading)
            / statistics.median(w.longest for w in quiet)
        ),
        "pair_ratio": {
            "median": statistics.median(ratios),
            "min": ratios[0],
            "max": ratios[-1],
        },
        "loads": loads,
        "load_ms": load_ms,
        "idle_load_ms": idle_ms,
        "load_ratio": load_ms / idle_ms,
        "mib_copied_a_load": sum(window.bytes_copied for window in loading) / loads / 2**20,
        "mib_read_a_load": sum(window.bytes_read for window in loading) / loads / 2**20,
        "host_hits_a_load": sum(window.host_hits for window in loading) / loads,
    }


def main() -> None:
    """Measure one model, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--layers", type=int, default=2, help="of the released width [2]")
    parser.add_argument("--pool-size", type=int, default=16, help="experts per layer to load [16]")
    parser.add_argument("--cold", action="store_true", help="read each load from the disk")
    parser.add_argument("--streams", type=int, default=8, help="requests at once [8]")
    parser.add_argument("--tokens", type=int, default=400, help="tokens per request [400]")
    parser.add_argument("--pairs", type=int, default=12, help="counted pairs of windows [12]")
    parser.add_argument("--host-memory", type=int, default=0, help="MiB of host memory [0]")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory, pools = make_pools(args.model, Path(scratch), args.layers, args.pool_size)
        result = asyncio.run(run(directory, pools, args))
    print("| windows | longest gap ms (median) | p99.9 | p99 | median | tok/s |")
    print("|---|---|---|---|---|---|")
    for kind in ("quiet", "loading"):
        row = result[kind]
        print(
            f"| {kind} | {row['longest_gap_ms']:.1f} | {row['p999_gap_ms']:.1f}"
            f" | {row['p99_gap_ms']:.1f} | {row['median_gap_ms']:.2f}"
            f" | {row['tokens_per_second']:.0f} |"
        )
    pair = result["pair_ratio"]
    print(
        f"longest gap, loading / quiet: {result['ratio_of_medians']:.2f} of medians;"
        f" {pair['median']:.2f} median of {args.pairs} pairs"
        f" ({pair['min']:.2f} to {pair['max']:.2f})"
    )
    print(
        f"{result['loads']} loads of {result['mib_copied_a_load']:.1f} MiB,"
        f" {result['load_ms']:.0f} ms each, {result['load_ratio']:.2f} times the"
        f" {result['idle_load_ms']:.0f} ms at idle, {result['mib_read_a_load']:.1f} MiB read,"
        f" {result['host_hits_a_load']:.1f} host hits"
    )
    if not args.no_record:
        arguments = {key: value for key, value in vars(args).items() if key != "no_record"}
        print(f"appended to {append_result('loading', arguments, result)}")


if __name__ == "__main__":
    main()
