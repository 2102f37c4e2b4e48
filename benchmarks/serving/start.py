"""What start-up costs: seconds, bytes read, the worker's peak memory; then tokens/s.

One engine per row, each in a process of its own: two of a model's pools against all experts, with
vLLM's default compilation and with --enforce-eager. `peak` is the worker process's largest resident
set; `over empty` subtracts that of the same engine before any expert was loaded, taken in the same
process. Rates are of `--tokens` tokens per request, greedy, pools mixed, after one warm-up.

    python -m benchmarks.serving.start                       # the model that ships
    python -m benchmarks.serving.start --model DIR --pools DIR --first 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import ROOT, append_result
from emo_serve import demo

_MARK = "BENCH_START "
_VARIANTS = (("pools", False), ("all", False), ("pools", True), ("all", True))


def measure(args: argparse.Namespace, experts: str, eager: bool) -> dict[str, Any]:
    """Start one engine, load its experts, generate; return the figures. Runs in its own process."""
    from vllm import LLM, SamplingParams

    from benchmarks.harness.engines import engine_arguments, load_pools
    from emo_serve.emo.config import load_config
    from emo_serve.pools.catalog import PoolCatalog
    from emo_serve.pools.pool import ExpertPool
    from emo_serve.residency.slots import SlotTable
    from emo_serve.vllm_plugin.contract import RequestTag

    layers = load_config(args.model).moe_layers
    catalog = PoolCatalog.read(args.pools, layers, None)
    pools = list(catalog.pools.values())[: args.first]
    wanted = pools if experts == "pools" else [ExpertPool.base(layers), *pools]
    counts = [moe.num_experts if moe else 0 for moe in layers]
    needed = [{e for pool in wanted for e in pool.expert_ids[i]} for i in range(len(layers))]
    num_slots = max(len(ids) for ids in needed)
    table, copies = SlotTable(counts, num_slots), []
    for pool in wanted:
        plan = table.plan_load(pool.content_hash, pool.expert_ids)
        table.begin(plan)
        table.finish(plan.key)
        copies += [[copy.layer, copy.expert, copy.slot] for copy in plan.copies]

    start = time.perf_counter()
    llm = LLM(
        **engine_arguments(args.model, num_slots, len(wanted)),
        enforce_eager=eager,
        max_model_len=512,
        max_num_seqs=32,
        kv_cache_memory_bytes=256 << 20,
    )
    (empty,) = llm.collective_rpc("emo_describe", args=(0,))
    load_pools(llm, copies, wanted)
    seconds = time.perf_counter() - start
    (loaded,) = llm.collective_rpc("emo_describe", args=(3,))

    rates = {}
    for batch in (1, 32):
        rows = [1 + i % len(pools) if experts == "all" else i % len(pools) for i in range(batch)]
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=args.tokens,
                ignore_eos=True,
                extra_args=RequestTag(row).to_extra_args(),
            )
            for row in rows
        ]
        prompts = [{"prompt_token_ids": [5 + i, 17, 33, 64]} for i in range(batch)]
        llm.generate(prompts, params, use_tqdm=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        rates[f"tokens_per_second_{batch}"] = batch * args.tokens / (time.perf_counter() - start)
    llm.llm_engine.engine_core.shutdown()
    return {
        "experts": f"{len(pools)} pools" if experts == "pools" else "all",
        "mode": "eager" if eager else "compiled",
        "start_seconds": seconds,
        "slots": num_slots,
        "slab_bytes": loaded["slab_bytes"],
        "bytes_read": loaded["bytes_read"],
        "peak_bytes": loaded["peak_rss_bytes"],
        "over_empty_bytes": loaded["peak_rss_bytes"] - empty["peak_rss_bytes"],
        **rates,
    }


def in_process(args: argparse.Namespace, experts: str, eager: bool) -> dict[str, Any]:
    """Run one variant in a new process and read its answer."""
    flags = ["--model", args.model, "--pools", args.pools, "--first", args.first]
    flags += ["--tokens", args.tokens, "--variant", f"{experts},{int(eager)}"]
    command = [sys.executable, "-m", "benchmarks.serving.start", *map(str, flags)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith(_MARK)]
    if run.returncode or not lines:
        raise SystemExit(run.stdout[-2000:] + run.stderr[-4000:])
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
    return figures


def main() -> None:
    """Measure every variant, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=demo.model_dir())
    parser.add_argument("--pools", type=Path, default=demo.pools_dir())
    parser.add_argument("--first", type=int, default=2, help="how many pools, by name [2]")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per request [64]")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        experts, eager = args.variant.split(",")
        print(_MARK + json.dumps(measure(args, experts, eager == "1")))
        return
    head = "experts mode start_s slots slab_MiB read_MiB peak_MiB over_empty_MiB tok/s@1 tok/s@32"
    print("| " + " | ".join(head.split()) + " |\n|" + "---|" * len(head.split()))
    results = []
    for experts, eager in steps(_VARIANTS, "engines"):
        row = in_process(args, experts, eager)
        results.append(row)
        sizes = ("slab_bytes", "bytes_read", "peak_bytes", "over_empty_bytes")
        cells = [row["experts"], row["mode"], f"{row['start_seconds']:.1f}", str(row["slots"])]
        cells += [f"{row[size] / 2**20:.1f}" for size in sizes]
        cells += [f"{row[f'tokens_per_second_{batch}']:.0f}" for batch in (1, 32)]
        say("| " + " | ".join(cells) + " |")
    arguments = {key: value for key, value in vars(args).items() if key != "variant"}
    print(f"appended to {append_result('start', arguments, results)}")


if __name__ == "__main__":
    main()
