"""What the router did with every token: coverage by request, usage by pool, mass by request.

While a step runs each MoE layer copies its gate's logits to memory that never moves, one small
kernel that CUDA graphs can hold. When the next step begins they join those that wait, one copy for
all layers. The rest is done when there is no more room or somebody asks, for hundreds of tokens at
once and without waiting for the device; what it costs, benchmarks/bench_coverage.py tells. Logits
are kept as they were routed; the tables that a token was routed by must still stand when it is
counted, so a row's tokens are counted before the row is given to another pool.

Coverage is the share of the full router's mass inside the pool, mean over tokens and MoE layers:
softmax of a layer's standard experts, in fp32, at temperature 1 (DESIGN, vocabulary). The numbers
are one rank's: gates are replicated, so rank 0 records and the others do not.

Shapes: L MoE layers, T tokens of a step, C tokens that may wait, N tokens counted at once, E
experts of a layer (in memory for all layers: the most of any), K experts a token takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
    "RoutedLayer",
    "RoutingRecord",
    "StepRequests",
    "pool_key",
]

PoolKey = tuple[tuple[tuple[int, ...], ...], float]
"""What makes two pools one for usage: experts of each layer, and temperature."""

_LEAST_TOKENS = 2048  # that may wait: what is counted at once on a server that decodes
_MOST_POOLS = 256  # whose usage is kept though no row is theirs any more


def pool_key(expert_ids: Sequence[Sequence[int]], temperature: float) -> PoolKey:
    """Return the key of a pool with these experts a layer."""
    return tuple(tuple(sorted(ids)) for ids in expert_ids), temperature


class RequestTag(NamedTuple):
    """What the front end says of a request: where it routes, and what is to be summed up for it."""

    row: int
    account: int = NO_ACCOUNT
    mass_slot: int = NO_MASS_SLOT


@dataclass(frozen=True, eq=False)
class RoutedLayer:
    """What a MoE layer routes by: tables by pool row, `pool_table` [rows, E], `temperatures`."""

    moe: MoeLayer
    pool_table: Tensor
    temperatures: Tensor


class LayerRecord:
    """The logits of one layer in the step that runs, in `room_TE`, which never moves."""

    def __init__(self, room_TE: Tensor) -> None:
        self._room_TE = room_TE
        self._of_step = room_TE[:0]  # cut anew only when the number of tokens changes

    def note(self, logits_TE: Tensor) -> None:
        """Keep the logits of a step; called inside CUDA graphs."""
        if logits_TE.shape[0] != self._of_step.shape[0]:
            self._of_step = self._room_TE[: logits_TE.shape[0]]
        self._of_step.copy_(logits_TE)


class StepRequests(NamedTuple):
    """The requests of a step, and how many tokens each has in it: `lengths`, of theirs an array."""

    tags: Sequence[RequestTag]
    lengths: np.ndarray
    num_tokens: int


class RoutingRecord:
    """Sum up what the router did, in steps of the model runner; see the module.

    Each of `layers`, by index, notes its logits, which are `dtype`, in its entry of `of_layer`.
    `begin` comes before each step with requests and `pause` before any other; `rebind` before a
    row of the pool tables is written. All may be called only between two steps.
    """

    def __init__(
        self,
        layers: Mapping[int, RoutedLayer],
        max_num_tokens: int,
        dtype: torch.dtype,
        *,
        norm_topk_prob: bool,
    ) -> None:
        self._layers, self._norm_topk_prob = dict(layers), norm_topk_prob
        tables = [layer.pool_table for layer in layers.values()]
        num_rows, self._device = len(tables[0]), tables[0].device
        most_experts = max(table.shape[1] for table in tables)
        self.capacity = max(_LEAST_TOKENS, max_num_tokens)

        def room(num_tokens: int) -> Tensor:
            shape = (num_tokens, len(tables), most_experts)
            return torch.zeros(shape, dtype=dtype, device=self._device)

        def sums(num_lines: int, dtype: torch.dtype) -> dict[int, Tensor]:
            return {
                index: torch.zeros(
                    num_lines, layer.moe.num_experts, dtype=dtype, device=self._device
                )
                for index, layer in layers.items()
            }

        self._running_TLE, self._waiting_CLE = room(max_num_tokens), room(self.capacity)
        self.of_layer = {
            index: LayerRecord(self._running_TLE[:, place, : layer.moe.num_experts])
            for place, (index, layer) in enumerate(layers.items())
        }
        self._usage = sums(num_rows, torch.int64)
        self._mass = sums(MASS_SLOTS + 1, torch.float64)  # the last line is nobody's
        self._row_tokens = np.zeros(num_rows, dtype=np.int64)
        self._mass_tokens = np.zeros(MASS_SLOTS + 1, dtype=np.int64)
        self._key_of_row: dict[int, PoolKey] = {}
        self._past: OrderedDict[PoolKey, tuple[int, dict[int, Tensor]]] = OrderedDict()
        self._running: StepRequests | None = None
        self._waiting: list[StepRequests] = []
        self._num_waiting = 0
        self._sums: dict[int, tuple[float, int]] = {}
        self._unread: tuple[Tensor, torch.cuda.Event | None, np.ndarray] | None = None

    # -- steps --

    def begin(self, step: StepRequests) -> None:
        """Make ready for a step of these requests."""
        self.pause()
        self._running = step

    def pause(self) -> None:
        """Make ready for a step of nobody's tokens: have the last step's wait to be counted."""
        step, self._running = self._running, None
        if step is None:
            return
        if self._num_waiting + step.num_tokens > self.capacity:
            self._count_waiting()
        start, self._num_waiting = self._num_waiting, self._num_waiting + step.num_tokens
        self._waiting_CLE[start : self._num_waiting] = self._running_TLE[: step.num_tokens]
        self._waiting.append(step)

    @torch.inference_mode()
    def count(self) -> None:
        """Count every token there is logits of."""
        self.pause()
        if self._waiting:
            self._count_waiting()

    def _count_waiting(self) -> None:
        lengths = np.concatenate([step.lengths for step in self._waiting])
        tags_3R = np.array([tag for step in self._waiting for tag in step.tags], dtype=np.int64).T
        rows_N, accounts_N, slots_N = np.repeat(tags_3R, lengths, axis=1)
        self._waiting, self._num_waiting = [], 0
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
        for place, (index, layer) in enumerate(self._layers.items()):
            waiting_NE = self._waiting_CLE[: len(rows_N), place]
            logits_NE = waiting_NE[:, : layer.moe.num_experts].float()
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
