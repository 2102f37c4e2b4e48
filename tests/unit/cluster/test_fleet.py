"""A router that knows its replicas by what they publish."""

from __future__ import annotations

import random

from emo_serve.cluster.fleet import FleetRouter, Known, published
from emo_serve.cluster.ticket import NO_TICKET, Ticket
from emo_serve.names import ModelNames


def stats(*pools: str, concurrency: int = 8, fits: tuple[str, ...] = ()) -> dict[str, object]:
    return published(
        pools=pools,
        fits=fits,
        known=["math", "code", "law"],
        names=ModelNames(("emo",)),
        concurrency=concurrency,
    )


def router() -> FleetRouter:
    return FleetRouter(random.Random(0))


def test_a_request_goes_where_its_pool_is() -> None:
    fleet = router()
    replicas = [Known("a", 3, stats("math")), Known("b", 0, stats("code"))]
    assert fleet.order(Ticket("math"), replicas, 0.0) == ("a", "b")
    assert fleet.order(Ticket("emo:code"), replicas, 0.0) == ("b", "a")
    assert fleet.order(Ticket(None, ("math",)), replicas, 0.0) == ("a", "b")


def test_without_pool_the_idlest_is_taken() -> None:
    fleet = router()
    replicas = [Known("a", 3, stats("math")), Known("b", 0, stats("code"))]
    for ticket in (NO_TICKET, Ticket("physics"), Ticket("auto"), Ticket("math", ("code",))):
        assert fleet.order(ticket, replicas, 0.0) == ("b", "a")


def test_the_margin_is_what_the_replicas_run_at_once() -> None:
    replicas = [Known("a", 5, stats("math", concurrency=4)), Known("b", 0, stats())]
    assert router().order(Ticket("math"), replicas, 0.0)[0] == "b"
    replicas = [Known("a", 5, stats("math", concurrency=64)), Known("b", 0, stats())]
    assert router().order(Ticket("math"), replicas, 0.0)[0] == "a"


def test_what_was_sent_counts_until_the_news_come() -> None:
    fleet = router()
    replicas = [Known("a", 0, stats()), Known("b", 0, stats())]
    first = fleet.order(Ticket("math"), replicas, 0.0)[0]
    other = {"a": "b", "b": "a"}[first]
    fleet.note_sent(Ticket("math"), other, replicas, 0.0)
    assert fleet.order(Ticket("math"), replicas, 1.0)[0] == other
    assert fleet.order(Ticket("math"), replicas, 60.0)[0] == first


def test_replicas_without_news_are_taken_by_load() -> None:
    replicas = [Known("a", 1, {}), Known("b", 0, {})]
    assert router().order(Ticket("math"), replicas, 0.0) == ("b", "a")
    assert router().order(Ticket("math"), [], 0.0) == ()


def test_changes_find_one_replica_whatever_its_load() -> None:
    names = ["a", "b", "c"]
    orders = set()
    for turn in range(6):
        replicas = [Known(name, (turn + place) % 3, stats()) for place, name in enumerate(names)]
        random.Random(turn).shuffle(replicas)
        orders.add(router().order(Ticket(is_change=True), replicas, 0.0))
    assert len(orders) == 1


def test_a_named_replica_is_the_only_one() -> None:
    replicas = [Known("a", 9, stats("math")), Known("b", 0, stats())]
    assert router().order(Ticket("math", replica="b"), replicas, 0.0) == ("b",)
    assert router().order(Ticket(is_change=True, replica="a"), replicas, 0.0) == ("a",)
    assert router().order(Ticket("math", replica="gone"), replicas, 0.0) == ("b", "a")
