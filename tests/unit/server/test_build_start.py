"""Loads at the start: the deadline of those who wait to be answered does not end them."""

from __future__ import annotations

from functools import partial

import pytest

from emo_serve.errors import LoadDeadlineExceeded
from emo_serve.server.build import _at_start
from tests.support.fake_engine import FakeEngine
from tests.support.residency_world import A, a_manager, in_virtual_time, now


@in_virtual_time
async def test_a_load_at_the_start_outlasts_the_deadline() -> None:
    manager = a_manager(FakeEngine(load_seconds=10), load_deadline_seconds=0.001)
    with pytest.raises(LoadDeadlineExceeded):
        await manager.load(A)
    await _at_start(partial(manager.load, A, pin=True))
    assert manager.is_resident(A)
    assert now() == pytest.approx(10, abs=0.01)
