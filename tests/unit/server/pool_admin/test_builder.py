"""Building on a server against building offline: the same pool, and nothing left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from emo_serve.errors import (
    EngineDead,
    PoolExists,
    PoolLoadFailed,
    PoolTooLarge,
    RequestError,
    StateConflict,
    Unavailable,
)
from emo_serve.pools.calibration.build import model_record
from emo_serve.pools.calibration.examples import Example
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolCalibration
from emo_serve.server.router_probe import LOW_PRIORITY
from tests.support.build_world import K, World, assert_same, build_request, texts
from tests.support.fake_engine import settle
from tests.support.golden.checkpoints import CASES, write_checkpoint
from tests.support.one_thread import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("golden")
    return {case: write_checkpoint(case, root / case) for case in CASES}


# -- the same pool --


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
async def test_a_build_finds_what_the_offline_build_finds(
    directories: dict[str, Path], case: str, seed: int
) -> None:
    world = World(directories[case])
    build = await world.build(examples=texts(seed), k=K + seed)
    expected = world.offline(K + seed, texts(seed))
    assert_same(build.found, expected)
    assert build.is_new
    assert world.learned == [("math", texts(seed))]
    pool = world.service.lookup.find("math")
    assert pool.expert_ids == expected.pool("math").expert_ids
    assert pool.calibration == PoolCalibration("layerwise", 3, 90, 0, K + seed)
    assert pool.model == model_record(world.checkpoint)
    assert (
        pool.cut(3, world.moe_layers).expert_ids
        == expected.pool("m").cut(3, world.moe_layers).expert_ids
    )
    world.assert_nothing_left()


@pytest.mark.parametrize(("slots", "may_stream"), [(32, False), (4, True)])
@pytest.mark.parametrize("case", ["shared1", "dense-first"])
async def test_a_build_by_the_router_takes_one_pass_of_the_full_model(
    directories: dict[str, Path], case: str, slots: int, may_stream: bool
) -> None:
    """In slots if it fits, and else streamed."""
    world = World(directories[case], slots=slots, may_stream=may_stream)
    build = await world.builder.build(build_request(method="router"))
    assert_same(build.found, world.offline(method="router"))
    assert build.found.method == "router" and world.probe.calls == len(texts())
    assert world.manager.statistics().used_slots == (0 if may_stream else world.num_experts)
    world.assert_nothing_left()


async def test_a_build_by_the_router_needs_the_full_model(directories: dict[str, Path]) -> None:
    world = World(directories["shared1"], slots=16)
    with pytest.raises(PoolTooLarge, match="'base' can never be resident"):
        await world.builder.build(build_request(method="router"))
    assert world.probe.calls == 0


@pytest.mark.parametrize("case", ["shared2-gqa", "always-active", "dense-first", "norm-topk"])
async def test_the_smallest_and_the_largest_pool(directories: dict[str, Path], case: str) -> None:
    world = World(directories[case])
    smallest = max(1, *(len(moe.implied) for moe in world.moe_layers if moe))
    for k in (smallest, max(moe.num_experts for moe in world.moe_layers if moe)):
        build = await world.build(f"of-{k}", k)
        assert_same(build.found, world.offline(k))
        world.assert_nothing_left()


async def test_the_same_build_gives_the_same_pool_and_redefines_it(
    directories: dict[str, Path],
) -> None:
    world = World(directories["shared1"])
    first = await world.build()
    with pytest.raises(PoolExists, match="replace=true"):
        await world.build()
    wanted = build_request(description="about sums", router_temperature=2.0)
    again = await world.builder.build(wanted, replace=True)
    assert not again.is_new
    assert again.found == first.found
    pool = world.service.lookup.find("math")
    assert (pool.description, pool.router_temperature) == ("about sums", 2.0)
    assert pool.expert_ids == first.found.pool("math").expert_ids, "found at temperature 1"


async def test_documents_are_cut_to_what_the_server_takes_and_counted(
    directories: dict[str, Path],
) -> None:
    world = World(directories["shared1"], max_tokens=20)
    build = await world.build()
    shorter = tuple(Example(e.source, (e.text or "")[:20]) for e in texts())
    assert_same(build.found, world.offline(examples=shorter))
    assert (build.documents.num_cut, build.documents.tokens_cut) == (2, 43)
    assert (
        "2 of 3 documents are longer than the model's context of 20 tokens: at least 43"
        in build.notes[0]
    )
    assert "47 tokens are little text" in build.notes[1]


async def test_a_chat_is_an_example(directories: dict[str, Path]) -> None:
    world = World(directories["shared1"])
    chat = (Example("body.examples[0]", messages=({"role": "user", "content": "one and one"},)),)
    build = await world.build(examples=chat)
    assert_same(build.found, world.offline(examples=chat))


# -- beside other requests --


async def test_the_list_of_pools_tells_how_far_a_build_is(directories: dict[str, Path]) -> None:
    world = World(directories["shared1"])
    layers = sum(moe is not None for moe in world.moe_layers)

    def told() -> tuple[str, int, int] | None:
        building = world.service.statuses.overview().building
        return building and (building.name, building.done, building.total)

    assert told() is None
    world.probe.may_continue.clear()
    version = world.service.statuses.version()
    building = asyncio.create_task(world.build())
    while world.probe.calls < 3:
        await settle()
    assert told() == ("math", 0, 3 * layers)
    assert world.service.statuses.version() != version
    seen = {0}
    world.probe.may_continue.set()
    while not building.done():
        seen.add((told() or ("", 0, 0))[1])
        await asyncio.sleep(0)
    assert len(seen) > layers
    assert told() is None
    world.probe.fails_at = world.probe.calls + 2
    with pytest.raises(EngineDead):
        await world.build("other")
    assert told() is None


@pytest.mark.parametrize("slots", [K, K + 1, 32])
async def test_no_expert_is_copied_twice_and_little_room_is_enough(
    directories: dict[str, Path], slots: int
) -> None:
    world = World(directories["norm-topk"], slots=min(slots, 16), rows=3)
    build = await world.build()
    assert_same(build.found, world.offline())
    copied = [(c.layer, c.expert) for op in world.engine.operations for c in op.copies]
    assert len(copied) == len(set(copied))
    assert world.probe.most_pools <= 2
    world.assert_nothing_left()


async def test_few_documents_run_at_once_and_behind_all_requests(
    directories: dict[str, Path],
) -> None:
    world = World(directories["shared1"])
    await world.build(examples=texts(lengths=[5] * 12))
    assert world.probe.calls == 12 * 3
    assert world.probe.most_running == 4
    assert world.probe.priorities == {LOW_PRIORITY}


async def test_a_build_waits_for_pools_in_use_without_holding_any_up(
    directories: dict[str, Path],
) -> None:
    """Room for the build or for others, but not for both."""
    world = World(directories["shared1"], slots=K + 2)
    mine, yours = world.pool_of(*range(7), name="mine"), world.pool_of(*range(9, 16), name="yours")
    async with world.service.residency.lease(mine):
        building = asyncio.create_task(world.build())
        while world.probe.calls < 3:  # layer 0 needs no more than the shared expert
            await asyncio.sleep(0)
        while not world.manager.statistics().waiting_requests:
            await asyncio.sleep(0)
        assert world.probe.calls == 3
    for _ in range(20):  # others come and go, and the build gets its turns
        async with world.service.residency.lease(yours):
            await asyncio.sleep(0)
    build = await building
    assert_same(build.found, world.offline())
    world.assert_nothing_left()


async def test_the_temporary_pool_goes_before_pools_that_are_asked_for(
    directories: dict[str, Path],
) -> None:
    """A row for the build's pool and none to spare: the next takes the row of the last."""
    world = World(directories["shared1"], rows=3)  # the base pool's, mine, and the build's
    mine = world.pool_of(1, 2)
    with world.service.temporary.held(mine):
        await world.manager.load(mine)
        await world.build()
        assert world.manager.is_resident(mine)
        assert [pool.name for pool in world.manager.statistics().pools] == ["mine"]


