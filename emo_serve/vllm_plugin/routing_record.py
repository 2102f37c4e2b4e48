"""What the router did with every token: coverage by request, usage by pool, mass by request.

While a step runs each MoE layer copies its gate's logits into a ring, one small kernel that CUDA
graphs can hold; `places` says where. All else waits until the ring is full or somebody asks, and is
then done for hundreds of tokens at once, without waiting for the device; what it costs,
benchmarks/bench_coverage.py tells. Logits are kept as they were routed; the tables that a token was
routed by must still stand when it is counted, so a row's tokens are counted before the row is
given to another pool.

Coverage is the share of the full router's mass inside the pool, mean over tokens and MoE layers:
softmax of a layer's standard experts, in fp32, at temperature 1 (DESIGN, vocabulary). The numbers
are one rank's: gates are replicated, so rank 0 records and the others do not.

Shapes: N tokens counted at once, C tokens the ring holds, E experts, K experts a token takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emo_serve.emo.config import MoeLayer
from emo_serve.emo.routing import route, router_probabilities, standard_probabilities
from emo_serve.vllm_plugin import MASS_SLOTS, NO_ACCOUNT, NO_MASS_SLOT

__all__ = [
    "LayerRecord",
    "PoolKey",
    "RequestTag",
    "RoutingRecord",
    "pool_key",
]

PoolKey = tuple[tuple[tuple[int, ...], ...], float]
"""What makes two pools one for usage: experts of each layer, and temperature."""

_LEAST_TOKENS = 2048  # of the ring: what is counted at once on a server that decodes
_MOST_POOLS = 256  # whose usage is kept though no row is theirs any more


def pool_key(expert_ids: Sequence[Sequence[int]], temperature: float) -> PoolKey:
    """Return the key of a pool with these experts a layer."""
    return tuple(tuple(sorted(ids)) for ids in expert_ids), temperature


class RequestTag(NamedTuple):
    """What the front end says of a request: where it routes, and what is to be summed up for it."""

    row: int
    account: int = NO_ACCOUNT
    mass_slot: int = NO_MASS_SLOT


@dataclass(eq=False)
class _Places:
    """Where in the ring each token of a step is kept, in memory that never moves.

    `of_step` is its beginning, cut once a step and not once a layer.
    """

    buffer: Tensor
    of_step: Tensor

    def first(self, num_tokens: int) -> Tensor:
        if num_tokens == self.of_step.shape[0]:
            return self.of_step
        return self.buffer[:num_tokens]  # padded, or nobody's


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One layer's part of the ring [C + 1, E]; its last line takes what is nobody's."""

    ring: Tensor
    places: _Places

    def note(self, logits_TE: Tensor) -> None:
        """Keep the logits of a step; called inside CUDA graphs."""
        self.ring.index_copy_(0, self.places.first(logits_TE.shape[0]), logits_TE)


@dataclass(frozen=True)
class _Layer:
    moe: MoeLayer
    pool_table: Tensor
    temperatures: Tensor
    record: LayerRecord


