"""What the router did with every token: coverage by request, usage by pool, mass by request.

While a step runs, each MoE layer copies its gate's logits to memory that never moves, by one small
kernel that CUDA graphs can hold. When the next step begins, one copy for all layers moves them to
the waiting tokens. Waiting tokens are counted when there is no more room or a sum is asked for:
hundreds of tokens at once and without waiting for the device. benchmarks/serving/coverage.py
measures what this costs. Logits are kept as they were routed. The tables that routed a token must
still stand when it is counted, so a row's tokens are counted before another pool gets the row.
Drafted tokens that were rejected are in no sum: `reject` tells their numbers before the next step.

Coverage is the share of the full router's mass inside the pool, as a mean over tokens and MoE
layers: softmax over a layer's standard experts, in fp32, at temperature 1. Gates are replicated, so
only rank 0 records.

Shapes: L MoE layers, T tokens of a step, C tokens that may wait, N tokens counted at once, E
experts of a layer (where layers differ: the most of any), K experts a token takes.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from cachetools import FIFOCache
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from emo_serve.emo.routing import router_probabilities, standard_probabilities, taken_experts
from emo_serve.facts import MoeLayer
from emo_serve.vllm_plugin.contract import (
    MASS_SLOTS,
    NO_ACCOUNT,
    NO_MASS_SLOT,
    CoverageRow,
    RequestTag,
)

__all__ = [
    "LayerRecord",
    "PoolKey",
    "RoutedLayer",
    "RoutingRecord",
    "StepRequests",
    "pool_key",
]

PoolKey = tuple[tuple[tuple[int, ...], ...], float]
"""Pools with the same experts per layer and the same temperature share their usage."""

_LEAST_TOKENS = 2048  # that may wait: so many are counted at once on a server that decodes
_MOST_FOR_USAGE = 128  # of the tokens counted at once, how many are sampled for usage,
_LEAST_FOR_USAGE = 8  # and how many of a pool that has few
_MOST_POOLS = 256  # whose usage is kept after they have lost their rows


def pool_key(expert_ids: Sequence[Sequence[int]], temperature: float) -> PoolKey:
    """Return the key of a pool with these experts per layer."""
    return tuple(tuple(sorted(ids)) for ids in expert_ids), temperature


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """A MoE layer, and the experts of each row's pool: bool `pool_table` [rows, E]."""

    moe: MoeLayer
    pool_table: Tensor


class LayerRecord:
    """The logits of one layer in the running step, in `room_TE`, which never moves."""

    def __init__(self, room_TE: Tensor) -> None:
        self._room_TE = room_TE
        self._of_step = room_TE[:0]  # sliced again only when the number of tokens changes

    def note(self, logits_TE: Tensor) -> None:
        """Keep the logits of a step; called inside CUDA graphs."""
        if logits_TE.shape[0] != self._of_step.shape[0]:
            self._of_step = self._room_TE[: logits_TE.shape[0]]
        self._of_step.copy_(logits_TE)


class StepRequests(NamedTuple):
    """The requests of a step, and how many tokens each has in it."""

    tags: Sequence[RequestTag]
    lengths: np.ndarray
    num_tokens: int


