"""Two stages of `python -m benchmarks.gpu`: a whole model decodes, all experts against pools.

A model of EMO's released sizes with random weights (`decoding/model.py`) decodes in CUDA graphs,
each token feeding the next step. One slab holds all experts. For each batch size ONE graph is
captured; every case replays that graph and differs only in which row of the pool tables a sequence
names:

    all 128 experts | a pool of 32 or 16 | sequences of four pools of 16 in turn

Before a graph is timed it is checked in every case, and one that fails is not timed: its logits
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

A batch size that an earlier call measured with the tiles of today is not measured again, so the
stage `tuned` measures what tuning changed. Without CUDA, steps of plain torch stand in for replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding.cases import Setting, Tolerances, check, geometry_of, tiles_of
from benchmarks.gpu.run import Run
from benchmarks.harness.progress import steps
from benchmarks.kernels.timing import Deadline, machine_rates, quartiles, repeated

__all__ = ["capture", "decode", "fitting", "measure", "print_tables"]

_ROUNDS = 4  # cases take turns, so that a drifting clock favours none
_WARM_UP = 3
_REPLAYS = (8, 250)  # of one case in one round, least and most
_SPARE_BYTES = 4 << 30  # activations, workspaces, graphs

Result = dict[str, Any]


@torch.no_grad()
def decode(run: Run) -> bool:
    """Measure every batch size with the tiles of today; return whether every check passed."""
    known = [found for found in run.done("decode") if _stands(found, run)]
    todo = [n for n in run.args.batches if all(n != found["batch"] for found in known)]
    problems = []
    if todo:
        copy_rate = machine_rates(run.device).copy_bytes_per_s
        todo = fitting(todo, run)
        setting = Setting.of(run, max(todo))
    for done, num in enumerate(steps(todo, "batches")):
        part = run.deadline.share(1 / (len(todo) - done))
        try:
            found = measure(setting, num, part, copy_rate)
        except Exception as problem:  # the other batches still count
            problems.append(f"batch {num}: {type(problem).__name__}: {problem}"[:300])
            continue
        tiles = tiles_of(run, num).provenance
        result = {"stage": "decode", "batch": num, "tiles": tiles, **_setting(run, num), **found}
        run.record(result)
        known.append(result)
        if run.is_cuda:
            torch.cuda.empty_cache()
    print_tables(known)
    _print_change(known, run.recorded("decode"))
    for line in problems:
        print(f"FAILED {line}")
    return not problems


def _setting(run: Run, num: int) -> Result:
    """Return what a batch size is measured with."""
    return {
        "config": asdict(tiles_of(run, num).config),
        "context": run.args.context,
        "geometry": asdict(geometry_of(run)),
    }


def _stands(found: Result, run: Run) -> bool:
    return _setting(run, found["batch"]).items() <= found.items()


def fitting(batches: Sequence[int], run: Run) -> list[int]:
    """Return the batch sizes whose keys and values fit beside the experts; name the others."""
    if not run.is_cuda:
        return list(batches)
    geometry, dtype = geometry_of(run), torch.bfloat16
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - _SPARE_BYTES
    width, per_expert = geometry.hidden_size, geometry.expert_bytes(dtype)
    trunk = 2 * geometry.vocab_size * width + geometry.num_layers * 4 * width**2
    free -= geometry.num_layers * geometry.num_experts * per_expert + trunk * dtype.itemsize
    found = [n for n in batches if n * geometry.kv_bytes(run.args.context, dtype) <= free]
    if not found:
        raise MemoryError(f"{free / 2**30:.1f} GiB left beside the weights: too little")
    for num in sorted(set(batches) - set(found)):
        print(f"batch {num} left out: its keys and values do not fit")
    return found


# -- measuring --


def measure(setting: Setting, num: int, deadline: Deadline, copy_rate: float) -> Result:
    """Capture, check and time one batch size; return the checks and a row for each case."""
    batch, model, replayed_moe = setting.batch(num), setting.model, setting.replayed_moe(num)
    device = batch.tokens_T.device
    setting.begin(batch, setting.cases[0])
    moe_inputs: list[Tensor] = []
    model.step(batch, replayed_moe, moe_inputs)
    replay_step, logits_TV = capture(lambda: model.step(batch, replayed_moe), device)
    pairs = list(zip(moe_inputs, model.layers, strict=True))
    replay_moe, _ = capture(
        lambda: [model.moe(x, y, batch.pool_rows_T, replayed_moe) for x, y in pairs], device
    )

    def replay() -> Tensor:
        replay_step()
        return logits_TV

    is_cuda = device.type == "cuda"
    tolerances = Tolerances(twin=0.01, step=0.02) if is_cuda else Tolerances(1e-4, 1e-4)
    checks = check(setting, num, replay, tolerances)
    step_ms: dict[str, list[float]] = {case.name: [] for case in setting.cases}
    moe_ms: dict[str, list[float]] = {case.name: [] for case in setting.cases}
    hits_after: dict[str, float] = {}
    blocks = 2 * _ROUNDS * len(setting.cases)
    for _ in range(_ROUNDS):
        for case in setting.cases:
            for call, times in ((replay_moe, moe_ms), (replay_step, step_ms)):
                setting.begin(batch, case)
                seconds = max(deadline.seconds_left, 0.0) / blocks
                times[case.name] += repeated(call, device, seconds, *_REPLAYS)
                blocks -= 1
            last: list[Tensor] = []  # where the tokens went, after the timed steps
            model.step(batch, replayed_moe, last)
            hits_after[case.name] = setting.experts_hit(last, batch.pool_rows_T)
    rows = []
    for case, checked in zip(setting.cases, checks, strict=True):
        hit, step, moe = checked["experts_hit"], step_ms[case.name], moe_ms[case.name]
        rows.append(
            {
                "case": case.name,
                "batch": num,
                "step_ms": quartiles(step),
                "moe_ms": quartiles(moe),
                "replays": len(step),
                "experts_hit": hit,
                "experts_hit_after": hits_after[case.name],
                "floor_ms": 1e3 * setting.read_bytes(num, hit) / copy_rate,
                "moe_floor_ms": 1e3 * setting.expert_read_bytes(hit) / copy_rate,
                "slots": case.slots,
                "device_gib": setting.device_bytes(case) / 2**30,
            }
        )
    return {
        "rows": [_derived(row, rows[0]) for row in rows],
        "checks": checks,
        "copy_gib_per_s": copy_rate / 2**30,
        "kv_mib_a_sequence": setting.geometry.kv_bytes(setting.context, setting.dtype) / 2**20,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
    }


def capture(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], object], Any]:
    """Capture a call in a CUDA graph; return what replays it, and what it returned.

    A replay writes into the tensors that were returned. Without CUDA it calls again.
    """
    if device.type != "cuda":
        returned = call()
        is_tensor = isinstance(returned, Tensor)
        return lambda: returned.copy_(call()) if is_tensor else call(), returned
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):  # compiles, and lets libraries allocate
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()
    return graph.replay, returned


def _derived(row: Result, full: Result) -> Result:
    step_ms, moe_ms = row["step_ms"]["median"], row["moe_ms"]["median"]
    return {
        **row,
        "tokens_per_second": 1e3 * row["batch"] / step_ms,
        "ratio_to_full": full["step_ms"]["median"] / step_ms,
        "moe_share": moe_ms / step_ms,
        "copy_rate_share": row["floor_ms"] / step_ms,
        "moe_copy_rate_share": row["moe_floor_ms"] / moe_ms,
    }


# -- output --


def print_tables(results: Sequence[Result]) -> None:
    """Print tokens per second and ratio by batch and case, then the figures that explain them."""
    results = sorted(results, key=lambda result: result["batch"])
    rows = [row for result in results for row in result["rows"]]
    if not rows:
        return
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
    last = results[-1]
    print(f"\nin addition, keys and values take {last['kv_mib_a_sequence']:.0f} MiB per sequence")
    print(f"the device copies {last['copy_gib_per_s']:.0f} GiB/s\n")
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
    checks = [check for result in results for check in result["checks"]]
    identical = sum(found["is_identical"] for found in checks)
    largest = max(found["step_error"] for found in checks)
    print(f"\n{len(checks)} checks passed: graphs against eager steps, {identical} to the bit,")
    print(f"all within {largest:.1g} in the median token's logits; MoE layers against their twin")


def _print_change(results: Sequence[Result], recorded: Sequence[Result]) -> None:
    """Print what a step takes of the time that it took with the tiles before."""
    for result in results:
        same = ("batch", "context", "geometry")
        others = [old for old in recorded if all(old[key] == result[key] for key in same)]
        others = [old for old in others if old["config"] != result["config"]]
        if not others:
            continue
        pairs = zip(result["rows"], others[-1]["rows"], strict=True)
        ratios = (
            f"{row['case']} {row['step_ms']['median'] / old['step_ms']['median']:.3f}"
            for row, old in pairs
        )
        print(f"batch {result['batch']}, of the time with the tiles before: {', '.join(ratios)}")
