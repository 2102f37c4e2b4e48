"""The check stage: every kernel against its torch twin, on the device, before anything is timed.

Each stage gets the twin's inputs, so that an error shows where it is made. Floating outputs are
compared row by row, by the norm of the difference over the norm of the twin's row. What the twin
leaves undefined is ignored; a row of zeros must be zeros and NaN must be NaN. Memory is filled with
NaN before each kernel, so that an element that was never written shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import emo_kernels
from benchmarks.kernels.cases import Batch
from benchmarks.kernels.corners import Corner, tokens_of
from emo_kernels import reference
from emo_kernels.tuning import Config

__all__ = ["Findings", "check_batch", "check_replay", "relative_error", "tolerance"]

_TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_WEIGHTS_TOLERANCE = 1e-5  # routing is fp32 inside, whatever the logits are


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest relative error of a row that rounding alone explains."""
    return _TOLERANCES[dtype]


@dataclass
class Findings:
    """What the check found: how many comparisons, the worst error per stage, and what failed."""

    checked: int = 0
    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def merge(self, other: Findings) -> None:
        """Add what another check found."""
        self.checked += other.checked
        self.failures += other.failures
        for key, error in other.worst.items():
            self.worst[key] = max(error, self.worst.get(key, 0.0))

    def near(self, where: str, stage: str, got: Tensor, expected: Tensor, limit: float) -> None:
        """Record a comparison of floating tensors, row by row."""
        error = relative_error(got, expected)
        self.checked += 1
        key = f"{stage} {str(expected.dtype).removeprefix('torch.')}"
        self.worst[key] = max(error, self.worst.get(key, 0.0))
        if not error <= limit:
            self.failures.append(f"{where}: {stage}: relative error {error:.3g} > {limit:g}")

    def same(self, where: str, stage: str, got: Tensor, expected: Tensor) -> None:
        """Record a comparison of tensors that must be equal, bit for bit (NaN equals NaN)."""
        self.checked += 1
        if got.shape != expected.shape:
            self.failures.append(f"{where}: {stage}: {got.shape}, not {expected.shape}")
        elif not bool(((got == expected) | ((got != got) & (expected != expected))).all()):
            differ = int((got != expected).sum())
            self.failures.append(f"{where}: {stage}: {differ} of {got.numel()} values differ")


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the worst row's error in norm; infinity where shapes, zeros or NaN do not agree."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    got, expected = got.double(), expected.double()
    if not torch.equal(got.isnan(), expected.isnan()):
        return float("inf")
    errors = (got - expected).nan_to_num().norm(dim=-1)
    sizes = expected.nan_to_num().norm(dim=-1)
    relative = torch.where(errors > 0, errors / sizes, torch.zeros_like(errors))
    return float(relative.max())


