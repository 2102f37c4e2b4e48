"""From names to pools to leases, over a fake engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from emo_serve.errors import (
    ConfigError,
    PoolBlocked,
    PoolConflict,
    PoolExists,
    PoolInUse,
    PoolLoadFailed,
    PoolStoreError,
    PoolTooLarge,
    RequestError,
    StateConflict,
    UnknownPool,
)
from emo_serve.names import ModelNames
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts
from emo_serve.server.pool_admin.status import Shares
from tests.support.fake_engine import SLOT_BYTES, FakeEngine, settle
from tests.support.pool_services import MOE_LAYERS, ServiceUnderTest, pool, service_of, service_over


def bare(name: str, *experts: int, temperature: float = 1.0) -> ExpertPool:
    """Return a pool as a client writes it: what the model implies is left out."""
    layer = LayerExperts(experts)
    return ExpertPool(name, (None, layer, layer), router_temperature=temperature)


def stored_service(directory: Path, engine: FakeEngine | None = None) -> ServiceUnderTest:
    """Return a service of two pools that are files, and stay so."""
    write_pool(bare("math", 0, 1), directory / "math.json")
    write_pool(bare("code", 2, 3), directory / "code.json")
    catalog = PoolCatalog.read(directory, MOE_LAYERS, persists=True)
    service = service_of(engine)
    return service_over(service.lookup.names, service.lookup.pools[0], catalog, service.manager)


def test_every_spelling_finds_its_pool() -> None:
    service = service_of()
    assert service.lookup.find("emo").name == "base"
    assert service.lookup.find("math").name == "math"
    assert service.lookup.find("emo", ["code"]).name == "code"
    union = service.lookup.find("math+code")
    assert union is service.lookup.find("emo:code+math")
    assert union.expert_ids == ((), (0, 1, 2, 3, 7), (0, 1, 2, 3, 7))


def test_the_base_pool_united_with_anything_is_the_base_pool() -> None:
    service = service_of()
    assert service.lookup.find("base+math").name == "base"
    assert service.lookup.find("base+hot").name == "base"
    with pytest.raises(UnknownPool, match="'nope'"):
        service.lookup.find("base+nope")


@pytest.mark.parametrize("model", ["gpt-4", "emo:nope", "math+nope", "emo:"])
def test_an_unknown_name_is_answered_with_what_exists(model: str) -> None:
    with pytest.raises(UnknownPool, match="code, hot, law, math; the model itself is 'emo'"):
        service_of().lookup.find(model)


@pytest.mark.parametrize("model", ["auto", "emo:auto", "auto+math", "base+auto"])
def test_auto_is_no_pool(model: str) -> None:
    with pytest.raises(RequestError, match="'auto' is no pool: the server chooses one"):
        service_of().lookup.find(model)


def test_contradictions_and_impossible_unions_are_the_clients_to_mend() -> None:
    service = service_of()
    with pytest.raises(PoolConflict):
        service.lookup.find("math", ["code"])
    with pytest.raises(RequestError, match="router_temperature"):
        service.lookup.find("math+hot")


async def test_admitting_refuses_now_what_could_not_be_waited_for() -> None:
    service = service_of(slots=4)
    assert service.residency.admit("math").name == "math"
    with pytest.raises(PoolTooLarge, match="'base' can never be resident.*GiB"):
        service.residency.admit("emo")
    await service.residency.load("math", pin=True)
    assert service.residency.admit("math").name == "math"
    with pytest.raises(PoolBlocked, match="code"):
        service.residency.admit("code")
    with pytest.raises(UnknownPool):
        service.residency.admit("nope")


async def test_status_and_snapshot_follow_loads_and_leases() -> None:
    service = service_of(default_pool="math")
    math = service.lookup.find("math")
    status = service.statuses.of(math)
    assert (status.state, status.row, status.is_resident) == ("absent", None, False)
    assert (await service.residency.load("math")).state == "resident"
    async with service.residency.lease(math) as lease:
        status = service.statuses.of(math)
        assert (status.row, status.running_requests, status.is_default) == (lease.row, 1, True)
        assert status.num_bytes == 2 * 3 * SLOT_BYTES  # two layers, two experts and the shared one
        snapshot = service.statuses.snapshot()
        running = {p.name: p.running_requests for p in snapshot.pools}
        assert running == {"base": 0, "code": 0, "hot": 0, "law": 0, "math": 1}
        assert {p.name for p in snapshot.pools if p.is_resident} == {"math"}
        assert (snapshot.slots, snapshot.slots_in_use, snapshot.slots_free) == (16, 6, 10)
        assert (snapshot.slots_leased, snapshot.slot_bytes) == (6, SLOT_BYTES)
    assert service.statuses.of(math).running_requests == 0
    assert service.statuses.snapshot().slots_leased == 0


async def test_a_request_that_waits_shows_in_status_and_snapshot() -> None:
    engine = FakeEngine(is_holding=True)
    service = service_of(engine)
    math = service.lookup.find("math")

    async def request() -> None:
        async with service.residency.lease(math):
            pass

    waiting = asyncio.create_task(request())
    load = await engine.next_held()
    status = service.statuses.of(math)
    assert (status.state, status.waiting_requests, status.row) == ("loading", 1, None)
    assert service.statuses.overview().stats.waiting_requests == 1
    assert {p.name: p.waiting_requests for p in service.statuses.snapshot().pools}["math"] == 1
    load.release()
    await waiting
    assert service.statuses.of(math).state == "resident"


async def test_requests_show_under_the_name_they_asked_for() -> None:
    engine = FakeEngine(is_holding=True)
    service = service_of(engine)
    for twin in ("adding", "numbers"):  # with the experts of math
        await service.definitions.add(bare(twin, 0, 1))
    pools = [service.lookup.find(name) for name in ("math", "math", "numbers")]
    is_over = asyncio.Event()

    async def request(wanted: ExpertPool) -> None:
        async with service.residency.lease(wanted):
            await is_over.wait()

    async with asyncio.TaskGroup() as requests:
        for wanted in pools:
            requests.create_task(request(wanted))
        load = await engine.next_held()
        expected = {"math": 2, "numbers": 1}
        assert shown(service, "waiting_requests") == expected
        load.release()
        while service.statuses.of(pools[0]).state != "resident":
            await asyncio.sleep(0)
        assert shown(service, "waiting_requests") == {}
        assert shown(service, "running_requests") == expected
        assert service.statuses.overview().stats.running_requests == 3
        await service.definitions.remove("numbers")  # its request runs on, and so does its content
        assert [p.name for p in service.statuses.snapshot().pools][-1] == "numbers"
        is_over.set()
    assert shown(service, "running_requests") == {}
    names = [p.name for p in service.statuses.snapshot().pools]
    assert names == ["base", "adding", "code", "hot", "law", "math"]
    service.manager.check_integrity()


def shown(service: ServiceUnderTest, field: str) -> dict[str, int]:
    """Return the pools with such requests, as the listing and the gauges have them alike."""
    listed = {s.pool.name: getattr(s, field) for s in service.statuses.overview().pools}
    gauges = {p.name: getattr(p, field) for p in service.statuses.snapshot().pools}
    assert listed == gauges
    return {name: count for name, count in listed.items() if count}


async def test_a_union_is_listed_while_it_is_in_use() -> None:
    service = service_of()
    await service.residency.load("math+code")
    async with service.residency.lease(service.lookup.find("math+code")):
        snapshot = {p.name: p for p in service.statuses.snapshot().pools}
        assert snapshot["code+math"].running_requests == 1
        assert snapshot["math"].is_resident  # its experts are there
    overview = {status.pool.name: status for status in service.statuses.overview().pools}
    assert list(overview) == ["base", "code", "hot", "law", "math", "code+math"]
    union = overview["code+math"]
    assert (union.kind, union.version, union.state) == ("union", None, "resident")
    assert [overview[name].kind for name in ("base", "math")] == ["base", "pool"]
    await service.residency.evict("code+math")
    assert [p.pool.name for p in service.statuses.overview().pools] == [
        "base",
        "code",
        "hot",
        "law",
        "math",
    ]


async def test_experts_are_counted_by_who_holds_them() -> None:
    service = service_of()
    await service.residency.load("law")  # 4 5 6 and the shared 7, in two layers
    await service.residency.load("hot")  # 6 7
    shares = {status.pool.name: status.shares for status in service.statuses.overview().pools}
    assert shares["law"] == Shares(alone=4, shared=4, missing=0)
    assert shares["hot"] == Shares(alone=0, shared=4, missing=0)
    assert shares["math"] == Shares(alone=0, shared=2, missing=4)
    sharing = service.statuses.overview().sharing
    assert [sharing.count(1, expert) for expert in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert sharing.count(0, 0) == 0  # the dense layer


async def test_pinning_evicting_and_unpinning() -> None:
    service = service_of()
    assert (await service.residency.load("math", pin=True)).is_pinned
    with pytest.raises(PoolInUse, match="unpin"):
        await service.residency.evict("math")
    assert not service.residency.unpin("math").is_pinned
    assert (await service.residency.evict("math")).state == "absent"
    assert (await service.residency.evict("math")).state == "absent"
    assert (await service.residency.load("math", pin=True)).is_pinned
    async with service.residency.lease(service.lookup.find("code")):
        with pytest.raises(PoolInUse, match="drain"):
            await service.residency.evict("code")


# -- definitions --


async def answer_of(service: ServiceUnderTest, name: str, engine: FakeEngine) -> bool:
    """Tell whether a request for a pool is computed with what the pool is now."""
    found = service.lookup.find(name)
    async with service.residency.lease(found) as lease:
        return engine.serves(lease.row, found)


async def test_an_added_pool_is_completed_and_served() -> None:
    engine = FakeEngine()
    service = service_of(engine)
    status, is_new = await service.definitions.add(bare("poems", 1, 2))
    assert (is_new, status.version, status.state) == (True, 1, "absent")
    assert service.lookup.find("poems").expert_ids == ((), (1, 2, 7), (1, 2, 7))
    assert await answer_of(service, "poems", engine)
    assert await answer_of(service, "poems+math", engine)


async def test_a_redefinition_leaves_nothing_of_the_old_one() -> None:
    engine = FakeEngine()
    service = service_of(engine)
    for name in ("math", "code+math", "math+law"):
        await service.residency.load(name)
    with pytest.raises(PoolExists):
        await service.definitions.add(bare("math", 5))
    status, is_new = await service.definitions.add(bare("math", 5), replace=True)
    assert (is_new, status.version, status.state) == (False, 2, "absent")
    assert [entry.name for entry in service.manager.statistics().pools] == []
    for name in ("math", "code+math", "law+math"):
        assert await answer_of(service, name, engine)
    service.manager.check_integrity()


async def test_a_running_request_keeps_the_definition_it_was_admitted_with() -> None:
    engine = FakeEngine()
    service = service_of(engine)
    old = service.lookup.find("math")
    async with service.residency.lease(old) as lease:
        await service.definitions.add(bare("math", 5), replace=True)
        assert await answer_of(service, "math", engine)
        assert engine.serves(lease.row, old)
        snapshot = [p for p in service.statuses.snapshot().pools if p.name == "math"]
        assert [p.running_requests for p in snapshot] == [0, 1]
    held = {entry.content_hash for entry in service.manager.statistics().pools}
    assert old.content_hash not in held


async def test_a_pinned_pool_stays_pinned_when_it_is_redefined() -> None:
    service = service_of()
    await service.residency.load("math", pin=True)
    await service.residency.load("math+code", pin=True)
    old = service.lookup.find("math"), service.lookup.find("math+code")
    status, _ = await service.definitions.add(bare("math", 5), replace=True)
    assert (status.state, status.is_pinned) == ("resident", True)
    assert service.statuses.of(service.lookup.find("math+code")).is_pinned
    assert not any(map(service.manager.is_pinned, old))
    assert len(service.manager.statistics().pools) == 2


async def test_a_pin_that_cannot_be_kept_is_reported() -> None:
    engine = FakeEngine()
    service = service_of(engine)
    await service.residency.load("math", pin=True)
    engine.unreadable = {(1, 5)}
    with pytest.raises(PoolLoadFailed, match="'math' is redefined, but 'math' is no longer pinned"):
        await service.definitions.add(bare("math", 5), replace=True)
    assert service.statuses.of(service.lookup.find("math")).version == 2
    assert service.manager.statistics().pools == ()


async def test_a_pin_is_not_given_up_for_what_can_never_be_resident() -> None:
    service = service_of(slots=4)
    await service.residency.load("math", pin=True)
    with pytest.raises(PoolTooLarge):
        await service.definitions.add(bare("math", 0, 1, 2, 3, 4), replace=True)
    assert service.statuses.of(service.lookup.find("math")).is_pinned
    assert service.catalog.version("math") == 1


async def test_the_same_content_under_another_name_stays() -> None:
    service = service_of()
    await service.definitions.add(bare("numbers", 0, 1))  # as math
    await service.residency.load("math", pin=True)
    row = service.statuses.of(service.lookup.find("numbers")).row
    await service.definitions.remove("math")
    status = service.statuses.of(service.lookup.find("numbers"))
    assert (status.state, status.row) == ("resident", row)
    await service.definitions.add(bare("numbers", 1, 0), replace=True)  # no change of content
    assert service.statuses.of(service.lookup.find("numbers")).row == row


async def test_a_pin_is_not_given_to_what_replaces_a_pool_of_equal_content() -> None:
    service = service_of()
    await service.residency.load("math", pin=True)
    await service.definitions.add(bare("numbers", 0, 1))  # as math
    status, _ = await service.definitions.add(bare("numbers", 5), replace=True)
    assert not status.is_pinned
    assert service.statuses.of(service.lookup.find("math")).is_pinned


async def test_a_pin_moves_with_its_name_even_if_another_pool_keeps_the_content() -> None:
    service = service_of()
    await service.definitions.add(bare("numbers", 0, 1))  # as math
    await service.residency.load("numbers", pin=True)
    status, _ = await service.definitions.add(bare("numbers", 5), replace=True)
    assert status.is_pinned
    assert not service.statuses.of(service.lookup.find("math")).is_pinned
    for name in ("math", "numbers"):
        await service.residency.load(name, pin=True)
    await service.definitions.remove("numbers")
    assert service.statuses.of(service.lookup.find("math")).is_pinned
    assert not service.residency.unpin("math").is_pinned
    assert not service.residency.is_pinned("math")


async def test_what_was_learned_of_a_pool_goes_with_it() -> None:
    service, removed = service_of(), list[str]()
    service.definitions.when_removed(removed.append)
    await service.definitions.add(pool("math", 5), replace=True)
    assert removed == []
    with pytest.raises(UnknownPool):
        await service.definitions.remove("maths")
    await service.definitions.remove("math")
    assert removed == ["math"]


async def test_a_removed_pool_is_gone_and_may_come_back() -> None:
    engine = FakeEngine()
    service = service_of(engine)
    await service.residency.load("math", pin=True)
    await service.residency.load("math+code")
    await service.definitions.remove("math")
    assert service.manager.statistics().pools == ()
    for name in ("math", "math+code"):
        with pytest.raises(UnknownPool, match="the pools are: code, hot, law; the model itself"):
            service.lookup.find(name)
    status, is_new = await service.definitions.add(bare("math", 4))
    assert (is_new, status.version, status.is_pinned) == (True, 2, False)
    assert await answer_of(service, "math", engine)


@pytest.mark.parametrize("is_asked_for", [True, False])
async def test_a_removed_pool_that_is_defined_again_stays_where_it_is(is_asked_for: bool) -> None:
    """Its last request from before the removal does not take it along."""
    engine = FakeEngine()
    service = service_of(engine)
    async with service.residency.lease(service.lookup.find("math")):
        await service.definitions.remove("math")
        await service.definitions.add(bare("numbers", 0, 1))  # as math
        if is_asked_for:
            service.residency.admit("numbers")
        assert service.statuses.of(service.lookup.find("numbers")).state == "resident"
    assert service.statuses.of(service.lookup.find("numbers")).state == "resident"
    assert len(engine.operations) == 1
    service.manager.check_integrity()


async def test_a_union_whose_parts_are_defined_again_stays_once_it_is_asked_for() -> None:
    """Nothing held or awaited it when they were: it is the new request that revives it."""
    service = service_of()
    await service.residency.load("math+code")
    await service.definitions.remove("math")
    await service.definitions.add(bare("math", 0, 1))
    assert service.manager.statistics().pools == ()
    union = service.residency.admit("math+code")
    async with service.residency.lease(union):
        pass
    assert service.statuses.of(union).state == "resident"
    service.manager.check_integrity()


@pytest.mark.parametrize("is_defined_otherwise", [True, False])
async def test_a_straggler_of_a_definition_that_is_gone_leaves_nothing(
    is_defined_otherwise: bool,
) -> None:
    """Admitted before the change, it takes its lease after it; later requests change nothing."""
    engine = FakeEngine()
    service = service_of(engine)
    await service.residency.load("math")
    straggler = service.residency.admit("math")
    if is_defined_otherwise:
        await service.definitions.add(bare("math", 5), replace=True)
        service.residency.admit("math")
    else:
        await service.definitions.remove("math")
    async with service.residency.lease(straggler) as lease:
        assert engine.serves(lease.row, straggler)
    assert service.manager.statistics().pools == ()
    service.manager.check_integrity()


async def test_a_definition_that_is_refused_revives_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is written is defined again; the old content goes with its last request."""
    service = stored_service(tmp_path)
    async with service.residency.lease(service.lookup.find("math")):
        await service.definitions.add(bare("math", 5), replace=True)
        await service.residency.load("math", pin=True)
        with monkeypatch.context() as patch, pytest.raises(PoolStoreError):
            patch.setattr("os.fsync", _no_space)
            await service.definitions.add(bare("math", 0, 1), replace=True)
    assert [entry.content_hash for entry in service.manager.statistics().pools] == [
        service.lookup.find("math").content_hash
    ]


