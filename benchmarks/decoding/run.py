"""Tokens per second of a whole model that decodes: the full model against pools of its experts.

A model of EMO's released sizes with random weights (`decoding/model.py`) decodes in CUDA graphs,
each token feeding the next step. One slab holds all experts. For each batch size ONE graph is
captured; every case replays that graph and differs only in which row of the pool tables a sequence
names:

    all 128 experts | a pool of 32, 16 or 8 | sequences of four pools of 16 in turn

Before a graph is timed it is checked in every case, and a failed check ends the run: its logits
must equal an eager step's and differ from those of the full model, and each MoE layer must give
what its torch twin gives. Sizes of pools count the shared expert, as everywhere in emo-serve.

What the figures mean. A random gate spreads tokens evenly and independently over the experts
it may choose from. For the full model that is the worst case: B sequences hit about
127 x (1 - (120/127)^B) of its 127 standard experts per layer, nearly all from B = 64 on, and each
hit is 12 MiB to read. EMO is trained so that text of ONE domain uses few experts, which a pool then
holds. On such a batch the full model hits fewer experts than here, so the ratios are an upper bound
for it. In the limit, where the text never leaves the pool, the ratio is 1 and a pool only saves
memory. A batch of many domains is close to what is measured here. So the table prints the experts
hit per layer, on which the time depends: the full model on text that hits 32 of them takes about as
long as the pool of 32. At batch 1 every case reads 8 experts per layer, whatever it may choose
from, so no pool makes it faster; a speed-up there would be an error.

Attention is torch's scaled_dot_product_attention over exactly `--context` tokens, RMSNorm and RoPE
are plain torch, and nothing is fused: a serving engine's trunk is faster, which would raise the
ratios. The share of the MoE layers, timed in a graph of their own, is printed. One graph has one
choice of tiles, whatever the pools: the plugin's, which suits as many slots as the slab has, or
with `--tiles-for N` that for N slots, which suits pools that hold N experts together.

    python -m benchmarks.decoding.run                       # one CUDA device, 5 minutes
    python -m benchmarks.decoding.run --smoke               # tiny, interpreted, times nothing

Needs torch and triton only; emo-serve need not be installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

# Triton looks when it is imported.
if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from benchmarks.decoding.cases import Setting, Tolerances, check
from benchmarks.decoding.model import Geometry
from benchmarks.harness.progress import steps
from benchmarks.harness.results import RESULTS, append_result
from benchmarks.kernels.timing import Deadline, machine_rates
from emo_kernels import reference

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ROUNDS = 4  # cases take turns, so that a drifting clock favours none
_WARM_UP = 3
_REPLAYS = (8, 250)  # of one case in one round, least and most
_SPARE_BYTES = 4 << 30  # activations, workspaces, graphs

_TINY = Geometry(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    num_experts=16,
    expert_size=16,
    top_k=3,
    num_shared=1,
    vocab_size=64,
)


# -- measuring --


def measure(setting: Setting, num: int, deadline: Deadline, copy_rate: float) -> dict[str, Any]:
    """Capture, check and time one batch size; return the checks and a row for each case."""
    batch, model, pooled_moe = setting.batch(num), setting.model, setting.pooled_moe(num)
    setting.begin(batch, setting.cases[0])
    moe_inputs: list[Tensor] = []
    model.step(batch, pooled_moe, moe_inputs)
    step_graph, logits_TV = _capture(lambda: model.step(batch, pooled_moe))
    pairs = list(zip(moe_inputs, model.layers, strict=True))
    moe_graph, _ = _capture(
        lambda: [model.moe(x, y, batch.pool_rows_T, pooled_moe) for x, y in pairs]
    )

    def replay() -> Tensor:
        step_graph.replay()
        return logits_TV

    checks = check(setting, num, replay, Tolerances(twin=0.01, step=0.02))
    step_ms: dict[str, list[float]] = {case.name: [] for case in setting.cases}
    moe_ms: dict[str, list[float]] = {case.name: [] for case in setting.cases}
    hits_after: dict[str, float] = {}
    blocks = 2 * _ROUNDS * len(setting.cases)
    for _ in range(_ROUNDS):
        for case in setting.cases:
            for graph, times in ((moe_graph, moe_ms), (step_graph, step_ms)):
                setting.begin(batch, case)
                seconds = max(deadline.seconds_left, 0.0) / blocks
                times[case.name] += _event_times(graph, seconds)
                blocks -= 1
            last: list[Tensor] = []  # where the tokens went, after the timed steps
            model.step(batch, pooled_moe, last)
            hits_after[case.name] = setting.experts_hit(last, batch.pool_rows_T)
    rows = []
    for case, checked in zip(setting.cases, checks, strict=True):
        hit, step, moe = checked["experts_hit"], step_ms[case.name], moe_ms[case.name]
        rows.append(
            {
                "case": case.name,
                "batch": num,
                "step_ms": _quartiles(step),
                "moe_ms": _quartiles(moe),
                "replays": len(step),
                "experts_hit": hit,
                "experts_hit_after": hits_after[case.name],
                "floor_ms": 1e3 * setting.read_bytes(num, hit) / copy_rate,
                "moe_floor_ms": 1e3 * setting.expert_read_bytes(hit) / copy_rate,
                "slots": case.slots,
                "device_gib": setting.device_bytes(case) / 2**30,
            }
        )
    return {"rows": [_derived(row, rows[0]) for row in rows], "checks": checks}


def _capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call after running it on a side stream; return the graph and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):  # compiles, and lets libraries allocate
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return graph, returned


def _event_times(graph: torch.cuda.CUDAGraph, seconds: float) -> list[float]:
    """Return the milliseconds of each replay, for about `seconds`; the first ones do not count.

    Marks lie between replays and the queue is not drained, so that the device never waits.
    """

    def times(replays: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True)]

    least, most = _REPLAYS
    per_replay = max(times(_WARM_UP)[-1], 1e-3)
    return times(max(least, min(most, int(1e3 * seconds / per_replay))))


def _quartiles(times_ms: Sequence[float]) -> dict[str, float]:
    q1, median, q3 = quantiles(times_ms, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def _derived(row: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    step_ms, moe_ms = row["step_ms"]["median"], row["moe_ms"]["median"]
    return {
        **row,
        "tokens_per_second": 1e3 * row["batch"] / step_ms,
        "ratio_to_full": full["step_ms"]["median"] / step_ms,
        "moe_share": moe_ms / step_ms,
        "copy_rate_share": row["floor_ms"] / step_ms,
        "moe_copy_rate_share": row["moe_floor_ms"] / moe_ms,
    }


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every batch size on the CUDA device; return the result."""
    deadline = Deadline(args.minutes)
    device, dtype = torch.device("cuda"), torch.bfloat16
    copy_rate = machine_rates(device).copy_bytes_per_s
    torch.cuda.empty_cache()
    geometry = Geometry(num_layers=args.layers)
    args.batches = _fitting(args.batches, geometry, args.context, dtype)
    generator = torch.Generator(device).manual_seed(args.seed)
    most = max(args.batches)
    setting = Setting(geometry, (32, 16, 8), most, args.context, dtype, generator, args.tiles_for)
    result: dict[str, Any] = {
        "geometry": asdict(geometry),
        "copy_gib_per_s": copy_rate / 2**30,
        "trunk_gib": setting.model.trunk_bytes / 2**30,
        "expert_mib": geometry.expert_bytes(dtype) / 2**20,
        "kv_mib_a_sequence": geometry.kv_bytes(args.context, dtype) / 2**20,
        "rows": [],
        "checks": [],
    }
    for done, num in enumerate(steps(args.batches, "batches")):
        part = deadline.share(1 / (len(args.batches) - done))
        found = measure(setting, num, part, copy_rate)
        torch.cuda.empty_cache()
        result["rows"] += found["rows"]
        result["checks"] += found["checks"]
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def _fitting(
    batches: Sequence[int], geometry: Geometry, context: int, dtype: torch.dtype
) -> list[int]:
    """Return the batch sizes whose keys and values fit beside the experts; name the others."""
    free = torch.cuda.mem_get_info()[0] - _SPARE_BYTES
    width, per_expert = geometry.hidden_size, geometry.expert_bytes(dtype)
    trunk = 2 * geometry.vocab_size * width + geometry.num_layers * 4 * width**2
    free -= geometry.num_layers * geometry.num_experts * per_expert + trunk * dtype.itemsize
    fitting = [num for num in batches if num * geometry.kv_bytes(context, dtype) <= free]
    if not fitting:
        sys.exit(f"too little device memory: {free / 2**30:.1f} GiB left beside weights")
    for num in sorted(set(batches) - set(fitting)):
        print(f"batch {num} left out: its keys and values do not fit", file=sys.stderr)
    return fitting


