"""What decoding/stage.py compares: a model, its pools, the cases of a batch; and what must hold.

Shapes as in decoding/model.py: T sequences, one token each; D hidden size, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import emo_kernels
from benchmarks.decoding.model import DecodeModel, Geometry, PooledMoe, Sequences, random_pools
from benchmarks.gpu.run import Run
from emo_kernels import reference
from emo_kernels.tuning import Config, Row

__all__ = [
    "Case",
    "CheckFailed",
    "Setting",
    "Tolerances",
    "check",
    "geometry_of",
    "relative",
    "tiles_of",
]

_TINY = Geometry(
    hidden_size=32,
    num_heads=2,
    num_experts=16,
    expert_size=16,
    top_k=3,
    num_shared=1,
    vocab_size=64,
)


class CheckFailed(Exception):
    """A model does not compute what it must."""


def geometry_of(run: Run) -> Geometry:
    """Return the sizes of the model that a call decodes with."""
    return replace(_TINY if run.args.smoke else Geometry(), num_layers=run.args.layers)


def tiles_of(run: Run, num: int) -> Row:
    """Return the row of tiles for batches of `num`: that for all slots, as the plugin's lookup."""
    slots = run.args.tiles_for or geometry_of(run).num_experts
    return run.tiles().nearest(num, slots, "16bit")


@dataclass(frozen=True)
class Case:
    """The pool rows that the sequences of a batch take in turn, and the slots a slab would need."""

    name: str
    rows: tuple[int, ...]
    slots: int


@dataclass(frozen=True)
class Tolerances:
    """Relative errors that pass.

    `twin` bounds every token of every MoE layer; `step` bounds the median token's logits, since one
    value rounded differently may choose another expert. Below `change` a pool shows no effect.
    """

    twin: float
    step: float
    change: float = 0.02


class Setting:
    """The model, its cases and the sequences of the largest batch."""

    def __init__(
        self,
        geometry: Geometry,
        sizes: tuple[int, int],
        num_sequences: int,
        context: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        tiles: Callable[[int], Config] | None = None,
    ) -> None:
        num_mixed, mixed_size = 4, sizes[-1]
        # Row 0 is the base pool; one of each size follows, then the other three of the mixed four.
        all_sizes = [geometry.num_experts, *sizes, *[mixed_size] * (num_mixed - 1)]
        self.pools = pools = random_pools(geometry, all_sizes, generator.initial_seed())
        mixed = (2, 3, 4, 5)

        def case(name: str, *rows: int) -> Case:
            layers = zip(*(pools[row] for row in rows), strict=True)
            return Case(name, rows, max(len(frozenset().union(*layer)) for layer in layers))

        self.cases = (
            case(f"all {geometry.num_experts}", 0),
            *(case(f"pool of {size}", row) for row, size in enumerate(sizes, 1)),
            case(f"{num_mixed} pools of {mixed_size}", *mixed),
        )
        self.geometry, self.context, self.dtype = geometry, context, dtype
        self._tiles = tiles
        self.model = DecodeModel(geometry, pools, dtype, generator)
        self.sequences = Sequences.random(geometry, num_sequences, context, dtype, generator)
        self.start = self.sequences.tokens_T.clone(), self.sequences.position.clone()

    @classmethod
    def of(cls, run: Run, num_sequences: int) -> Setting:
        """Return the setting of a call: of the released sizes on CUDA, else tiny and in fp32."""
        return cls(
            geometry_of(run),
            (8, 4) if run.args.smoke else (32, 16),
            num_sequences,
            run.args.context,
            torch.bfloat16 if run.is_cuda else torch.float32,
            torch.Generator(run.device).manual_seed(0),
            lambda num: tiles_of(run, num).config,
        )

    def batch(self, num: int) -> Sequences:
        """Return the first `num` sequences."""
        return self.sequences.first(num)

    def pooled_moe(self, num: int) -> PooledMoe:
        """Return the kernels, with the tiles that batches of `num` get in every case."""
        if self._tiles is None:
            return emo_kernels.pooled_moe
        return partial(emo_kernels.pooled_moe, config=self._tiles(num))

    def replayed_moe(self, num: int) -> PooledMoe:
        """Return what a graph captures: the kernels; without CUDA the twin, which is quick."""
        is_cuda = self.sequences.tokens_T.device.type == "cuda"
        return self.pooled_moe(num) if is_cuda else reference.pooled_moe

    def begin(self, batch: Sequences, case: Case) -> None:
        """Set a batch to its first tokens, in the case's pools."""
        batch.set_rows(case.rows)
        tokens_T, position = self.start
        batch.set_next(tokens_T[: len(batch.tokens_T)], position)

    def device_bytes(self, case: Case) -> int:
        """Return trunk + slots x bytes: the total with a slab of just the case's slots."""
        slots = self.geometry.num_layers * case.slots
        return self.model.trunk_bytes + slots * self.geometry.expert_bytes(self.dtype)

    def read_bytes(self, num: int, experts_hit: float) -> float:
        """Return the bytes a step must read: trunk without embeddings, keys and values, experts."""
        trunk = self.model.trunk_bytes - self.model.embed.nbytes
        past = num * self.geometry.kv_bytes(self.context, self.dtype)
        return trunk + past + self.expert_read_bytes(experts_hit)

    def expert_read_bytes(self, experts_hit: float) -> float:
        """Return the bytes of the experts a step must read, all layers together."""
        experts = self.geometry.num_layers * experts_hit
        return experts * self.geometry.expert_bytes(self.dtype)

    def experts_hit(self, moe_inputs: Sequence[Tensor], pool_rows_T: Tensor) -> float:
        """Return how many experts per layer the tokens take together, the mean over layers."""
        hit = []
        for x_TD, layer in zip(moe_inputs, self.model.layers, strict=True):
            logits_TE = torch.nn.functional.linear(x_TD, layer.gate)
            routed = emo_kernels.route(logits_TE, pool_rows_T, layer.tables, self.model.router)
            slots = routed.slots_TK[routed.slots_TK >= 0]
            hit.append(slots.unique().numel())  # sync: outside of what is timed
        return mean(hit)