class _LikeLayers:
    """Layers of one geometry, counted together: one by one, a GPU would wait for launches.

    `tables` are the layers' pool tables by index, in the order of the layers in `waiting_CLE`.
    """

    def __init__(self, moe: MoeLayer, tables: Mapping[int, Tensor], waiting_CLE: Tensor) -> None:
        self._moe, self._tables, self._waiting_CLE = moe, dict(tables), waiting_CLE
        num_rows = len(next(iter(tables.values())))
        shape_LE = (len(tables), moe.num_experts)
        device = waiting_CLE.device
        self.usage = torch.zeros(num_rows, *shape_LE, dtype=torch.float64, device=device)
        # The last slot is for tokens without a mass slot.
        self.mass = torch.zeros(MASS_SLOTS + 1, *shape_LE, dtype=torch.float64, device=device)

    @property
    def has_standard_experts(self) -> bool:
        """Tell whether a pool can have less than the full router's mass."""
        return self._moe.num_standard_experts > 0

    @property
    def num_layers(self) -> int:
        """Return how many layers these are."""
        return len(self._tables)

    def add_usage(self, tokens_M: Tensor, rows_M: Tensor, weights_M: Tensor) -> None:
        """Add the experts that these tokens took, each token by its weight."""
        num_layers = len(self._tables)
        # As if each layer had its own tokens: M * L in all. The same below.
        logits_TE = self._waiting_CLE[tokens_M].flatten(0, 1)
        pool_TE = self._pools()[rows_M].flatten(0, 1)
        experts_TK, is_taken_TK = taken_experts(logits_TE, self._moe, pool_TE)
        lines_ML = rows_M[:, None] * num_layers + torch.arange(num_layers, device=rows_M.device)
        places_TK = lines_ML.flatten()[:, None] * self._moe.num_experts + experts_TK
        taken_TK = is_taken_TK * weights_M.repeat_interleave(num_layers)[:, None]
        self.usage.view(-1).scatter_add_(0, places_TK.flatten(), taken_TK.flatten())

    def shares(self, first: int, rows_N: Tensor, slots_N: Tensor | None) -> Tensor:
        """Return the mass [N, L] inside their pools of the tokens from `first` on.

        Also adds to `mass` if slots are given.
        """
        moe, num_tokens = self._moe, len(rows_N)
        logits_TE = self._waiting_CLE[first : first + num_tokens].flatten(0, 1)
        if slots_N is not None:
            mass_NLE = router_probabilities(logits_TE, moe).view(num_tokens, *self.mass.shape[1:])
            self.mass.index_add_(0, slots_N, mass_NLE.double())
        standard_TS = standard_probabilities(logits_TE, moe, None)
        pools_RLS = self._pools()[..., : moe.num_standard_experts]
        inside_TS = pools_RLS.float()[rows_N].flatten(0, 1)
        return (standard_TS * inside_TS).sum(-1).view(num_tokens, -1)

    def _pools(self) -> Tensor:
        """Return the pools of all rows [rows, L, E] as they are now."""
        return torch.stack(list(self._tables.values()), 1)

    def by_index(self, values_LE: Tensor) -> dict[int, list[Any]]:
        """Return [E] for each layer, by its index."""
        return dict(zip(self._tables, values_LE.tolist(), strict=True))