async def test_a_drain_lets_a_build_come_to_its_end(directories: dict[str, Path]) -> None:
    world = World(directories["shared1"])
    world.probe.may_continue.clear()
    building = asyncio.create_task(world.build())
    while not world.manager.statistics().running_requests:
        await asyncio.sleep(0)
    world.manager.start_draining()
    world.probe.may_continue.set()
    assert (await building).is_new


# -- however it ends --


@pytest.mark.parametrize("fails_at", range(1, 10, 2))
@pytest.mark.parametrize(
    "failure", [EngineDead("died"), PoolLoadFailed("unreadable"), Unavailable("later")]
)
async def test_a_build_that_fails_leaves_nothing(
    directories: dict[str, Path], failure: Exception, fails_at: int
) -> None:
    world = World(directories["shared1"])
    world.probe.fails_at, world.probe.failure = fails_at, failure
    with pytest.raises(type(failure), match=str(failure)):
        await world.build()
    await settle()
    world.assert_nothing_left()
    assert world.manager.statistics().used_slots == 0
    assert list(world.service.catalog.pools) == []
    assert world.learned == []
    assert_same((await world.build()).found, world.offline())


async def test_a_pool_that_cannot_be_loaded_ends_the_build(directories: dict[str, Path]) -> None:
    world = World(directories["shared1"])
    found = world.offline()
    assert found.layers[0] is not None
    kept = found.layers[0].experts[0]
    world.engine.unreadable = {(0, kept)}
    with pytest.raises(PoolLoadFailed, match=f"expert {kept} of layer 0"):
        await world.build()
    await settle()
    world.assert_nothing_left()
    assert world.manager.statistics().used_slots == 0