# -- checks --


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the size of the difference relative to what was wanted, row by row."""
    got, wanted = got.float(), wanted.float()
    return (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)


def check(
    setting: Setting, num: int, again: Callable[[], Tensor], tolerances: Tolerances
) -> list[dict[str, Any]]:
    """Check one batch size in every case; return what was found, or raise CheckFailed.

    `again` repeats the step another way, from the same state, and returns its logits: a replay.
    """
    batch, model, rows = setting.batch(num), setting.model, []
    pooled_moe = setting.pooled_moe(num)
    full_TV: Tensor | None = None
    for case in setting.cases:
        setting.begin(batch, case)
        moe_inputs: list[Tensor] = []
        eager_TV = model.step(batch, pooled_moe, moe_inputs)
        full_TV = eager_TV if full_TV is None else full_TV
        row: dict[str, Any] = {
            "case": case.name,
            "batch": num,
            "slots": case.slots,
            "change_from_full": relative(eager_TV, full_TV).median().item(),
            "experts_hit": setting.experts_hit(moe_inputs, batch.pool_rows_T),
        }
        if case is not setting.cases[0]:
            _require(row, "change_from_full", at_least=tolerances.change)
        setting.begin(batch, case)
        again_TV = again()
        row["step_error"] = relative(again_TV, eager_TV).median().item()
        row["is_identical"] = torch.equal(again_TV, eager_TV)
        _require(row, "step_error", at_most=tolerances.step)
        row["twin_error"] = _layer_error(model, moe_inputs, batch.pool_rows_T, pooled_moe)
        _require(row, "twin_error", at_most=tolerances.twin)
        rows.append(row)
    return rows


def _layer_error(
    model: DecodeModel, moe_inputs: Sequence[Tensor], pool_rows_T: Tensor, pooled_moe: PooledMoe
) -> float:
    """Return the largest relative error of a token's MoE layer output, kernels against twin."""
    errors = []
    for x_TD, layer in zip(moe_inputs, model.layers, strict=True):
        got, wanted = (
            model.moe(x_TD, layer, pool_rows_T, experts)
            for experts in (pooled_moe, reference.pooled_moe)
        )
        errors.append(relative(got, wanted).max().item())
    return max(errors)


def _require(
    row: dict[str, Any], key: str, at_least: float = 0.0, at_most: float = float("inf")
) -> None:
    if not at_least <= row[key] <= at_most:  # nan too
        raise CheckFailed(
            f"{row['case']}, batch {row['batch']}: {key} is {row[key]:.3g}, wanted"
            f" {at_least:g} to {at_most:g}"
        )