class RoutingRecord:
    """Sum up what the router did, in steps of the model runner; see the module.

    `begin` comes before each step with requests and `pause` before any other; `rebind` before a
    row of the pool tables is written. All may be called only between two steps.
    """

    def __init__(
        self, num_rows: int, max_num_tokens: int, norm_topk_prob: bool, device: torch.device
    ) -> None:
        self.capacity = max(_LEAST_TOKENS, max_num_tokens)
        self._device, self._norm_topk_prob = device, norm_topk_prob
        self._order = torch.arange(self.capacity, device=device)
        nowhere = torch.full((max_num_tokens,), self.capacity, device=device)
        self._places = _Places(nowhere, nowhere[:0])
        self._layers: dict[int, _Layer] = {}
        self._usage: dict[int, Tensor] = {}  # [rows, E] a layer
        self._mass: dict[int, Tensor] = {}  # [slots + 1, E] a layer, the last nobody's
        self._row_tokens = np.zeros(num_rows, dtype=np.int64)
        self._mass_tokens = np.zeros(MASS_SLOTS + 1, dtype=np.int64)
        self._key_of_row: dict[int, PoolKey] = {}
        self._past: OrderedDict[PoolKey, tuple[int, dict[int, Tensor]]] = OrderedDict()
        self._steps: list[tuple[Sequence[RequestTag], np.ndarray]] = []
        self._num_kept = 0
        self._sums: dict[int, tuple[float, int]] = {}
        self._unread: tuple[Tensor, torch.cuda.Event | None, np.ndarray] | None = None

    def add_layer(
        self,
        index: int,
        moe: MoeLayer,
        pool_table: Tensor,
        temperatures: Tensor,
        dtype: torch.dtype,
    ) -> LayerRecord:
        """Make room for one more MoE layer, whose tables these are and whose logits are `dtype`."""
        ring = torch.zeros(self.capacity + 1, moe.num_experts, dtype=dtype, device=self._device)
        record = LayerRecord(ring, self._places)
        self._layers[index] = _Layer(moe, pool_table, temperatures, record)
        for sums, lines, kind in (
            (self._usage, len(pool_table), torch.int64),
            (self._mass, MASS_SLOTS + 1, torch.float64),
        ):
            sums[index] = torch.zeros(lines, moe.num_experts, dtype=kind, device=self._device)
        return record

    # -- steps --

    def begin(self, tags: Sequence[RequestTag], query_start: np.ndarray) -> None:
        """Make ready for a step of these requests; `query_start` [requests + 1] is their tokens."""
        num_tokens = int(query_start[-1])
        if self._num_kept + num_tokens > self.capacity:
            self.count()
        start = self._num_kept
        self.pause()
        self._places.of_step = self._places.buffer[:num_tokens]
        self._places.of_step.copy_(self._order[start : start + num_tokens])
        self._num_kept += num_tokens
        self._steps.append((tags, np.diff(query_start)))

    def pause(self) -> None:
        """Make ready for a step of nobody's tokens."""
        self._places.of_step.fill_(self.capacity)
        self._places.of_step = self._places.buffer[:0]

    @torch.inference_mode()
    def count(self) -> None:
        """Count the tokens in the ring and empty it."""
        if not self._num_kept:
            return
        lengths = np.concatenate([lengths for _, lengths in self._steps])
        tags_3R = np.array([tag for tags, _ in self._steps for tag in tags], dtype=np.int64).T
        rows_N, accounts_N, slots_N = np.repeat(tags_3R, lengths, axis=1)
        self._steps, self._num_kept = [], 0
        self._row_tokens += np.bincount(rows_N, minlength=len(self._row_tokens))
        has_mass = bool((slots_N != NO_MASS_SLOT).any())
        slots_N[slots_N == NO_MASS_SLOT] = MASS_SLOTS
        self._mass_tokens += np.bincount(slots_N, minlength=MASS_SLOTS + 1)
        on_device = torch.from_numpy(np.stack([rows_N, slots_N])).to(self._device)
        shares_N = self._count_layers(*on_device, has_mass=has_mass)
        self._fold()
        self._unread = (*_to_host(shares_N), accounts_N)

    def _count_layers(self, rows_N: Tensor, slots_N: Tensor, *, has_mass: bool) -> Tensor:
        """Add to usage and mass; return each token's share inside its pool, mean over layers."""
        shares_N = torch.zeros(len(rows_N), device=self._device)
        num_counted = 0
        for index, layer in self._layers.items():
            logits_NE = layer.record.ring[: len(rows_N)].float()
            pool_NE = layer.pool_table[rows_N]
            if layer.moe.num_standard_experts:
                standard_NS = standard_probabilities(logits_NE, layer.moe, None)
                shares_N += (standard_NS * pool_NE[:, : layer.moe.num_standard_experts]).sum(-1)
                num_counted += 1
            if has_mass:
                probabilities_NE = router_probabilities(logits_NE, layer.moe)
                self._mass[index].index_add_(0, slots_N, probabilities_NE.double())
            routing = route(
                logits_NE,
                layer.moe,
                pool_NE,
                layer.temperatures[rows_N, None],
                self._norm_topk_prob,
            )
            usage = self._usage[index]
            places_NK = rows_N[:, None] * usage.shape[1] + routing.experts_TK
            taken_NK = (routing.weights_TK != 0).long()
            usage.view(-1).scatter_add_(0, places_NK.flatten(), taken_NK.flatten())
        return shares_N / max(num_counted, 1)

    def _fold(self) -> None:
        """Add the shares that were counted last to their accounts."""
        if self._unread is None:
            return
        shares, copied, accounts_N = self._unread
        self._unread = None
        if copied is not None:
            copied.synchronize()
        known, places_N = np.unique(accounts_N, return_inverse=True)
        masses = np.bincount(places_N, weights=shares.numpy())
        counts = np.bincount(places_N)
        for account, mass, count in zip(known.tolist(), masses, counts, strict=True):
            if account != NO_ACCOUNT:
                before_mass, before = self._sums.get(account, (0.0, 0))
                self._sums[account] = (before_mass + float(mass), before + int(count))

    # -- questions --

    def read_coverage(self) -> list[tuple[int, float, int]]:
        """Return account, mass inside and tokens of each account since the last call."""
        self.count()
        self._fold()
        sums, self._sums = self._sums, {}
        return [(account, mass, tokens) for account, (mass, tokens) in sums.items()]

    def read_mass(self, slot: int) -> tuple[int, dict[int, list[float]]]:
        """Return and forget what a slot's requests gave: tokens, and [E] of each MoE layer."""
        self.count()
        tokens = int(self._mass_tokens[slot])
        self._mass_tokens[slot] = 0
        masses = {index: mass[slot].tolist() for index, mass in self._mass.items()}
        for mass in self._mass.values():
            mass[slot] = 0.0
        return tokens, masses

    def usage(self, key: PoolKey) -> tuple[int, dict[int, list[int]]]:
        """Return the tokens a pool routed, and how many of them took each expert of a layer."""
        self.count()
        tokens, counts = self._past.get(key, (0, self._no_counts()))
        counts = {index: count.clone() for index, count in counts.items()}
        for row, of_row in self._key_of_row.items():
            if of_row == key:
                tokens += int(self._row_tokens[row])
                for index, usage in self._usage.items():
                    counts[index] += usage[row].cpu()
        return tokens, {index: count.tolist() for index, count in counts.items()}

    def rebind(self, row: int, key: PoolKey) -> None:
        """Have a row be another pool's from now on; what the last one did is kept for it."""
        if self._key_of_row.get(row) == key:
            return
        self.count()
        last = self._key_of_row.get(row)
        if last is not None and self._row_tokens[row]:
            tokens, counts = self._past.pop(last, (0, self._no_counts()))
            for index, usage in self._usage.items():
                counts[index] += usage[row].cpu()
            self._past[last] = (tokens + int(self._row_tokens[row]), counts)
            if len(self._past) > _MOST_POOLS:
                self._past.popitem(last=False)
        self._row_tokens[row] = 0
        for usage in self._usage.values():
            usage[row] = 0
        self._key_of_row[row] = key

    def _no_counts(self) -> dict[int, Tensor]:
        return {
            index: torch.zeros(usage.shape[1], dtype=torch.int64)
            for index, usage in self._usage.items()
        }


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Begin to copy; the event tells when it is done."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