def _no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("default", ["math", "math+code"])
async def test_the_default_and_the_base_pool_cannot_be_removed(default: str) -> None:
    service = service_of(default_pool=default)
    for name in ("math", "base", "emo"):
        with pytest.raises(StateConflict, match="cannot be removed"):
            await service.definitions.remove(name)
    for name in ("nope", "law+hot"):
        with pytest.raises(UnknownPool, match="the pools are: code, hot, law, math"):
            await service.definitions.remove(name)


async def test_a_default_union_can_still_be_formed() -> None:
    service = service_of(default_pool="math+code")
    with pytest.raises(RequestError, match="router_temperature"):
        await service.definitions.add(bare("math", 1, temperature=2.0), replace=True)
    await service.definitions.add(bare("math", 5), replace=True)
    assert service.lookup.find(None).expert_ids == ((), (2, 3, 5, 7), (2, 3, 5, 7))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("emo", 1), "has the name of the model"),
        (("base", 1), "is kept for all experts"),
        (("a+b", 1), "name is 'a\\+b'"),
        (("emo:a", 1), "name is 'emo:a'"),
        (("big", 8), "layer 1: an expert is 8; expected an id from 0 to 7"),
    ],
)
async def test_what_clients_give_is_checked(bad: tuple[str, int], message: str) -> None:
    service = service_of()
    with pytest.raises(RequestError, match=message):
        await service.definitions.add(bare(*bad), replace=True)
    assert len(service.lookup.pools) == 5


