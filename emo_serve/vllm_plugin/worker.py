"""The calls a front end may make into the workers, through `collective_rpc`.

They run between two engine steps on every rank. A worker method never raises: with several ranks a
raised error would leave their replies out of step. Each replies as `contract` says.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from vllm.config import VllmConfig

from emo_serve.errors import EmoServeError
from emo_serve.vllm_plugin.batch_pools import EmoModelState, attach_to_v1_runner
from emo_serve.vllm_plugin.contract import (
    CoverageReading,
    EngineDescription,
    LoadProgress,
    LoadState,
    PoolUsage,
    RouterMass,
)
from emo_serve.vllm_plugin.expert_store import StoreCounts
from emo_serve.vllm_plugin.loads import ExpertLoad
from emo_serve.vllm_plugin.model import EmoForCausalLM
from emo_serve.vllm_plugin.routing_record import pool_key
from emo_serve.vllm_plugin.settings import read_settings

__all__ = ["EmoWorkerExtension", "PoolRowsWorker"]

_Number = TypeVar("_Number", int, float)
_Record = CoverageReading | EngineDescription | LoadProgress | PoolUsage | RouterMass


class EmoWorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`."""

    model_runner: Any
    rank: int

    _emo_load: ExpertLoad | None = None

    def emo_start_load(self, call_id: int, load_id: int, copies: list[list[int]]) -> dict[str, Any]:
        """Begin to copy experts into slots, each [layer, expert, slot], and return at once."""

        def start() -> None:
            last = self._emo_load
            if last is not None and last.state == "loading":
                raise EmoServeError(f"load {last.load_id} is under way; {load_id} must wait")
            slots = [(layer, expert, slot) for layer, expert, slot in copies]
            self._emo_load = self._emo_model().start_load(load_id, slots)

        return _reply(call_id, start)

    def emo_finish_load(
        self,
        call_id: int,
        load_id: int,
        row: int,
        expert_ids: list[list[int]],
        temperature: float,
    ) -> dict[str, Any]:
        """Publish the pool if its load is done; reply with LoadProgress. May be repeated."""

        def finish() -> LoadProgress:
            model, load = self._emo_model(), self._emo_load
            if load is None or load.load_id != load_id:
                raise EmoServeError(f"load {load_id} is not the last that was started here")
            state = load.state  # read once: the load's thread may change it at any time
            if state == "copied":
                load.publish(model.point)
                model.publish_pool(row, expert_ids, temperature)
                state = load.state
            return LoadProgress(
                state=cast(LoadState, state),
                failure=load.failure,
                experts_copied=load.experts_copied,
                bytes_copied=load.experts_copied * model.expert_shape.num_bytes,
                **vars(load.counts),
            )

        return _reply(call_id, finish)

    def emo_publish_pool(
        self, call_id: int, row: int, expert_ids: list[list[int]], temperature: float
    ) -> dict[str, Any]:
        """Let requests of `row` route among these experts, which must be in place."""

        def publish() -> None:
            self._emo_model().publish_pool(row, expert_ids, temperature)

        return _reply(call_id, publish)

    def emo_read_coverage(self, call_id: int) -> dict[str, Any]:
        """Reply with CoverageReading, and forget it."""

        def read() -> CoverageReading:
            record = self._emo_model().record
            return CoverageReading(() if record is None else tuple(record.read_coverage()))

        return _reply(call_id, read)

    def emo_read_mass(self, call_id: int, slot: int) -> dict[str, Any]:
        """Reply with the RouterMass of a mass slot, and forget it."""

        def read() -> RouterMass:
            model = self._emo_model()
            tokens, mass = (0, {}) if model.record is None else model.record.read_mass(slot)
            return RouterMass(tokens, _all_layers(model, mass))

        return _reply(call_id, read)

    def emo_usage(
        self, call_id: int, expert_ids: list[list[int]], temperature: float
    ) -> dict[str, Any]:
        """Reply with the PoolUsage of pools with this content."""

        def usage() -> PoolUsage:
            model, key = self._emo_model(), pool_key(expert_ids, temperature)
            tokens, counts = (0, {}) if model.record is None else model.record.usage(key)
            return PoolUsage(tokens, _all_layers(model, counts))

        return _reply(call_id, usage)

    def emo_describe(self, call_id: int) -> dict[str, Any]:
        """Reply with EngineDescription."""
        return _reply(call_id, self._emo_description)

    def _emo_description(self) -> EngineDescription:
        model = self._emo_model()
        layers, store = list(model.moe_layers.values()), model.store
        return EngineDescription(
            rank=self.rank,
            trunk_bytes=model.trunk_bytes,
            slab_bytes=sum(layer.slot_bytes * layer.num_slots for layer in layers),
            slot_bytes=max((layer.slot_bytes for layer in layers), default=0),
            num_slots=tuple(layer.num_slots for layer in layers),
            **vars(store.counts if store else StoreCounts()),
            host_bytes=store.host.num_bytes if store else 0,
            host_experts=len(store.host) if store else 0,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            expert_dtype=str(model.expert_shape.dtype).removeprefix("torch."),
            moe_backend=model.backend.name,
            model_runner="v1" if hasattr(self.model_runner, "emo_pool_rows") else "v2",
            records_routing=model.record is not None,
            routes_by_pool=self._emo_routes_by_pool(),
        )

    def _emo_model(self) -> EmoForCausalLM:
        model = self.model_runner.get_model()
        assert isinstance(model, EmoForCausalLM), type(model)
        return model

    def _emo_routes_by_pool(self) -> bool:
        """Return whether this runner hands each token's pool row to the model."""
        state = getattr(self.model_runner, "model_state", None)
        return isinstance(state, EmoModelState) or hasattr(self.model_runner, "emo_pool_rows")


class PoolRowsWorker:
    """Mixed into vLLM's worker classes: pool rows for the V1 model runner, an end for loads.

    The V2 runner needs nothing from here, it asks the model for its state class.
    """

    model_runner: Any
    use_v2_model_runner: bool
    vllm_config: VllmConfig

    def init_device(self) -> None:
        """Initialise the device as upstream does, then attach to a V1 runner."""
        super().init_device()  # type: ignore[misc]
        if not self.use_v2_model_runner:
            num_rows = read_settings(self.vllm_config).num_pools
            attach_to_v1_runner(self.model_runner, num_rows)

    def shutdown(self) -> None:
        """End a load under way: a thread inside torch when Python ends would abort the process."""
        load: ExpertLoad | None = getattr(self, "_emo_load", None)
        if load is not None:
            load.stop()
        super().shutdown()  # type: ignore[misc]


def _all_layers(
    model: EmoForCausalLM, found: Mapping[int, Sequence[_Number]]
) -> tuple[tuple[_Number, ...], ...]:
    """Return one tuple per layer of the model, empty for a dense layer."""
    return tuple(tuple(found.get(index, ())) for index in range(model.config.num_hidden_layers))


def _reply(call_id: int, work: Callable[[], _Record | None]) -> dict[str, Any]:
    try:
        with torch.inference_mode():
            record = work()
    except EmoServeError as error:
        return {"call_id": call_id, "ok": False, "error": str(error)}
    except Exception as error:  # a raise would put the ranks' replies out of step
        return {"call_id": call_id, "ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"call_id": call_id, "ok": True, "error": None, **(vars(record) if record else {})}