def check_batch(batch: Batch, config: Config, where: str, findings: Findings) -> None:
    """Compare each stage and the whole with the twins."""
    limit, num_slots = tolerance(batch.x_TD.dtype), batch.w13.shape[0]
    scales13, scales2 = batch.scales or (None, None)
    inputs = (batch.logits_TE, batch.pool_rows_T, batch.tables, batch.router)

    _poison(batch)
    routed, twin = emo_kernels.route(*inputs), reference.route(*inputs)
    # A token of NaN may get any slots: all that is promised is that they lie in the slab.
    sane_T = ~twin.weights_TK.isnan().any(-1)
    findings.same(where, "slots", routed.slots_TK[sane_T], twin.slots_TK[sane_T])
    findings.near(where, "weights", routed.weights_TK, twin.weights_TK, _WEIGHTS_TOLERANCE)
    inside = (routed.slots_TK >= -1) & (routed.slots_TK < num_slots)
    findings.same(where, "slots in range", inside, torch.ones_like(inside))

    schedule = emo_kernels.dispatch(twin.slots_TK, num_slots, config.block_m)
    wanted = reference.dispatch(twin.slots_TK, num_slots, config.block_m)
    rows, tiles = int(wanted.offsets_S1[-1]), int(wanted.num_tiles)
    findings.same(where, "offsets", schedule.offsets_S1, wanted.offsets_S1)
    findings.same(where, "num_tiles", schedule.num_tiles, wanted.num_tiles)
    for name, count in (("rows_R", rows), ("tile_slots", tiles), ("tile_starts", tiles)):
        findings.same(where, name, getattr(schedule, name)[:count], getattr(wanted, name)[:count])

    top_k, taken_R = batch.router.top_k, (twin.slots_TK >= 0).flatten()
    h_RF = reference.gate_up(batch.x_TD, batch.w13, wanted, top_k, scales13)
    rows_RD = reference.down(h_RF, batch.w2, twin.weights_TK, wanted, scales2)
    _poison(batch)
    got = emo_kernels.gate_up(batch.x_TD, batch.w13, wanted, top_k, scales13, config.gate_up)
    findings.near(where, "gate_up", got[:rows], h_RF[:rows], limit)
    _poison(batch)
    got = emo_kernels.down(h_RF, batch.w2, twin.weights_TK, wanted, scales2, config.down)
    findings.near(where, "down", got[taken_R], rows_RD[taken_R], limit)
    rows_RD[~taken_R] = float("nan")  # combine may not look at them
    got = emo_kernels.combine(rows_RD, twin.slots_TK)
    findings.near(where, "combine", got, reference.combine(rows_RD, twin.slots_TK), limit)

    _poison(batch)
    y_TD, expected = _layer(batch, config), _layer(batch, None)
    findings.near(where, "layer", y_TD, expected, limit)
    padded_T = batch.pool_rows_T < 0
    findings.same(where, "padding", y_TD[padded_T], torch.zeros_like(y_TD[padded_T]))
    _poison(batch)
    findings.same(where, "determinism", _layer(batch, config), y_TD)


def check_replay(
    corner: Corner, dtype: torch.dtype, config: Config, device: torch.device, findings: Findings
) -> None:
    """Capture the layer in a CUDA graph, then replay it with other tokens, pools and slots."""
    batch = corner.batch(dtype, "16bit", device, seed=1)
    _layer(batch, config)  # compiles: a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = _layer(batch, config)
    for seed in (2, 3):
        for old, new in _replacements(batch, corner, dtype, device, seed):
            old.copy_(new)
        graph.replay()
        where = f"{corner.name}, replayed with new pools, slots and tokens"
        findings.same(where, "graph", y_TD, _layer(batch, config))
        findings.near(where, "graph", y_TD, _layer(batch, None), tolerance(dtype))


def _replacements(
    batch: Batch, corner: Corner, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair each tensor that may change between replays with what it becomes."""
    changed = replace(corner, padding=seed % 2 == 1)
    other = changed.batch(dtype, "16bit", device, seed)
    yield batch.tables.members_PE, other.tables.members_PE
    yield batch.tables.slot_of_expert_E, other.tables.slot_of_expert_E
    yield batch.tables.temperatures_P, torch.rand_like(other.tables.temperatures_P) + 0.5
    random = torch.Generator().manual_seed(seed)
    new = tokens_of(changed, dtype, random)
    for old, value in zip((batch.x_TD, batch.logits_TE, batch.pool_rows_T), new, strict=True):
        yield old, value.to(device)


def _layer(batch: Batch, config: Config | None) -> Tensor:
    """Run the layer: our kernels with `config`, the twin without one."""
    arguments = (
        batch.x_TD, batch.logits_TE, batch.pool_rows_T, batch.tables, batch.router,
        batch.w13, batch.w2, batch.scales,
    )  # fmt: skip
    if config is None:
        return reference.pooled_moe(*arguments)
    return emo_kernels.pooled_moe(*arguments, config)


def _poison(batch: Batch) -> None:
    """Leave NaN in the memory that the next allocations of these sizes will get (on CUDA)."""
    if batch.x_TD.device.type != "cuda":
        return
    places = batch.x_TD.shape[0] * batch.router.top_k
    (_, model_dim), expert_dim = batch.x_TD.shape, batch.w2.shape[2]
    held = [
        torch.full((rows, width), float("nan"), device=batch.x_TD.device, dtype=batch.x_TD.dtype)
        for rows, width in ((places, expert_dim), (places, model_dim), batch.x_TD.shape)
    ]
    del held
