"""The measure stage: the layer, its stages and the baselines at every shape, as rows of figures.

`layer` is one pooled_moe: routing, dispatch, gate_up, down, combine. `experts` is the layer after
routing, which is what vLLM's fused_experts does. Stages are timed alone, each on inputs of its own,
so their sum is not exactly the layer. Floors are the work divided by the machine's two rates; see
kernels/cases.py for how bytes and FLOPs are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import emo_kernels
from benchmarks.kernels.baselines import Baseline, Selection, select
from benchmarks.kernels.cases import Batch, Case, Geometry, Slabs, Work, rotation
from benchmarks.kernels.timing import Machine, Timing, measure
from emo_kernels.tuning import Config

__all__ = ["STAGES", "measure_case"]

STAGES = ("route", "dispatch", "gate_up", "down", "combine")
Call = Callable[[], object]


def measure_case(
    case: Case,
    geometry: Geometry,
    slabs: Slabs,
    config: Callable[[Batch], Config],
    baselines: Sequence[Baseline],
    machine: Machine,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> dict[str, Any]:
    """Return a case's row: work, floors, timings, ratios (above 1: ours is faster)."""
    turns = 2 if case.tokens <= 1024 and device.type == "cuda" else 1
    batches = list(rotation(case, geometry, slabs, turns * slabs.layers, device, dtype))
    made = [select(batch) for batch in batches]
    chosen = config(batches[0])
    works = [
        Work.of(batch, selection.routed.slots_TK)
        for batch, selection in zip(batches, made, strict=True)
    ]
    mean = {name: sum(getattr(w, name) for w in works) / len(works) for name in asdict(works[0])}

    def timed(make: Callable[[Batch, Selection], Call], share: float = 1.0) -> Timing:
        calls = [make(*pair) for pair in zip(batches, made, strict=True)]
        return measure(calls, device, seconds=share * seconds)

    layer = timed(lambda batch, _: lambda: emo_kernels.pooled_moe(*_arguments(batch), chosen))
    experts = timed(lambda batch, selection: lambda: _experts(batch, selection, chosen), 0.5)
    stages = {
        name: timed(lambda batch, selection, n=name: _stage(n, batch, selection, chosen), 0.3)
        for name in STAGES
    }
    others = {b.name: timed(b.make, 0.5) for b in baselines}
    products_us = stages["gate_up"].median_us + stages["down"].median_us
    ours_us = {"experts": experts.median_us, "products": products_us}
    bytes_us = 1e6 * mean["bytes"] / machine.copy_bytes_per_s
    weights_us = 1e6 * mean["weight_bytes"] / machine.copy_bytes_per_s
    flops_us = 1e6 * mean["flops"] / machine.dense_flops_per_s
    small_us = stages["route"].median_us + stages["dispatch"].median_us
    return {
        **asdict(case),
        "pool": case.pool,
        "slots": batches[0].slots,
        "dtype": str(dtype).removeprefix("torch."),
        "config": asdict(chosen),
        "calls": len(batches),
        "work": {name: round(value, 1) for name, value in mean.items()},
        "layer": layer.as_row(),
        "experts": experts.as_row(),
        "stages": {name: timing.as_row() for name, timing in stages.items()},
        "baselines": {name: timing.as_row() for name, timing in others.items()},
        "floor_us": {"bytes": round(bytes_us, 3), "flops": round(flops_us, 3)},
        "bandwidth_share": round(bytes_us / layer.median_us, 4),
        "weights_bandwidth_share": round(weights_us / layer.median_us, 4),
        "dense_share": round(flops_us / layer.median_us, 4),
        "route_dispatch_share": round(small_us / layer.median_us, 4),
        "ratios": {
            b.name: round(others[b.name].median_us / ours_us[b.against], 3) for b in baselines
        },
    }


def _arguments(batch: Batch) -> tuple[Any, ...]:
    return (
        batch.x_TD, batch.logits_TE, batch.pool_rows_T, batch.tables, batch.router,
        batch.w13, batch.w2, batch.scales,
    )  # fmt: skip


def _experts(batch: Batch, selection: Selection, config: Config) -> Tensor:
    """Run the layer after routing."""
    routed, num_slots = selection.routed, batch.w13.shape[0]
    scales13, scales2 = batch.scales or (None, None)
    schedule = emo_kernels.dispatch(routed.slots_TK, num_slots, config.block_m)
    h_RF = emo_kernels.gate_up(
        batch.x_TD, batch.w13, schedule, batch.router.top_k, scales13, config.gate_up
    )
    rows_RD = emo_kernels.down(h_RF, batch.w2, routed.weights_TK, schedule, scales2, config.down)
    return emo_kernels.combine(rows_RD, routed.slots_TK)


def _stage(name: str, batch: Batch, selection: Selection, config: Config) -> Call:
    """Return one stage as a call, on inputs of its own."""
    routed, num_slots = selection.routed, batch.w13.shape[0]
    slots_TK, (_, model_dim) = routed.slots_TK, batch.x_TD.shape
    scales13, scales2 = batch.scales or (None, None)
    inputs = (batch.logits_TE, batch.pool_rows_T, batch.tables, batch.router)
    if name == "route":
        return lambda: emo_kernels.route(*inputs)
    if name == "dispatch":
        return lambda: emo_kernels.dispatch(slots_TK, num_slots, config.block_m)
    schedule = emo_kernels.dispatch(slots_TK, num_slots, config.block_m)
    if name == "gate_up":
        top_k = batch.router.top_k
        return lambda: emo_kernels.gate_up(
            batch.x_TD, batch.w13, schedule, top_k, scales13, config.gate_up
        )
    if name == "down":
        h_RF = _random(batch, slots_TK.numel(), batch.w2.shape[2])
        return lambda: emo_kernels.down(
            h_RF, batch.w2, routed.weights_TK, schedule, scales2, config.down
        )
    rows_RD = _random(batch, slots_TK.numel(), model_dim)
    return lambda: emo_kernels.combine(rows_RD, slots_TK)


def _random(batch: Batch, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=batch.x_TD.device).to(batch.x_TD.dtype)
