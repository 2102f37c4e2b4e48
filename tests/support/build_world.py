"""A server without vLLM for tests of builds: the reference model in the place of the engine.

Manager and service are the real ones, so leases, loads and evictions are those of a server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from emo_serve.emo.checkpoint import Checkpoint, load_model
from emo_serve.emo.model import EmoForCausalLM, RouterRecord
from emo_serve.emo.routing import router_probabilities
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.errors import EngineDead
from emo_serve.metrics import BUILD_POOL
from emo_serve.names import BASE_POOL, ModelNames
from emo_serve.pools.calibration import DEFAULT_METHOD
from emo_serve.pools.calibration.build import calibrate
from emo_serve.pools.calibration.examples import Example, encode_examples
from emo_serve.pools.calibration.findings import Calibration
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import BuildRequest, parse_build
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.residency.manager import ResidencyManager
from emo_serve.residency.slots import SlotTable
from emo_serve.server.pool_admin.builder import PoolBuild, PoolBuilder
from emo_serve.vllm_plugin.contract import RouterMass
from tests.support.fake_engine import SLOT_BYTES, FakeEngine
from tests.support.pool_services import service_over
from tests.support.served_tokenizer import FileTokenizer

K = 6


@cache
def _model(directory: Path) -> EmoForCausalLM:
    return load_model(directory)


def texts(seed: int = 0, lengths: Sequence[int] = (60, 23, 7)) -> tuple[Example, ...]:
    rng = random.Random(seed)
    return tuple(
        Example(f"body.examples[{place}]", "".join(rng.choices("abcdefgh (=)", k=length)))
        for place, length in enumerate(lengths)
    )


def build_request(
    name: str = "math", examples: Sequence[Example] | None = None, k: int = K, **fields: Any
) -> BuildRequest:
    """Return a request as the body of POST /v1/pools gives it; by default for `texts()`."""
    written = [example.as_json() for example in (texts() if examples is None else examples)]
    return parse_build({"name": name, "examples": written, "experts": k, **fields})


class ReferenceProbe:
    """The reference model instead of the engine; counts how many calls run at once.

    Call number `fails_at` raises `failure`; the next calls count `extra_tokens` too many; while
    `may_continue` is clear, calls wait.
    """

    def __init__(self, directory: Path, manager: ResidencyManager, max_tokens: int = 511) -> None:
        self.max_tokens = max_tokens
        self._model, self._manager = _model(directory), manager
        self.calls = 0
        self.fails_at: int | None = None
        self.failure: BaseException = EngineDead("the engine process died")
        self.extra_tokens: list[int] = []
        self.may_continue = asyncio.Event()
        self.may_continue.set()
        self.priorities: set[int] = set()
        self._running = self.most_running = self.most_pools = 0

    async def mass(
        self, pool: ExpertPool, token_ids: Sequence[int], *, priority: int = 0
    ) -> RouterMass:
        self.calls += 1
        self.priorities.add(priority)
        if self.calls == self.fails_at:
            raise self.failure
        async with self._manager.lease(pool):
            self._running += 1
            self.most_running = max(self.most_running, self._running)
            built = [p for p in self._manager.statistics().pools if p.name == BUILD_POOL]
            self.most_pools = max(self.most_pools, len(built))
            try:
                await self.may_continue.wait()
                await asyncio.sleep(0)
                self._manager.check_integrity()
                mass = self._mass(pool, token_ids)
            finally:
                self._running -= 1
        extra = self.extra_tokens.pop() if self.extra_tokens else 0
        return RouterMass(mass.tokens + extra, mass.layers)

    @torch.no_grad()
    def _mass(self, pool: ExpertPool, token_ids: Sequence[int]) -> RouterMass:
        moe_layers = self._model.config.moe_layers
        masks: list[torch.Tensor | None] = [None] * len(moe_layers)
        layers: list[tuple[float, ...]] = [()] * len(moe_layers)
        for index, moe in enumerate(moe_layers):
            if moe is not None:
                mask_E = torch.zeros(moe.num_experts, dtype=torch.bool)
                mask_E[list(pool.expert_ids[index])] = True
                masks[index] = mask_E
        record: list[RouterRecord] = []
        self._model(torch.tensor([token_ids]), pool=masks, record=record)
        for router in record:
            moe = moe_layers[router.layer]
            assert moe is not None
            probabilities_TE = router_probabilities(router.logits_BTE[0], moe)
            layers[router.layer] = tuple(probabilities_TE.double().sum(0).tolist())
        return RouterMass(len(token_ids), tuple(layers))


class World:
    """One server without vLLM: a checkpoint, a slab, a service, a builder."""

    def __init__(
        self,
        directory: Path,
        *,
        slots: int = 32,
        rows: int = 6,
        max_tokens: int = 511,
        pools: Sequence[ExpertPool] = (),
        may_stream: bool = False,
    ) -> None:
        self.checkpoint = Checkpoint.open(directory)
        self.moe_layers = self.checkpoint.config.moe_layers
        counts = [moe.num_experts if moe else 0 for moe in self.moe_layers]
        self.engine = FakeEngine()
        self.manager = ResidencyManager(
            SlotTable(counts, slots),
            rows,
            self.engine,
            slot_bytes=SLOT_BYTES,
            may_stream=may_stream,
        )
        pools = [pool.complete(self.moe_layers) for pool in pools]
        catalog = PoolCatalog(pools, self.moe_layers, self.checkpoint.fingerprint())
        base = ExpertPool.base(self.moe_layers, BASE_POOL)
        self.service = service_over(ModelNames(("emo",)), base, catalog, self.manager)
        self.probe = ReferenceProbe(directory, self.manager, max_tokens)
        self.learned: list[tuple[str, Sequence[Example]]] = []
        self.builder = PoolBuilder(
            self.probe,  # type: ignore[arg-type]
            self.checkpoint,
            self.service,
            self.manager,
            FileTokenizer(directory),
            self._learn,
        )

    @property
    def num_experts(self) -> int:
        """Return the experts of all layers together."""
        return sum(moe.num_experts for moe in self.moe_layers if moe)

    async def _learn(self, name: str, examples: Sequence[Example]) -> None:
        self.learned.append((name, examples))

    async def build(self, name: str = "math", k: int = K, **changes: Any) -> PoolBuild:
        return await self.builder.build(build_request(name, k=k, **changes))

    def offline(
        self, k: int = K, examples: Sequence[Example] | None = None, method: str = DEFAULT_METHOD
    ) -> Calibration:
        tokenizer = ModelTokenizer(self.checkpoint.directory)
        documents = encode_examples(examples or texts(), tokenizer, self.checkpoint.config)
        return calibrate(self.checkpoint, documents.ids, k, method)

    def pool_of(self, *experts: int, name: str = "mine") -> ExpertPool:
        layers = (None if moe is None else LayerExperts(experts) for moe in self.moe_layers)
        return ExpertPool(name, tuple(layers)).complete(self.moe_layers)

    def assert_nothing_left(self) -> None:
        self.manager.check_integrity()
        stats = self.manager.statistics()
        defined = {pool.content_hash for pool in self.service.lookup.pools}
        temporary = [pool for pool in stats.pools if pool.name == BUILD_POOL]
        assert [pool for pool in temporary if pool.content_hash not in defined] == []
        assert (stats.waiting_requests, stats.running_requests) == (0, 0)


def assert_same(found: Calibration, expected: Calibration) -> None:
    """Assert the same choice and, but for the order of sums, the same scores."""
    assert (found.method, found.k, found.seed) == (expected.method, expected.k, expected.seed)
    assert (found.documents, found.tokens) == (expected.documents, expected.tokens)
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.experts == theirs.experts
            assert mine.scores == pytest.approx(theirs.scores, rel=1e-5, abs=1e-7)
            assert mine.coverage == pytest.approx(theirs.coverage, rel=1e-5)
            assert mine.own_coverage == pytest.approx(theirs.own_coverage, rel=1e-5)
