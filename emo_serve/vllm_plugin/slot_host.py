"""The expert slots of one model on one rank: what is loaded into them, and which pools use them.

Any model class whose MoE layers are PooledExperts has one SlotHost, in its attribute `slot_host`.
The model is the network; the host owns all that changes between two of its steps: the expert store,
loads, the layers' tables, and the record of what the router did. The loader fills it at start-up,
worker calls drive it afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.errors import CheckpointError, EmoServeError
from emo_serve.facts import ExpertNames
from emo_serve.vllm_plugin.backends import MoeBackend
from emo_serve.vllm_plugin.contract import (
    BASE_POOL_ROW,
    CoverageReading,
    CoverageRow,
    LoadProgress,
    LoadState,
    PluginSettings,
    PoolUsage,
    RouterMass,
)
from emo_serve.vllm_plugin.expert_store import ExpertStore, HostMemory
from emo_serve.vllm_plugin.loads import CpuMover, CudaMover, ExpertLoad, Mover, SlotCopy
from emo_serve.vllm_plugin.moe import PooledExperts
from emo_serve.vllm_plugin.pacing import Steps
from emo_serve.vllm_plugin.packed import ExpertShape, PackedExpert
from emo_serve.vllm_plugin.routing_record import RoutedLayer, RoutingRecord, pool_key
from emo_serve.vllm_plugin.stage import Stage
from emo_serve.vllm_plugin.streaming import StreamCounts, StreamReader

__all__ = ["SlotHost", "slot_host_of"]

_Number = TypeVar("_Number", int, float)


class SlotHost:
    """Load experts into the slots of a model's layers and publish pools; see the module.

    `layers` has one entry per layer of the model, None for a dense one. Under pipeline parallelism
    the layers of other stages are None, too; `stage` names them. `shape` is this rank's part
    of an expert in the slab, `names` those of its tensors. `holds_all` says that no front end will
    load experts: every expert comes with the model, in the slot of its own number, and the base
    pool is published. All methods are to be called between two steps of the engine; `steps` is told
    when one begins and ends.
    """

    def __init__(
        self,
        layers: Sequence[PooledExperts | None],
        backend: MoeBackend,
        shape: ExpertShape,
        settings: PluginSettings,
        device: torch.device,
        *,
        names: ExpertNames,
        holds_all: bool,
        max_num_tokens: int,
        stage: Stage | None = None,
    ) -> None:
        self.layers = {index: layer for index, layer in enumerate(layers) if layer is not None}
        self.backend, self.shape, self.holds_all = backend, shape, holds_all
        self.record = self._make_record(max_num_tokens) if settings.records_routing else None
        self.steps = Steps()
        self.store: ExpertStore | None = None
        self.streamed = StreamCounts()
        self.trunk_bytes = 0
        self.stage = stage or Stage(0, range(len(layers)))
        self._names = names
        self._num_layers, self._device = len(layers), device
        self._host_expert_bytes = settings.host_expert_bytes
        self._load: ExpertLoad | None = None

    def _make_record(self, max_num_tokens: int) -> RoutingRecord | None:
        """Have the layers record what the router does, on the first rank: gates are replicated."""
        if self.shape.rank != 0 or not self.layers:
            return None
        dtype = next(iter(self.layers.values())).logits_dtype
        routed = {
            index: RoutedLayer(layer.moe, layer.pool_table) for index, layer in self.layers.items()
        }
        record = RoutingRecord(routed, max_num_tokens, dtype)
        for index, layer in self.layers.items():
            layer.record = record.of_layer[index]
        return record

    # -- start-up --

    def open_store(self, checkpoint: ModelCheckpoint) -> ExpertStore:
        """Prepare for loads from a checkpoint; takes the host memory of the settings."""
        is_cuda = self._device.type == "cuda"
        host = HostMemory(self._host_expert_bytes, self.shape, is_pinned=is_cuda)
        piece_bytes = CudaMover.piece_bytes if is_cuda else CpuMover.piece_bytes
        self.store = ExpertStore(checkpoint, self.backend, self.shape, host, piece_bytes)
        self._mover: Mover = (
            CudaMover(self.store, self._slot, self.shape, self._device)
            if is_cuda
            else CpuMover(self.store, self._slot, self.steps)
        )
        reader = StreamReader(self.store.other())  # whose thread is the model's
        self.streamed = reader.counts
        for index, layer in self.layers.items():
            if layer.stream is not None:
                layer.stream.open(index, reader)
        return self.store

    def take_experts(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Put whole experts into the slots of their own numbers; yield all other tensors.

        Raises CheckpointError for a matrix of another shape, layer or expert than the config says.
        """
        experts: dict[tuple[int, int], dict[str, Tensor]] = {}
        for name, weight in weights:
            expert_name = self._names.parse(name)
            if expert_name is None:
                yield name, weight
                continue
            layer, expert, matrix = expert_name
            if self._is_elsewhere(layer):
                continue
            if layer not in self.layers or expert >= self.layers[layer].moe.num_experts:
                raise CheckpointError(f"tensor {name} has no place in a model of this config")
            parts = experts.setdefault((layer, expert), {})
            parts[matrix] = weight
            if len(parts) == 3:
                self._place(layer, expert, parts)
                del experts[layer, expert]

    def end_start_up(self, trunk_bytes: int) -> None:
        """Note what the trunk takes; publish the base pool if every expert is here."""
        self.trunk_bytes = trunk_bytes
        if self.holds_all:
            experts = {i: range(layer.moe.num_experts) for i, layer in self.layers.items()}
            self.publish_pool(BASE_POOL_ROW, self._per_layer(experts), temperature=1.0)

    def _place(self, layer: int, expert: int, parts: Mapping[str, Tensor]) -> None:
        """Put this rank's part of a whole expert into the slot of its own number."""
        slot, rank, ranks = self._slot(layer, expert), self.shape.rank, self.layers[layer].num_ranks
        gate, up = (parts[matrix].chunk(ranks)[rank] for matrix in ("gate", "up"))
        down = parts["down"].chunk(ranks, dim=1)[rank]
        for out, weight in ((slot.w13, torch.cat([gate, up])), (slot.w2, down)):
            if weight.shape != out.values.shape:
                raise CheckpointError(
                    f"expert {expert} of layer {layer} has a part of shape {tuple(weight.shape)},"
                    f" expected {tuple(out.values.shape)}"
                )
            self.backend.pack_into(out, weight)
        self.map_experts([(layer, expert, expert)])

    # -- loads --

    def start_load(self, load_id: int, copies: Sequence[SlotCopy]) -> None:
        """Begin to copy experts into slots beside the engine's steps; one load at a time.

        Experts of other stages are left to these.
        Raises CheckpointError without a store, IndexError or KeyError for what does not exist.
        """
        if self._load is not None and self._load.state == "loading":
            raise EmoServeError(f"load {self._load.load_id} is under way; {load_id} must wait")
        if self.store is None:
            raise CheckpointError("this engine was not started with --load-format emo")
        copies = [copy for copy in copies if not self._is_elsewhere(copy[0])]
        for layer, expert, slot in copies:
            moe = self.layers[layer]
            if not (0 <= expert < moe.moe.num_experts and 0 <= slot < moe.num_slots):
                raise IndexError(
                    f"layer {layer}: expert {expert} of {moe.moe.num_experts} in slot {slot} of"
                    f" {moe.num_slots}"
                )
        for layer, _, slot in copies:
            if (stream := self.layers[layer].stream) is not None:
                stream.give_up(slot)
        self._load = ExpertLoad(load_id, copies, self._mover, self.store)

    def finish_load(
        self, load_id: int, row: int, expert_ids: Sequence[Sequence[int]], temperature: float
    ) -> LoadProgress:
        """Publish the pool if its load is done, and tell how far the load is; may be repeated.

        Raises EmoServeError unless this is the last load that was started.
        """
        load = self._load
        if load is None or load.load_id != load_id:
            raise EmoServeError(f"load {load_id} is not the last that was started here")
        state = load.state  # read once: the load's thread may change it at any time
        if state == "copied":
            load.publish(self.map_experts)
            self.publish_pool(row, expert_ids, temperature)
            state = load.state
        return LoadProgress(
            stage=self.stage.number,
            state=cast(LoadState, state),
            failure=load.failure,
            experts_copied=load.experts_copied,
            bytes_copied=load.experts_copied * self.shape.num_bytes,
            **vars(load.counts),
        )

    def close(self) -> None:
        """End a load under way: a thread inside torch when Python ends would abort the process."""
        if self._load is not None:
            self._load.stop()

    # -- tables --

    def map_experts(self, copies: Iterable[SlotCopy]) -> None:
        """Have copied experts be found in their slots from the next step on."""
        by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for layer, expert, slot in copies:
            by_layer[layer].append((expert, slot))
        for layer, pairs in by_layer.items():
            experts, slots = zip(*pairs, strict=True)
            self.layers[layer].map_experts(experts, slots)

    def publish_pool(
        self, row: int, expert_ids: Sequence[Sequence[int]], temperature: float
    ) -> None:
        """Let requests of `row` route among `expert_ids`: one list per layer, empty if dense.

        All of them must be in place, unless a layer has fewer slots: then the pool is streamed.
        """
        is_streamed = any(
            len(expert_ids[index]) > layer.num_slots for index, layer in self.layers.items()
        )
        if self.record is not None:
            self.record.rebind(row, pool_key(expert_ids, temperature))
        for index, layer in self.layers.items():
            layer.publish(row, expert_ids[index], temperature, is_streamed=is_streamed)

    def _is_elsewhere(self, layer: int) -> bool:
        return layer in range(self._num_layers) and layer not in self.stage.layers

    def _slot(self, layer: int, number: int) -> PackedExpert:
        return self.layers[layer].slot(number)

    # -- what the router did; nothing where it is not recorded --

    def read_coverage(self) -> CoverageReading:
        """Return the coverage of each account since the last call, and what was streamed so far."""
        coverage: tuple[CoverageRow, ...] = ()
        num_layers = 0
        if self.record is not None:
            coverage, num_layers = tuple(self.record.read_coverage()), self.record.num_layers
        streamed = self.streamed if self.shape.rank == 0 else StreamCounts()
        return CoverageReading(coverage, num_layers, streamed.experts, streamed.seconds)

    def read_mass(self, slot: int) -> RouterMass:
        """Return the router's mass in a mass slot, and empty the slot."""
        tokens, mass = (0, {}) if self.record is None else self.record.read_mass(slot)
        return RouterMass(tokens, self._per_layer(mass))

    def usage(self, expert_ids: Sequence[Sequence[int]], temperature: float) -> PoolUsage:
        """Return what pools of this content have used since the start."""
        key = pool_key(expert_ids, temperature)
        tokens, counts = (0, {}) if self.record is None else self.record.usage(key)
        return PoolUsage(tokens, self._per_layer(counts))

    def _per_layer(self, found: Mapping[int, Iterable[_Number]]) -> tuple[tuple[_Number, ...], ...]:
        """Return one tuple per layer of the model, empty for a dense one or another stage's."""
        return tuple(tuple(found.get(index, ())) for index in range(self._num_layers))


def slot_host_of(model: Any) -> SlotHost:
    """Return the host of a model's slots, which every model of this plugin has."""
    host = model.slot_host
    assert isinstance(host, SlotHost), type(model)
    return host
