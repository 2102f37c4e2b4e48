"""The calls a front end may make into the workers, through `collective_rpc`.

They run on every rank between two engine steps. A worker method never raises: with several ranks, a
raised error would put their replies out of step. `contract` defines the replies.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig

from emo_kernels.cpu import may_use_tiles
from emo_serve.errors import EmoServeError
from emo_serve.vllm_plugin.batch_pools import EmoModelState, attach_to_v1_runner
from emo_serve.vllm_plugin.contract import (
    CoverageReading,
    EngineDescription,
    LoadProgress,
    PoolUsage,
    RouterMass,
)
from emo_serve.vllm_plugin.expert_store import StoreCounts
from emo_serve.vllm_plugin.orphans import in_run_directory
from emo_serve.vllm_plugin.settings import read_settings
from emo_serve.vllm_plugin.slot_host import SlotHost, slot_host_of

__all__ = ["EmoWorkerExtension", "PoolRowsWorker"]

_Record = CoverageReading | EngineDescription | LoadProgress | PoolUsage | RouterMass


class EmoWorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`."""

    model_runner: Any
    rank: int

    _emo_host: SlotHost | None = None

    def emo_start_load(self, call_id: int, load_id: int, copies: list[list[int]]) -> dict[str, Any]:
        """Begin to copy experts into slots, each [layer, expert, slot], and return at once."""

        def start() -> None:
            slots = [(layer, expert, slot) for layer, expert, slot in copies]
            self._emo_slot_host().start_load(load_id, slots)

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
        return _reply(
            call_id,
            lambda: self._emo_slot_host().finish_load(load_id, row, expert_ids, temperature),
        )

    def emo_publish_pool(
        self, call_id: int, row: int, expert_ids: list[list[int]], temperature: float
    ) -> dict[str, Any]:
        """Let requests of `row` route among these experts, which must be in place."""
        return _reply(
            call_id, lambda: self._emo_slot_host().publish_pool(row, expert_ids, temperature)
        )

    def emo_read_coverage(self, call_id: int) -> dict[str, Any]:
        """Reply with CoverageReading, and forget it."""
        return _reply(call_id, lambda: self._emo_slot_host().read_coverage())

    def emo_read_mass(self, call_id: int, slot: int) -> dict[str, Any]:
        """Reply with the RouterMass of a mass slot, and forget it."""
        return _reply(call_id, lambda: self._emo_slot_host().read_mass(slot))

    def emo_usage(
        self, call_id: int, expert_ids: list[list[int]], temperature: float
    ) -> dict[str, Any]:
        """Reply with the PoolUsage of pools with this content."""
        return _reply(call_id, lambda: self._emo_slot_host().usage(expert_ids, temperature))

    def emo_describe(self, call_id: int) -> dict[str, Any]:
        """Reply with EngineDescription."""
        return _reply(call_id, self._emo_description)

    def _emo_description(self) -> EngineDescription:
        host = self._emo_slot_host()
        layers, store = list(host.layers.values()), host.store
        activations = next(self.model_runner.get_model().parameters()).dtype
        return EngineDescription(
            rank=self.rank,
            stage=host.stage.number,
            trunk_bytes=host.trunk_bytes,
            slab_bytes=sum(layer.slab_bytes for layer in layers),
            slot_bytes=max((layer.slot_bytes for layer in layers), default=0),
            num_slots=tuple(layer.num_slots for layer in layers),
            kv_cache_bytes=_storage_bytes(self.model_runner.kv_caches),
            **vars(store.counts if store else StoreCounts()),
            host_bytes=store.host.num_bytes if store else 0,
            host_experts=len(store.host) if store else 0,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            dtype=str(activations).removeprefix("torch."),
            expert_dtype=str(host.shape.dtype).removeprefix("torch."),
            moe_backend=host.backend.name,
            model_runner="v1" if hasattr(self.model_runner, "emo_pool_rows") else "v2",
            records_routing=host.record is not None,
            routes_by_pool=self._emo_routes_by_pool(),
        )

    def _emo_slot_host(self) -> SlotHost:
        if self._emo_host is None:
            self._emo_host = slot_host_of(self.model_runner.get_model())
        return self._emo_host

    def _emo_routes_by_pool(self) -> bool:
        """Return whether this runner hands each token's pool row to the model."""
        state = getattr(self.model_runner, "model_state", None)
        return isinstance(state, EmoModelState) or hasattr(self.model_runner, "emo_pool_rows")


class PoolRowsWorker:
    """Mixed into vLLM's worker classes: gives the V1 model runner pool rows, and ends loads.

    The V2 runner needs nothing from here: it asks the model for its state class.
    """

    distributed_init_method: str
    model_runner: Any
    use_v2_model_runner: bool
    vllm_config: VllmConfig

    def init_device(self) -> None:
        """Initialise the device as upstream does, then attach to a V1 runner."""
        may_use_tiles()  # which vLLM's attention on a CPU does, whatever our backend
        self.distributed_init_method = in_run_directory(self.distributed_init_method)
        super().init_device()  # type: ignore[misc]
        if not self.use_v2_model_runner:
            num_rows = read_settings(self.vllm_config).num_pools
            attach_to_v1_runner(self.model_runner, num_rows)

    def shutdown(self) -> None:
        """End a load under way, then shut down as upstream does."""
        host: SlotHost | None = getattr(self, "_emo_host", None)  # a load began through it
        if host is not None:
            host.close()
        super().shutdown()  # type: ignore[misc]


def _storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Return the bytes behind these tensors, some of which may be views of one memory."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _reply(call_id: int, work: Callable[[], _Record | None]) -> dict[str, Any]:
    try:
        with torch.inference_mode():
            record = work()
    except EmoServeError as error:
        return {"call_id": call_id, "ok": False, "error": str(error)}
    except Exception as error:  # a raise would put the ranks' replies out of step
        return {"call_id": call_id, "ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"call_id": call_id, "ok": True, "error": None, **(vars(record) if record else {})}