async def test_a_pool_that_cannot_be_stored_is_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = stored_service(tmp_path)
    await service.residency.load("math", pin=True)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for name in ("math", "poems"):
        with pytest.raises(PoolStoreError, match="No space left"):
            await service.definitions.add(bare(name, 5), replace=True)
    assert service.statuses.of(service.lookup.find("math")).is_pinned
    assert service.lookup.find("math").expert_ids == ((), (0, 1, 7), (0, 1, 7))
    with pytest.raises(UnknownPool):
        service.lookup.find("poems")


async def test_a_client_that_leaves_does_not_stop_a_change_half_way(tmp_path: Path) -> None:
    engine = FakeEngine(is_holding=True)
    service = stored_service(tmp_path, engine)
    pinning = asyncio.create_task(service.residency.load("math", pin=True))
    (await engine.next_held()).release()
    await pinning
    adding = asyncio.create_task(service.definitions.add(bare("math", 5), replace=True))
    load = await engine.next_held()
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    others = asyncio.create_task(
        service.definitions.remove("code")
    )  # changes come one after the other
    await settle()
    assert "code" in service.catalog.pools
    load.release()
    await others
    assert service.statuses.of(service.lookup.find("math")).is_pinned
    assert "code" not in service.catalog.pools
    assert set(PoolCatalog.read(tmp_path).pools) == {"math"}


def test_a_default_pool_that_does_not_exist_is_refused_at_once() -> None:
    with pytest.raises(UnknownPool):
        service_of(default_pool="nope")


def test_a_pool_may_not_be_called_like_the_model() -> None:
    service = service_of()
    catalog = PoolCatalog([pool("emo", 1)])
    with pytest.raises(ConfigError, match="--served-model-name"):
        service_over(ModelNames(("emo",)), service.lookup.pools[0], catalog, service.manager)
