"""Build a pool on the running server: layer by layer, through the engine, beside other requests.

The methods are `layerwise` and `router` of `pools.calibration`, with their scoring; only the
router's mass comes from the engine.

By `layerwise`, for MoE layer l every document runs once through a temporary pool. Below l it has
the experts kept so far; from l on it has as few experts as a pool may have, because they do not
affect what layer l's router sees. So the full model is never needed, but a build takes one pass per
layer where the offline build takes one in all. (Passes keep nothing: the engine owns the residual
streams.) By `router`, every document runs once through the base pool, which may be streamed.
`easy-ep` needs the norm of every expert's output, which the engine does not record.

A build yields to other requests: its own run a few at a time, at a lower priority than all others.
One temporary pool is resident, or two while the next one is loaded, and experts in both are not
copied again. No lease is held while waiting for another pool. However a build ends, no temporary
pool stays resident. In the metrics, what it loads appears under the pool name `BUILD_POOL`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.errors import ConfigError, RequestError, StateConflict, Unavailable
from emo_serve.facts import MoeLayer
from emo_serve.metrics import BUILD_POOL
from emo_serve.pools.calibration import DEFAULT_METHOD
from emo_serve.pools.calibration.advice import cut_notes, notes
from emo_serve.pools.calibration.build import check_request, find_layer, model_record
from emo_serve.pools.calibration.examples import Documents, Example, documents_of
from emo_serve.pools.calibration.findings import Calibration, LayerFindings
from emo_serve.pools.document import BuildRequest
from emo_serve.pools.pool import ExpertPool, LayerExperts, keep_best
from emo_serve.residency.manager import ResidencyManager
from emo_serve.server.pool_admin.service import PoolService
from emo_serve.server.pool_admin.status import BuildProgress, PoolStatus
from emo_serve.server.router_probe import LOW_PRIORITY, RouterProbe
from emo_serve.server.tokenizer import ServedTokenizer
from emo_serve.vllm_plugin.contract import RouterMass

__all__ = ["PoolBuild", "PoolBuilder"]

logger = logging.getLogger(__name__)

_IN_FLIGHT = 4
"""Documents in the engine at once: enough that the next is ready when one ends."""
_ATTEMPTS = 3

_MoeLayers = Sequence[MoeLayer | None]
_Findings = Sequence[LayerFindings | None]


@dataclass(frozen=True)
class PoolBuild:
    """A pool that was built and defined, and how it was found; `seconds` is the whole build."""

    status: PoolStatus
    is_new: bool
    found: Calibration
    documents: Documents
    notes: tuple[str, ...]
    seconds: float


async def _learn_nothing(name: str, examples: Sequence[Example]) -> None:
    pass


class PoolBuilder:
    """Build pools, one at a time, through `probe`; `service` defines them.

    The served `tokenizer` reads the examples. `learn` is called with the name and the examples of
    each pool that was built.
    """

    def __init__(
        self,
        probe: RouterProbe,
        checkpoint: ModelCheckpoint,
        service: PoolService,
        manager: ResidencyManager,
        tokenizer: ServedTokenizer,
        learn: Callable[[str, Sequence[Example]], Awaitable[None]] = _learn_nothing,
    ) -> None:
        self._probe, self._checkpoint, self._service = probe, checkpoint, service
        self._manager, self._tokenizer = manager, tokenizer
        self._learn = learn
        self._moe_layers: _MoeLayers = checkpoint.facts.moe_layers
        self._building: BuildProgress | None = None

    async def build(self, wanted: BuildRequest, *, replace: bool = False) -> PoolBuild:
        """Find the pool and define it; continues even if the client disconnects.

        Raises StateConflict while another pool is being built, RequestError for a pool that this
        model or slab cannot have, what a lease raises, and what `PoolDefinitions.add` raises.
        """
        return await self._service.definitions.to_the_end(self._build(wanted, replace))

    async def _build(self, wanted: BuildRequest, is_replacing: bool) -> PoolBuild:
        if self._building is not None:
            raise StateConflict(
                f"pool {self._building.name!r} is being built, and a server builds one pool at a"
                " time; try again when it is done"
            )
        self._note(BuildProgress(wanted.name))
        try:
            return await self._build_alone(wanted, is_replacing)
        finally:
            self._note(None)

    async def _build_alone(self, wanted: BuildRequest, is_replacing: bool) -> PoolBuild:
        start = time.monotonic()
        self._check(wanted, is_replacing)
        documents = await self._encode(wanted)
        logger.info(
            "building pool %s from %d documents, %d tokens",
            *(wanted.name, len(documents.ids), documents.num_tokens),
        )
        passes = len(documents.ids)
        if wanted.method == DEFAULT_METHOD:
            passes *= sum(moe is not None for moe in self._moe_layers)
        self._note(BuildProgress(wanted.name, 0, passes))
        found = await self._find(documents, wanted)
        made_for = await asyncio.to_thread(model_record, self._checkpoint)
        pool = replace(
            found.pool(wanted.name, made_for, wanted.description),
            router_temperature=wanted.router_temperature,
        )
        status, is_new = await self._service.definitions.add(pool, replace=is_replacing)
        await self._learn(wanted.name, wanted.documents)
        seconds = time.monotonic() - start
        logger.info("built pool %s in %.1f s", wanted.name, seconds)
        said = (*cut_notes(documents), *notes(found, self._checkpoint.facts))
        return PoolBuild(status, is_new, found, documents, said, seconds)

    def _check(self, wanted: BuildRequest, is_replacing: bool) -> None:
        """Refuse at the start what would otherwise be refused at the end: size, name, room."""
        with _refusing():
            check_request(self._checkpoint.facts, DEFAULT_METHOD, wanted.experts)
        kept = (
            None if moe is None else keep_best([0.0] * moe.num_experts, wanted.experts, moe.implied)
            for moe in self._moe_layers
        )
        layers = (None if experts is None else LayerExperts(experts) for experts in kept)
        of_that_size = ExpertPool(wanted.name, tuple(layers))
        self._service.definitions.check_add(of_that_size, replace=is_replacing)
        self._manager.check_servable(of_that_size)
        if wanted.method != DEFAULT_METHOD:
            self._manager.check_servable(self._service.lookup.base_pool)

    async def _encode(self, wanted: BuildRequest) -> Documents:
        examples = wanted.documents
        ids: list[list[int]] = []
        for example in examples:
            try:
                ids.append(await self._ids_of(example))
            except RequestError as error:
                raise RequestError(f"{example.source}: {error}") from error
        with _refusing():
            return await asyncio.to_thread(
                documents_of, examples, ids, self._checkpoint.facts, self._probe.max_tokens
            )

    async def _ids_of(self, example: Example) -> list[int]:
        if example.text is not None:
            return await self._tokenizer.encode(example.text)
        return await self._tokenizer.encode_chat(example.messages)

    # -- layer by layer --

    async def _find(self, documents: Documents, wanted: BuildRequest) -> Calibration:
        ids = [document.tolist() for document in documents.ids]
        tokens, k = documents.num_tokens, wanted.experts
        find = self._layer_by_layer if wanted.method == DEFAULT_METHOD else self._in_one_pass
        layers = await find(ids, tokens, k)
        nothing_read = (0,) * len(layers)
        return Calibration(
            wanted.method, 0, k, len(ids), tokens, tuple(layers), nothing_read, bytes_read=0
        )

    async def _layer_by_layer(
        self, ids: Sequence[list[int]], tokens: int, k: int
    ) -> list[LayerFindings | None]:
        layers: list[LayerFindings | None] = [None] * len(self._moe_layers)
        with self._service.temporary.path() as become:
            for index, moe in enumerate(self._moe_layers):
                if moe is None:
                    continue
                pool = _path_pool(self._moe_layers, layers)
                await become(pool)
                mass_PE = [mass.layers[index] for mass in await self._masses(pool, ids)]
                layers[index] = await asyncio.to_thread(find_layer, mass_PE, tokens, moe, k)
        return layers

    async def _in_one_pass(
        self, ids: Sequence[list[int]], tokens: int, k: int
    ) -> list[LayerFindings | None]:
        whole = replace(self._service.lookup.base_pool, name=BUILD_POOL)  # no client's request
        masses = await self._masses(whole, ids)
        return [
            None
            if moe is None
            else find_layer([mass.layers[index] for mass in masses], tokens, moe, k)
            for index, moe in enumerate(self._moe_layers)
        ]

    async def _masses(self, pool: ExpertPool, documents: Sequence[list[int]]) -> list[RouterMass]:
        """Return the full router's mass on each document, inside a pool."""
        rows = [RouterMass(0, ())] * len(documents)
        places = iter(range(len(documents)))

        async def run_some() -> None:
            for place in places:
                rows[place] = await self._mass(pool, documents[place])
                self._note_pass()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_IN_FLIGHT):
                    group.create_task(run_some())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return rows

    def _note_pass(self) -> None:
        assert self._building is not None
        self._note(replace(self._building, done=self._building.done + 1))

    def _note(self, progress: BuildProgress | None) -> None:
        self._building = progress
        self._service.statuses.note_build(progress)

    async def _mass(self, pool: ExpertPool, ids: list[int]) -> RouterMass:
        """Return the mass of one document, with each token counted once.

        If the engine preempts a request for lack of KV memory, it computes some tokens twice.
        """
        for _ in range(_ATTEMPTS):
            mass = await self._probe.mass(pool, ids, priority=LOW_PRIORITY)
            if mass.tokens == len(ids):
                return mass
        raise Unavailable(
            f"the engine preempted a document {_ATTEMPTS} times; build again when fewer requests"
            " are running"
        )


def _path_pool(moe_layers: _MoeLayers, layers: _Findings) -> ExpertPool:
    """Return the pool for scoring the first layer that has no findings yet.

    In layers without findings it holds the implied experts, or expert 0 if there are none.
    """
    experts = (
        found.experts if found is not None else None if moe is None else moe.smallest_pool
        for moe, found in zip(moe_layers, layers, strict=True)
    )
    return ExpertPool(
        BUILD_POOL, tuple(None if ids is None else LayerExperts(ids) for ids in experts)
    )


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn calibration's ConfigError about its arguments into a RequestError."""
    try:
        yield
    except ConfigError as error:
        raise RequestError(str(error)) from error
