"""Replicas that have heard the same news agree, in whatever order they heard them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emo_serve.cluster.shared import News, SharedPools, Stamp


def test_the_later_change_counts() -> None:
    here, there = SharedPools("here"), SharedPools("there")
    first = here.note("pool", "math", "1")
    assert there.take(first)
    second = there.note("pool", "math", "2")
    assert here.take(second)
    assert not there.take(first)
    assert here.all() == there.all() == (second,)


def test_two_changes_at_once_end_alike() -> None:
    here, there = SharedPools("here"), SharedPools("there")
    mine, theirs = here.note("pool", "math", "1"), there.note("pool", "math", None)
    assert here.overtakes_mine(theirs)
    assert not there.overtakes_mine(mine)
    here.take(theirs)
    there.take(mine)
    assert here.all() == there.all() == (theirs,)


def test_a_change_made_with_knowledge_of_the_last_overtakes_nothing() -> None:
    here, there = SharedPools("here"), SharedPools("there")
    there.take(here.note("pool", "math", "1"))
    assert not here.overtakes_mine(there.note("pool", "math", "2"))


def test_news_are_heard_once() -> None:
    here = SharedPools("here")
    news = News("pool", "math", "1", Stamp(7, "there"))
    assert here.take(news)
    assert not here.take(news)
    assert here.note("pool", "code", "2").stamp.number == 8


def test_pins_are_apart_from_pools() -> None:
    here = SharedPools("here")
    here.note("pool", "math", "document")
    pin = here.note("pin", "math", "")
    here.note("pin", "code", "2")
    here.note("pin", "code", None)
    assert here.pins() == (pin,)
    assert len(here.all()) == 3


def test_only_what_is_lacking_is_told() -> None:
    here, there = SharedPools("here"), SharedPools("there")
    news = [here.note("pool", name, name) for name in ("a", "b", "c")]
    there.take(news[1])
    lacking = here.lacking([item.stamp for item in there.all()])
    assert lacking == (news[0], news[2])


CHANGES = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.sampled_from([None, "1", "2"])),
    max_size=12,
)


@given(CHANGES, st.data())
def test_any_order_of_hearing_ends_alike(
    changes: list[tuple[int, str, str | None]], data: st.DataObject
) -> None:
    replicas = [SharedPools(str(number)) for number in range(3)]
    news: list[News] = []
    for number, name, value in changes:
        if news and data.draw(st.booleans()):
            replicas[number].take(data.draw(st.sampled_from(news)))
        news.append(replicas[number].note("pool", name, value))
    for replica in replicas:
        for item in data.draw(st.permutations(news + news)):
            replica.take(item)
    assert len({replica.all() for replica in replicas}) == 1