# -- smoke --


@torch.no_grad()
def smoke(args: argparse.Namespace) -> dict[str, Any]:
    """Run the checks on a tiny model under Triton's interpreter: no graph, no time, no rate.

    A step of a model that is plain torch throughout takes the place of a replay.
    """
    generator, tolerances = torch.Generator().manual_seed(args.seed), Tolerances(1e-4, 1e-4)
    most = max(args.batches)
    setting = Setting(
        _TINY, (8, 4, 2), most, args.context, torch.float32, generator, args.tiles_for
    )
    checks = []
    for num in args.batches:
        plain = partial(setting.model.step, setting.batch(num), reference.pooled_moe)
        checks += check(setting, num, plain, tolerances)
    return {"interpreter": True, "geometry": asdict(_TINY), "checks": checks}


# -- output --


def print_tables(result: dict[str, Any]) -> None:
    """Print tokens per second and ratio by batch and case, then the figures that explain them."""
    rows = result["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["batch"], row["case"]): row for row in rows}
    print("tokens/s (x full model)\n")
    print("| batch | " + " | ".join(cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for batch in dict.fromkeys(row["batch"] for row in rows):
        cells = [found[batch, case] for case in cases]
        texts = [f"{c['tokens_per_second']:,.0f} ({c['ratio_to_full']:.2f})" for c in cells]
        print(f"| {batch} | " + " | ".join(texts) + " |")
    sizes = [found[rows[0]["batch"], case]["device_gib"] for case in cases]
    print("| trunk + slots, GiB | " + " | ".join(f"{size:.1f}" for size in sizes) + " |")
    print(f"\nin addition, keys and values take {result['kv_mib_a_sequence']:.0f} MiB per sequence")
    print(f"the device copies {result['copy_gib_per_s']:.0f} GiB/s\n")
    print(
        "| batch | case | step ms (quartiles) | of copy rate | MoE ms | MoE share"
        " | MoE of copy rate | experts hit per layer, first and after |"
    )
    print("|---" * 8 + "|")
    for row in rows:
        step = row["step_ms"]
        print(
            f"| {row['batch']} | {row['case']}"
            f" | {step['median']:.3f} ({step['q1']:.3f}-{step['q3']:.3f})"
            f" | {row['copy_rate_share']:.0%} | {row['moe_ms']['median']:.3f}"
            f" | {row['moe_share']:.0%} | {row['moe_copy_rate_share']:.0%}"
            f" | {row['experts_hit']:.1f}, {row['experts_hit_after']:.1f} |"
        )
    checks = result["checks"]
    identical = sum(found["is_identical"] for found in checks)
    largest = max(found["step_error"] for found in checks)
    print(f"\n{len(checks)} checks passed: graphs against eager steps, {identical} to the bit,")
    print(f"all within {largest:.1g} in the median token's logits; MoE layers against their twin")


def print_smoke(result: dict[str, Any]) -> None:
    """Print the checks of an interpreted run."""
    print("interpreter: a tiny model, checked and not timed\n")
    print("| batch | case | step, kernels to torch | change from full | experts hit per layer |")
    print("|---|---|---|---|---|")
    for row in result["checks"]:
        print(
            f"| {row['batch']} | {row['case']} | {row['step_error']:.1e}"
            f" | {row['change_from_full']:.2f} | {row['experts_hit']:.1f} |"
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with the defaults of the kind of run that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batches", type=int, nargs="+", help="sequences at once [1 2 4 ... 256]")
    parser.add_argument("--context", type=int, help="tokens attention sees [512]")
    parser.add_argument("--layers", type=int, default=16, help="layers of the model [16]")
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long it takes [5]")
    parser.add_argument(
        "--tiles-for",
        type=int,
        metavar="SLOTS",
        help="slots that tiles are chosen for [the slab's]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, pools and tokens [0]")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model under Triton's interpreter, on the CPU"
    )
    parser.add_argument("--results", type=Path, help="directory [benchmarks/results; smoke: none]")
    args = parser.parse_args(argv)
    if args.smoke and args.results and args.results.resolve() == RESULTS:
        parser.error("--smoke measures nothing, and goes to a directory of its own")
    args.batches = args.batches or ([1, 5] if args.smoke else list(_BATCHES))
    args.context = args.context or (8 if args.smoke else 512)
    if min(*args.batches, args.context, args.layers) < 1:
        parser.error("--batches, --context and --layers must be at least 1")
    return args


def main() -> None:
    """Measure, print tables, append a result; or run the smoke test."""
    args = parse()
    if args.smoke:
        result = smoke(args)
        print_smoke(result)
        _record(args, result)
        return
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured. --smoke runs a tiny model on the CPU")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 would time the interpreter; unset it, or use --smoke")
    result = run(args)
    print_tables(result)
    _record(args, result)


def _record(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.no_record or (args.smoke and args.results is None):
        return
    arguments = {k: v for k, v in vars(args).items() if k not in ("no_record", "results")}
    path = append_result("decode", arguments, result, args.results or RESULTS)
    print(f"appended to {path}")


if __name__ == "__main__":
    main()
