"""What recording the router costs the engine alone, in one process.

serving/coverage.py compares two servers, which differ by themselves. Here one engine of the shipped
model, in this process, is told to record or not from window to window. A round has three windows of
about a second each, whose order rotates: `on`, which ends by reading the sums, as a server does
once per second, and `off` twice, so that their ratio shows what is chance. There is no front end
and there are no clients, so the share is larger than a server's.

    python -m benchmarks.serving.recording
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is within reach

from vllm import LLM, SamplingParams

from benchmarks.harness.engines import engine_arguments, load_pools
from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from emo_serve import demo
from emo_serve.emo.config import load_config
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.vllm_plugin.contract import RequestTag
from emo_serve.vllm_plugin.slot_host import SlotHost, slot_host_of

_LOADS = {  # requests at once, prompt tokens, tokens
    "decode, 1": (1, 50, 128),
    "decode, 8": (8, 50, 128),
    "decode, 32": (32, 50, 128),
    "prefill, 8": (8, 480, 4),
}
_WINDOW_SECONDS = 1.0
_NUM_POOLS = 4


def start_engine(eager: bool) -> LLM:
    """Start an engine with every expert in a slot and the first shipped pools in rows 0, 1, ..."""
    layers = load_config(demo.model_dir()).moe_layers
    counts = [moe.num_experts if moe else 0 for moe in layers]
    pools = list(PoolCatalog.read(demo.pools_dir(), layers, None).pools.values())[:_NUM_POOLS]
    llm = LLM(
        **engine_arguments(demo.model_dir(), max(counts), len(pools)),
        enforce_eager=eager,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=32,
        kv_cache_memory_bytes=512 << 20,
        enable_prefix_caching=False,
    )
    copies = [[layer, e, e] for layer, count in enumerate(counts) for e in range(count)]
    load_pools(llm, copies, pools)
    return llm


class Recording:
    """Switch an engine's recording on and off."""

    def __init__(self, host: SlotHost) -> None:
        assert host.record is not None
        self._host, self.record = host, host.record

    def switch(self, is_on: bool) -> None:
        """Switch between two steps."""
        self._host.record = self.record if is_on else None
        for index, layer in self._host.layers.items():
            layer.record = self.record.of_layer[index] if is_on else None


def run(llm: LLM, load: Sequence[int]) -> None:
    """Let the engine answer one batch of requests."""
    count, prompt_tokens, tokens = load
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            extra_args=RequestTag(i % _NUM_POOLS, account=i + 1).to_extra_args(),
        )
        for i in range(count)
    ]
    prompts = [
        {"prompt_token_ids": [5 + (i * 7 + j * j) % 3000 for j in range(prompt_tokens)]}
        for i in range(count)
    ]
    llm.generate(prompts, params, use_tqdm=False)


def compare(batch: Callable[[], None], recording: Recording, rounds: int) -> dict[str, Any]:
    """Return the seconds of every window, and the rates relative to `off` in each round."""
    for _ in range(3):
        batch()
    start = time.perf_counter()
    batch()
    repeats = max(1, round(_WINDOW_SECONDS / (time.perf_counter() - start)))

    def window(kind: str) -> float:
        recording.switch(kind == "on")
        start = time.perf_counter()
        for _ in range(repeats):
            batch()
        if kind == "on":
            recording.record.read_coverage()
        return time.perf_counter() - start

    kinds = ["off", "on", "off again"]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in steps(range(rounds), "rounds"):
        turn = number % len(kinds)
        for kind in (*kinds[turn:], *kinds[:turn]):
            seconds[kind].append(window(kind))
    ratios = {}
    for kind in kinds[1:]:
        found = [off / mine for off, mine in zip(seconds["off"], seconds[kind], strict=True)]
        quarter, median, three_quarters = statistics.quantiles(found, n=4, method="inclusive")
        ratios[kind] = {"median": median, "quartiles": [quarter, three_quarters]}
    return {"repeats": repeats, "ratio": ratios, "seconds": seconds}


def main() -> None:
    """Measure every load, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="2 or more [15]")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compilation")
    args = parser.parse_args()
    llm = start_engine(args.eager)
    (host,) = llm.apply_model(slot_host_of)
    recording = Recording(host)
    print("| load, requests at once | on / off (quartiles) | off again / off (quartiles) |")
    print("|---|---|---|")
    rows = {}
    for name, load in _LOADS.items():
        row = compare(lambda load=load: run(llm, load), recording, args.rounds)  # type: ignore[misc]
        rows[name] = row
        cells = (
            "{median:.3f} ({quartiles[0]:.3f} to {quartiles[1]:.3f})".format(**found)
            for found in row["ratio"].values()
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    llm.llm_engine.engine_core.shutdown()
    print(f"appended to {append_result('recording', vars(args), rows)}")


if __name__ == "__main__":
    main()
