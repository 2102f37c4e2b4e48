"""When a fleet grows and shrinks: work, waits for loads, hits, and how long each must last."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_serve.cluster.autoscaling import Autoscaler, ReplicaReport, ScalingLimits
from emo_serve.errors import ConfigError

LIMITS = ScalingLimits(
    *(1, 20),
    concurrency=10,
    target_share=0.5,
    waiting_share=0.1,
    low_hits=0.6,
    high_hits=0.9,
    up_seconds=10.0,
    down_seconds=60.0,
)
BUSY = ReplicaReport(running=8.0, waiting_for_loads=0.0, hits=100, misses=1)
RIGHT = ReplicaReport(running=4.5, waiting_for_loads=0.0, hits=80, misses=20)
IDLE = ReplicaReport(running=1.0, waiting_for_loads=0.0, hits=100, misses=1)
THRASHING = ReplicaReport(running=1.0, waiting_for_loads=3.0, hits=20, misses=80)
COLD = ReplicaReport(running=1.0, waiting_for_loads=0.05, hits=50, misses=50)
FULL = ReplicaReport(running=1.0, waiting_for_loads=0.05, hits=70, misses=30)
SILENT = ReplicaReport(0.0, 0.0, 0, 0)


def settled(report: ReplicaReport, count: int, seconds: float = 100.0) -> int:
    """Return the decision when a fleet has reported the same all the time."""
    scaler, decided = Autoscaler(LIMITS), count
    for second in range(int(seconds) + 1):
        decided = scaler.decide([report] * count, float(second))
    return decided


@pytest.mark.parametrize(
    ("report", "count", "decided"),
    [
        (BUSY, 4, 7),  # 32 requests at 5 each
        (RIGHT, 4, 4),
        (IDLE, 16, 14),
        (IDLE, 4, 3),
        (IDLE, 1, 1),
        (SILENT, 4, 3),
        (SILENT, 1, 1),
        (THRASHING, 4, 5),
        (THRASHING, 8, 10),
        (THRASHING, 20, 20),
        (COLD, 4, 5),
        (FULL, 4, 4),  # the others would have no place for what one of them has
        (BUSY, 20, 20),
    ],
)
def test_what_a_steady_fleet_needs(report: ReplicaReport, count: int, decided: int) -> None:
    assert settled(report, count) == decided


def test_a_fleet_grows_after_ten_seconds_and_shrinks_after_a_minute() -> None:
    for report, before, after, turn in ((BUSY, 4, 7, 10), (IDLE, 4, 3, 60)):
        assert settled(report, 4, turn - 1) == before
        assert settled(report, 4, turn) == after


@pytest.mark.parametrize(
    ("normal", "moment", "seconds"),
    [(RIGHT, BUSY, 2), (RIGHT, THRASHING, 1), (RIGHT, IDLE, 30), (FULL, SILENT, 30)],
)
def test_a_burst_is_no_reason_to_grow_and_a_lull_none_to_shrink(
    normal: ReplicaReport, moment: ReplicaReport, seconds: int
) -> None:
    scaler = Autoscaler(replace(LIMITS, up_seconds=20.0))
    for second in range(300):
        report = moment if second % 50 >= 50 - seconds else normal
        assert scaler.decide([report] * 4, float(second)) == 4


def test_loads_in_bursts_are_a_reason_to_grow() -> None:
    scaler = Autoscaler(LIMITS)
    for second in range(20):
        count = scaler.decide([THRASHING if second % 3 == 0 else FULL] * 4, float(second))
    assert count == 5


def test_growing_does_not_wait_for_a_window_of_shrinking() -> None:
    scaler = Autoscaler(LIMITS)
    for second in range(40):
        scaler.decide([IDLE] * 4, float(second))
    decided = [scaler.decide([BUSY] * 4, 40.0 + second) for second in range(12)]
    assert decided[0] == 4 and decided[-1] == 7


def test_the_first_loads_of_a_new_replica_are_no_reason_for_another() -> None:
    scaler = Autoscaler(LIMITS)
    for second in range(20):
        scaler.decide([BUSY] * 4, float(second))
    for second in range(9):
        assert scaler.decide([RIGHT] * 6 + [THRASHING], 20.0 + second) == 7
    for second in range(9, 30):
        decided = scaler.decide([RIGHT] * 6 + [THRASHING], 20.0 + second)
    assert decided == 7, "a tenth of the requests may wait"


def test_replicas_that_find_no_place_are_given_up_when_nobody_wants_them() -> None:
    scaler, decided = Autoscaler(LIMITS), 4
    for second in range(40):
        decided = scaler.decide([BUSY] * 4, float(second), asked=decided)
    assert decided == 7
    for second in range(55):
        decided = scaler.decide([IDLE] * 4, 40.0 + second, asked=decided)
    assert decided == 7, "the need may come back"
    for second in range(55, 80):
        decided = scaler.decide([IDLE] * 4, 40.0 + second, asked=decided)
    assert decided <= 4


reports = st.builds(
    ReplicaReport, st.floats(0, 100), st.floats(0, 100), st.integers(0, 100), st.integers(0, 100)
)


@given(st.lists(st.tuples(st.lists(reports, max_size=25), st.floats(0, 40))))
def test_the_limits_hold_whatever_is_reported(
    steps: list[tuple[list[ReplicaReport], float]],
) -> None:
    scaler, now = Autoscaler(LIMITS), 0.0
    for fleet, pause in steps:
        now += pause
        decided = scaler.decide(fleet, now)
        assert LIMITS.min_replicas <= decided <= LIMITS.max_replicas
    assert len(scaler._wants) <= max(1, len(steps))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_replicas": 0}, "replicas from 0 to 2"),
        ({"min_replicas": 3}, "replicas from 3 to 2"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"target_share": 0.0}, "target_share is 0.0"),
        ({"waiting_share": 1.5}, "waiting_share is 1.5"),
        ({"high_hits": -1.0}, "high_hits is -1.0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScalingLimits(**{"min_replicas": 1, "max_replicas": 2, "concurrency": 4, **change})