class RoutingRecord:
    """Sum up what the router did, step by step of the model runner; see the module.

    `num_layers` of the layers have standard experts; coverage is a mean over them. Each of
    `layers`, by index, notes its logits, in `dtype`, in its entry of `of_layer`. Call
    `begin` before each step with requests, `pause` before any other step, and `rebind` before a row
    of the pool tables is written; all of them only between two steps. `reject` follows a step in
    which requests had drafts.
    """

    def __init__(
        self, layers: Mapping[int, RoutedLayer], max_num_tokens: int, dtype: torch.dtype
    ) -> None:
        self._num_rows, most_experts = (
            max(layer.pool_table.shape[dim] for layer in layers.values()) for dim in (0, 1)
        )
        self._device = next(iter(layers.values())).pool_table.device
        self.capacity = max(_LEAST_TOKENS, max_num_tokens)
        self._running_TLE, self._waiting_CLE = (
            torch.zeros(num_tokens, len(layers), most_experts, dtype=dtype, device=self._device)
            for num_tokens in (max_num_tokens, self.capacity)
        )
        tables_of: dict[MoeLayer, dict[int, Tensor]] = {}
        for index, layer in layers.items():
            tables_of.setdefault(layer.moe, {})[index] = layer.pool_table
        self.of_layer: dict[int, LayerRecord] = {}
        self._like: list[_LikeLayers] = []
        for moe, tables in tables_of.items():
            first = len(self.of_layer)
            for place, index in enumerate(tables, first):
                self.of_layer[index] = LayerRecord(self._running_TLE[:, place, : moe.num_experts])
            waiting_CLE = self._waiting_CLE[:, first : len(self.of_layer), : moe.num_experts]
            self._like.append(_LikeLayers(moe, tables, waiting_CLE))
        self.num_layers = sum(like.num_layers for like in self._like if like.has_standard_experts)
        self._random = np.random.default_rng(0)
        self._row_tokens = np.zeros(self._num_rows, dtype=np.int64)
        self._mass_tokens = np.zeros(MASS_SLOTS + 1, dtype=np.int64)
        self._key_of_row: dict[int, PoolKey] = {}
        # The pool that lost its last row the longest time ago is forgotten first.
        self._past: FIFOCache[PoolKey, tuple[int, list[Tensor]]] = FIFOCache(_MOST_POOLS)
        self._running: StepRequests | None = None
        self._rejected: _Copied | None = None
        self._waiting: list[tuple[StepRequests, _Copied | None]] = []
        self._num_waiting = 0
        self._sums: dict[int, tuple[float, int]] = {}
        self._unread: tuple[_Copied, np.ndarray, np.ndarray] | None = None

    # -- steps --

    def begin(self, step: StepRequests) -> None:
        """Prepare for a step of these requests."""
        self.pause()
        self._running = step

    def pause(self) -> None:
        """Prepare for a step without requests; the last step's tokens now wait to be counted."""
        step, self._running = self._running, None
        rejected, self._rejected = self._rejected, None
        if step is None:
            return
        if self._num_waiting + step.num_tokens > self.capacity:
            self._count_waiting()
        start, self._num_waiting = self._num_waiting, self._num_waiting + step.num_tokens
        self._waiting_CLE[start : self._num_waiting] = self._running_TLE[: step.num_tokens]
        self._waiting.append((step, rejected))

    def reject(self, num_rejected_R: Tensor) -> None:
        """Leave out the last tokens of each request in the step that ran last: rejected drafts."""
        if self._running is not None:
            self._rejected = _Copied.begin(num_rejected_R)

    @torch.inference_mode()
    def count(self) -> None:
        """Count every token whose logits are here."""
        self.pause()
        if self._waiting:
            self._count_waiting()

    def _count_waiting(self) -> None:
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        routed_R = np.concatenate([step.lengths for step, _ in waiting])
        rejected_R = np.concatenate([_rejected_of(*entry) for entry in waiting])
        lengths_R = routed_R - rejected_R
        if rejected_R.any():
            self._close_gaps(routed_R, lengths_R)
        tags_3R = np.array([tag for step, _ in waiting for tag in step.tags], dtype=np.int64).T
        rows_R, accounts_R, slots_R = tags_3R
        has_slot_R = slots_R != NO_MASS_SLOT
        self._count_usage(np.repeat(np.where(has_slot_R, self._num_rows, rows_R), lengths_R))
        slots_N = None
        if has_slot_R.any():
            slots_N = np.repeat(np.where(has_slot_R, slots_R, MASS_SLOTS), lengths_R)
            self._mass_tokens += np.bincount(slots_N, minlength=MASS_SLOTS + 1)
        shares_N = self._shares(np.repeat(rows_R, lengths_R), slots_N)
        self._fold()
        self._unread = (_Copied.begin(shares_N), accounts_R, lengths_R)

    def _close_gaps(self, routed_R: np.ndarray, lengths_R: np.ndarray) -> None:
        """Move the waiting logits together where those of rejected drafts are between them."""
        places_N = np.arange(routed_R.sum()) - np.repeat(np.cumsum(routed_R) - routed_R, routed_R)
        kept_M = np.flatnonzero(places_N < np.repeat(lengths_R, routed_R))
        self._waiting_CLE[: len(kept_M)] = self._waiting_CLE[self._to_device(kept_M)]

    def _count_usage(self, rows_N: np.ndarray) -> None:
        """Add to usage what a sample of each row's tokens took, standing for all its tokens.

        Choosing a token's best experts again is the most expensive part of counting, and usage is
        only a statistic. Tokens that count for no usage have the row after the last.
        """
        tokens_R = np.bincount(rows_N, minlength=self._num_rows + 1)
        starts_R = np.cumsum(tokens_R) - tokens_R
        self._row_tokens += tokens_R[:-1]
        most_R = np.ceil(_MOST_FOR_USAGE / len(rows_N) * tokens_R).clip(min=_LEAST_FOR_USAGE)
        chosen_R = np.minimum(most_R, tokens_R)
        chosen_R[-1] = 0
        order_N = np.argsort(rows_N + self._random.random(len(rows_N)))  # random within a row
        sorted_N = rows_N[order_N]
        tokens_M = order_N[np.arange(len(rows_N)) - starts_R[sorted_N] < chosen_R[sorted_N]]
        rows_M = rows_N[tokens_M]
        if not len(tokens_M):
            return
        tokens, rows = self._to_device(np.stack([tokens_M, rows_M]))
        weights = self._to_device(tokens_R[rows_M] / chosen_R[rows_M])
        for like in self._like:
            like.add_usage(tokens, rows, weights)

    def _shares(self, rows_N: np.ndarray, slots_N: np.ndarray | None) -> Tensor:
        """Return each token's share inside its pool, as a mean over layers; add to mass."""
        rows = self._to_device(rows_N)
        slots = None if slots_N is None else self._to_device(slots_N)
        counted = [like for like in self._like if like.has_standard_experts]
        parts = []
        for first in range(
            0, len(rows), _LEAST_TOKENS
        ):  # a long prompt at once would take too much memory
            part = slice(first, first + _LEAST_TOKENS)
            part_slots = None if slots is None else slots[part]
            shares = {like: like.shares(first, rows[part], part_slots) for like in self._like}
            if counted:
                parts.append(torch.cat([shares[like] for like in counted], 1).mean(1))
        return torch.cat(parts) if counted else torch.zeros(len(rows), device=self._device)

    def _to_device(self, values: np.ndarray) -> Tensor:
        moved: Tensor = async_tensor_h2d(values, self._device)
        return moved

    def _fold(self) -> None:
        """Add the shares that were counted last to their accounts."""
        if self._unread is None:
            return
        shares, accounts_R, lengths_R = self._unread
        self._unread = None
        sums = np.cumsum(shares.wait(), dtype=np.float64)
        masses_R = np.diff(np.append(0.0, sums)[np.cumsum(lengths_R)], prepend=0.0)
        accounts, places_R = np.unique(accounts_R, return_inverse=True)
        masses = np.bincount(places_R, weights=masses_R)
        tokens = np.bincount(places_R, weights=lengths_R)
        for account, mass, count in zip(accounts.tolist(), masses, tokens, strict=True):
            if account != NO_ACCOUNT:
                before_mass, before = self._sums.get(account, (0.0, 0))
                self._sums[account] = (before_mass + float(mass), before + int(count))

    # -- readings --

    def read_coverage(self) -> list[CoverageRow]:
        """Return the coverage of each account since the last call."""
        self.count()
        self._fold()
        sums, self._sums = self._sums, {}
        return [CoverageRow(account, mass, tokens) for account, (mass, tokens) in sums.items()]

    def read_mass(self, slot: int) -> tuple[int, dict[int, list[float]]]:
        """Return and forget what a mass slot holds: tokens, and [E] for each MoE layer."""
        self.count()
        tokens = int(self._mass_tokens[slot])
        self._mass_tokens[slot] = 0
        masses = [like.by_index(like.mass[slot]) for like in self._like]
        for like in self._like:
            like.mass[slot] = 0.0
        return tokens, dict(ChainMap(*masses))

    def usage(self, key: PoolKey) -> tuple[int, dict[int, list[int]]]:
        """Return how many tokens a pool routed, and how many of them took each expert of a layer.

        The first is exact. The second is estimated from a random sample of each pool's tokens where
        more than 128 tokens were counted at once. Neither includes requests with a mass slot, which
        are the server's own.
        """
        self.count()
        tokens, counts = self._past.get(key, (0, self._no_usage()))
        for row, of_row in self._key_of_row.items():
            if of_row == key:
                tokens += int(self._row_tokens[row])
                counts = self._with_usage_of(row, counts)
        whole = [count.round().long() for count in counts]
        by_index = [like.by_index(count) for like, count in zip(self._like, whole, strict=True)]
        return tokens, dict(ChainMap(*by_index))

    def rebind(self, row: int, key: PoolKey) -> None:
        """Give a row to another pool; the usage of the pool that had it is kept."""
        last = self._key_of_row.get(row)
        if last == key:
            return
        self.count()
        if last is not None and self._row_tokens[row]:
            tokens, counts = self._past.pop(last, (0, self._no_usage()))
            tokens += int(self._row_tokens[row])
            self._past[last] = (tokens, self._with_usage_of(row, counts))
        self._row_tokens[row] = 0
        for like in self._like:
            like.usage[row] = 0
        self._key_of_row[row] = key

    def _with_usage_of(self, row: int, counts: Sequence[Tensor]) -> list[Tensor]:
        usages = (like.usage[row].cpu() for like in self._like)
        return [count + usage for count, usage in zip(counts, usages, strict=True)]

    def _no_usage(self) -> list[Tensor]:
        return [torch.zeros(like.usage.shape[1:], dtype=torch.float64) for like in self._like]


class _Copied(NamedTuple):
    """A tensor on its way to the host; the event, if any, tells when it has arrived."""

    host: Tensor
    arrived: torch.cuda.Event | None

    @classmethod
    def begin(cls, values: Tensor) -> _Copied:
        """Begin to copy, without waiting for the device."""
        if values.device.type != "cuda":
            return cls(values.cpu(), None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(host, arrived)

    def wait(self) -> np.ndarray:
        """Return the values, once they are here."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values: np.ndarray = self.host.numpy()
        return values


def _rejected_of(step: StepRequests, rejected: _Copied | None) -> np.ndarray:
    """Return how many of each request's tokens were rejected drafts; counting needs them now."""
    return np.zeros_like(step.lengths) if rejected is None else rejected.wait()
