"""Choosing experts on a CPU: our kernel against plain torch, which routes elsewhere.

Both get the same logits, in turn, for one layer of the released sizes and one of the shipped model;
a time is the mean of many calls. The ratio of each round is robust against a machine whose speed
drifts.

    python -m benchmarks.serving.routing
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness.pairs import Spread, in_turn
from benchmarks.harness.progress import say
from benchmarks.harness.results import append_result
from emo_kernels import PoolTables, Router
from emo_kernels.cpu import CpuExperts
from emo_serve.vllm_plugin.slot_routing import route_to_slots

ROUTERS = {"released": Router(128, 8, 1), "shipped": Router(32, 4, 1)}
_NUM_POOLS = 8
_TOKENS_PER_TIMING = 4096


def _mean_seconds(work: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def _row(kernel: CpuExperts, router: Router, num_tokens: int, rounds: int) -> dict[str, Any]:
    size = router.num_experts
    tables = PoolTables(
        torch.rand(_NUM_POOLS, size) < 0.5, torch.ones(_NUM_POOLS), torch.randperm(size).int()
    )
    logits_TE = torch.randn(num_tokens, size).bfloat16()
    given = logits_TE, torch.arange(num_tokens) % _NUM_POOLS, tables, router
    calls = max(4, min(1000, _TOKENS_PER_TIMING // num_tokens))
    measures = (
        partial(_mean_seconds, partial(route, *given), calls)
        for route in (kernel.route, route_to_slots)
    )
    times = in_turn(rounds, *measures)
    ours, torch_ = (statistics.median(each) for each in zip(*times, strict=True))
    return {"ours": ours, "torch": torch_, "ratio": Spread.of_ratios(times).to_json()}


def main() -> None:
    """Measure, print a table, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 256, 1024])
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds [7]")
    parser.add_argument("--threads", type=int, default=1, help="of both [1]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernel = CpuExperts.of(torch.bfloat16)
    if kernel is None:
        raise SystemExit("this machine has no AVX-512 with BF16, or no C++ compiler")
    rows = []
    print("| layer | tokens | ours us | torch us | torch / ours (min-max) |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for name, router in ROUTERS.items():
            for num_tokens in args.tokens:
                row = _row(kernel, router, num_tokens, args.rounds)
                rows.append({"layer": name, "tokens": num_tokens, **row})
                ours, torch_ = (1e6 * row[of] for of in ("ours", "torch"))
                say(
                    f"| {name} | {num_tokens} | {ours:.0f} | {torch_:.0f}"
                    f" | {Spread(**row['ratio'])} |"
                )
    print(f"appended to {append_result('routing', vars(args), {'rows': rows})}")


if __name__ == "__main__":
    main()
