"""Every replica finds out alone who holds a pin, and pins move as little as possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.cluster.pins import EVERYWHERE, holders, pinned_on
from emo_serve.cluster.rendezvous import Rendezvous

REPLICAS = [f"replica-{number}" for number in range(6)]


@pytest.mark.parametrize(("count", "value"), [(None, EVERYWHERE), (2, "2"), (0, None), (-1, None)])
def test_a_pin_is_on_all_on_some_or_gone(count: int | None, value: str | None) -> None:
    assert pinned_on(count) == value


def test_as_many_hold_a_pin_as_it_says() -> None:
    def held(value: str | None) -> int:
        return len(holders("math", value, REPLICAS, Rendezvous()))

    assert [held(EVERYWHERE), held(None), held("2"), held("9")] == [6, 0, 2, 6]


@given(st.integers(1, 4), st.text(min_size=1), st.integers(0, 5))
def test_one_replica_less_moves_only_its_own_pins(count: int, pool: str, gone: int) -> None:
    before = holders(pool, str(count), REPLICAS, Rendezvous())
    left = [name for name in REPLICAS if name != REPLICAS[gone]]
    after = holders(pool, str(count), left, Rendezvous())
    assert len(after) == count
    assert before - {REPLICAS[gone]} <= after
