"""The records that routing, schedule and grouped GEMMs share; nothing here computes.

Shapes: T tokens, E experts of the layer, P pool rows, S slots, K places a token (top-k),
R = T * K routed rows; row r = t * K + k is place k of token t.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["NO_SLOT", "PoolTables", "Routed", "Router", "Schedule"]

NO_SLOT = -1
"""What a place holds that takes no expert: no work is done for it."""


@dataclass(frozen=True)
class Router:
    """The rule of one layer's router.

    `top_k` counts every expert a token takes; the last `num_shared` expert ids are shared.
    `always_active` ids, where there are any, replace the shared rule: one softmax over the pool,
    these taken with their own values. Raises ValueError when the numbers contradict each other.
    """

    num_experts: int
    top_k: int
    num_shared: int = 0
    always_active: tuple[int, ...] = ()
    renormalize: bool = False

    def __post_init__(self) -> None:
        forced = len(self.always_active) or self.num_shared
        if not 0 < self.top_k <= self.num_experts or not 0 <= self.num_shared <= self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} and num_shared {self.num_shared} must lie within the layer's"
                f" {self.num_experts} experts"
            )
        if forced > self.top_k:
            raise ValueError(f"{forced} experts are taken by every token, top_k is {self.top_k}")
        if any(not 0 <= expert < self.num_experts for expert in self.always_active):
            raise ValueError(
                f"always_active {self.always_active} must be ids below {self.num_experts}"
            )
        if self.renormalize and forced:
            raise ValueError("renormalize cannot go with shared or always-active experts")


@dataclass(frozen=True)
class PoolTables:
    """Which experts each pool row holds and where experts sit; may change between calls.

    members_PE bool; temperatures_P fp32, which divide the logits; slot_of_expert_E int32. Shared
    and always-active experts belong to every row, whatever it says.
    """

    members_PE: Tensor
    temperatures_P: Tensor
    slot_of_expert_E: Tensor


@dataclass(frozen=True)
class Routed:
    """What each token takes: weights_TK fp32 and slots_TK int32, NO_SLOT with weight 0 for none."""

    weights_TK: Tensor
    slots_TK: Tensor


@dataclass(frozen=True)
class Schedule:
    """Routed rows in the order of their slots, cut into tiles of at most `block_m` rows.

    All int32, on the device, of sizes that T, K and S alone decide: rows_R, the routed rows with a
    slot, sorted by (slot, row); offsets_S1, where each slot's rows begin and, last, how many there
    are; for each tile its slot and its first position in rows_R; num_tiles, of one element. What
    lies past that many rows or tiles is undefined.
    """

    rows_R: Tensor
    offsets_S1: Tensor
    tile_slots: Tensor
    tile_starts: Tensor
    num_tiles: Tensor
    block_m: int

    @property
    def num_slots(self) -> int:
        """Return S."""
        return self.offsets_S1.shape[0] - 1