@pytest.mark.parametrize("calls", [0, 1, 4, 9])
async def test_a_build_that_is_cancelled_leaves_nothing(
    directories: dict[str, Path], calls: int
) -> None:
    """As at the end of the event loop; a client cannot do it."""
    world = World(directories["shared1"])
    wanted = build_request()
    building = asyncio.create_task(world.builder._build(wanted, False))
    while world.probe.calls < calls or not world.manager.statistics().pools:
        await asyncio.sleep(0)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    await settle()
    world.assert_nothing_left()
    assert world.manager.statistics().used_slots == 0
    assert_same((await world.build()).found, world.offline())


async def test_a_client_that_leaves_does_not_stop_the_build(directories: dict[str, Path]) -> None:
    world = World(directories["shared1"])
    asking = asyncio.create_task(world.build())
    while not world.probe.calls:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    while "math" not in world.service.catalog.pools:
        await asyncio.sleep(0)
    assert world.service.lookup.find("math").expert_ids == world.offline().pool("math").expert_ids


async def test_one_build_at_a_time(directories: dict[str, Path]) -> None:
    world = World(directories["shared1"])
    world.probe.may_continue.clear()
    first = asyncio.create_task(world.build("math"))
    while not world.probe.calls:
        await asyncio.sleep(0)
    with pytest.raises(StateConflict, match="pool 'math' is being built, and a server builds one"):
        await world.build("code")
    world.probe.may_continue.set()
    await first
    await world.build("code")
    assert list(world.service.catalog.pools) == ["code", "math"]


async def test_a_document_that_was_computed_twice_is_asked_again(
    directories: dict[str, Path],
) -> None:
    world = World(directories["shared1"])
    world.probe.extra_tokens = [16, 0, 5, 16]
    build = await world.build()
    assert_same(build.found, world.offline())
    assert world.probe.calls == 9 + 3
    world.probe.extra_tokens = [1] * 20
    with pytest.raises(Unavailable, match="preempted a document 3 times"):
        await world.build("other")
    world.assert_nothing_left()


async def test_a_defined_pool_of_the_same_experts_stays(directories: dict[str, Path]) -> None:
    """The first temporary pool is the implied experts alone; a defined pool may equal it."""
    implied = ExpertPool("implied", tuple(LayerExperts(()) for _ in range(3)))
    world = World(directories["shared1"], pools=[implied])
    await world.service.residency.load("implied", pin=True)
    await world.build()
    assert world.manager.is_pinned(world.service.lookup.find("implied"))
    world.service.residency.unpin("implied")
    await world.build("again")
    assert world.manager.is_resident(world.service.lookup.find("implied"))
    trunk = world.service.lookup.find("implied")
    await world.service.definitions.remove("implied")
    with world.service.temporary.held(trunk):  # as the router's chooser holds it
        await world.manager.load(trunk)
        await world.build("third")
        assert world.manager.is_resident(trunk)
    assert not world.manager.is_resident(trunk)


# -- refused before anything runs --


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 33}, RequestError, "a pool of 33 experts per layer is more than the model has: 32"),
        ({"k": 0}, RequestError, "a pool of 0 experts per layer is too small: layer 0 needs"),
        ({"k": 20}, PoolTooLarge, "layer 0 needs 20 slots and has 16"),
        ({"name": "emo"}, RequestError, "has the name of the model"),
        ({"name": "base"}, RequestError, "kept for all experts"),
        ({"name": "mine"}, PoolExists, "is defined already; give replace=true"),
    ],
)
async def test_what_cannot_become_a_pool_is_refused_first(
    directories: dict[str, Path], changes: dict[str, object], error: type[Exception], message: str
) -> None:
    mine = ExpertPool("mine", tuple(LayerExperts((1,)) for _ in range(3)))
    world = World(directories["shared1"], slots=16, pools=[mine])
    with pytest.raises(error, match=message):
        await world.build(**changes)  # type: ignore[arg-type]
    assert (world.probe.calls, world.engine.operations) == (0, [])
    assert (await world.build("other")).is_new, "the builder is free again"


async def test_text_that_cannot_be_tokenized_is_refused_by_its_place(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    directory = write_checkpoint("shared1", tmp_path)
    (directory / "tokenizer_config.json").write_text("{}")
    world = World(directory)
    chat = Example("body.examples[1]", messages=({"role": "user", "content": "x"},))
    with pytest.raises(RequestError, match=r"body\.examples\[1\]: .* has no chat template"):
        await world.build(examples=(*texts()[:1], chat))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"tokenizer\.json does not exist"):
        await world.build()
