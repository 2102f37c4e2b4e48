"""A load's rests beside the model's steps, in virtual time."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_serve.vllm_plugin import pacing
from emo_serve.vllm_plugin.pacing import Pacer, Steps

SHARES = {True: pacing._SHARE_ASIDE, False: pacing._SHARE_AMONG}
SLEEP_OVERSHOOTS = 6e-5


@dataclass
class World:
    """A load's thread on a core; each stretch of work and of rest is noted as (start, end)."""

    now: float = 0.0
    on_core: float = 0.0
    next_step: float = float("inf")
    work: list[tuple[float, float]] = field(default_factory=list)
    rests: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = Steps(lambda: self.now)
        self.steps._wait = self.wait
        self.pacer = Pacer(self.steps, lambda: self.on_core, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.rests.append((self.now, self.now + seconds))
        self.now += seconds + SLEEP_OVERSHOOTS

    def wait(self, seconds: float) -> None:
        """Wait for the next step, which comes at `next_step`."""
        self.now = min(self.now + seconds, max(self.now, self.next_step))
        if self.now >= self.next_step:
            self.next_step = float("inf")
            self.steps.begin()

    def piece(self, seconds: float, waiting: float = 0.0) -> None:
        """Work on one piece, after waiting for the disk, then pause."""
        self.now += waiting
        self.work.append((self.now, self.now + seconds))
        self.now += seconds
        self.on_core += seconds
        self.pacer.pause()

    def has_stepped(self, seconds: float) -> None:
        """Let a step of this length end now, and the next begin."""
        self.steps.begin()
        self.now += seconds
        self.steps.end()
        self.steps.begin()


def overlap(stretches: list[tuple[float, float]], start: float, end: float) -> float:
    """Return how much of a window the stretches cover."""
    return sum(max(0.0, min(b, end) - max(a, start)) for a, b in stretches)


PIECES = st.lists(st.floats(1e-5, 2e-3), min_size=1, max_size=20)
STEPS = st.floats(4e-3, 0.5)


@settings(deadline=None)
@given(pieces=PIECES, step=STEPS, is_aside=st.booleans(), offset=st.floats(0, 1))
def test_no_step_meets_more_than_the_share(
    pieces: list[float], step: float, is_aside: bool, offset: float
) -> None:
    world = World()
    world.has_stepped(step)
    world.pacer.begin(is_aside=is_aside)
    for seconds in itertools.islice(itertools.cycle(pieces), 300):
        world.piece(seconds)
    first, last = world.work[0][0], world.work[-1][1]
    begin = first + offset * max(0.0, last - first - step)
    turn = world.pacer._turn_seconds
    most = SHARES[is_aside] * (step + 2 * turn) + 2 * (turn + max(pieces))
    assert overlap(world.work, begin, begin + step) <= most


@settings(deadline=None)
@given(pieces=PIECES, step=STEPS, is_aside=st.booleans())
def test_a_load_takes_its_share_however_large_it_is(
    pieces: list[float], step: float, is_aside: bool
) -> None:
    """So a load takes no longer than 1 / share of its idle time, but for its last turn."""
    world = World()
    world.has_stepped(step)
    start = world.now
    world.pacer.begin(is_aside=is_aside)
    for seconds in pieces:
        world.piece(seconds)
    share, turn = SHARES[is_aside], world.pacer._turn_seconds
    assert world.now - start <= sum(pieces) / share + turn + SLEEP_OVERSHOOTS + max(pieces)


@settings(deadline=None)
@given(pieces=PIECES, is_aside=st.booleans())
def test_at_idle_a_load_never_rests(pieces: list[float], is_aside: bool) -> None:
    world = World()
    world.pacer.begin(is_aside=is_aside)
    for seconds in pieces:
        world.piece(seconds)
    assert not world.rests
    world.has_stepped(0.01)
    world.steps.end()
    world.now += pacing._MOST_BETWEEN_SECONDS
    for seconds in pieces:
        world.piece(seconds)
    assert not world.rests, "some time after the last step, too"


def test_waiting_for_the_disk_is_rest() -> None:
    world = World()
    world.has_stepped(0.1)
    world.pacer.begin(is_aside=True)
    for _ in range(100):
        world.piece(1e-4, waiting=1e-2)
    assert not world.rests
    for _ in range(100):
        world.piece(1e-3)
    assert world.rests, "no more of it is saved than some turns"
    assert world.rests[0][0] - world.work[100][0] < 0.1 / 4


def test_between_two_steps_a_load_stands_still() -> None:
    world = World()
    world.has_stepped(0.1)
    world.pacer.begin(is_aside=True)
    world.now += 0.1
    world.steps.end()
    world.next_step = world.now + 0.03
    world.piece(1e-4)
    assert world.now == pytest.approx(world.work[0][0] + 0.03)
    world.now += 0.1
    world.steps.end()
    world.piece(1e-4)
    assert world.now == pytest.approx(world.work[1][0] + pacing._MOST_BETWEEN_SECONDS)
    world.piece(1.0)
    assert world.now == pytest.approx(world.work[2][0] + 1.0), "no step follows"
    assert not world.rests


def test_a_long_step_is_a_step_to_its_end() -> None:
    world = World()
    world.steps.begin()
    world.now += 60  # a prefill at the released size takes longer than any pause between steps
    assert world.steps.wait_for_next()
    world.steps.end()
    assert world.steps.seconds == pytest.approx(60)
    before = world.now
    assert not world.steps.wait_for_next()
    assert world.now == pytest.approx(before + pacing._MOST_BETWEEN_SECONDS)


def test_rest_from_before_an_idle_time_is_forgotten() -> None:
    world = World()
    world.has_stepped(0.1)
    world.pacer.begin(is_aside=False)
    world.piece(0.003)  # less than a turn of a step this long
    world.now += 0.1
    world.steps.end()
    world.now += 1.0
    world.piece(1.0)
    world.steps.begin()
    world.piece(0)
    world.piece(0.003)
    assert not world.rests
    world.piece(0.003)
    assert len(world.rests) == 1


@pytest.mark.parametrize(
    ("load_mib", "piece_mib", "step"),
    [(1.7, 0.016, 4e-3), (60, 0.5, 0.01), (384, 0.5, 0.02), (1200, 0.5, 0.155), (3072, 0.5, 0.155)],
)
def test_the_longest_gap_and_the_miss_stay_bounded(
    load_mib: float, piece_mib: float, step: float
) -> None:
    """Loads, pieces and steps from the model that ships to the released size.

    On a core of its own a load takes less than twice its idle time. Among the model's threads it
    makes none of their steps longer than 1.3 times.
    """
    rng = random.Random(0)
    seconds_per_mib = 1 / 1700
    pieces = [piece_mib * rng.uniform(0.5, 1) for _ in range(int(load_mib / piece_mib / 0.75))]
    for is_aside in (True, False):
        world = World()
        world.has_stepped(step)
        start = world.now
        world.pacer.begin(is_aside=is_aside)
        for mib in pieces:
            world.piece(mib * seconds_per_mib)
        idle = sum(pieces) * seconds_per_mib
        if is_aside:
            assert world.now - start <= 2 * idle + world.pacer._turn_seconds
        else:
            assert longest_step(world, step) <= 1.3 * step


def longest_step(world: World, step: float) -> float:
    """Return the longest of the steps that need `step` of a core which the load's work takes.

    The load's stretches are as it made them; a step that begins at one of them meets the most.
    """
    longest = 0.0
    for start, _ in world.work[:: max(1, len(world.work) // 50)]:
        end, needed = start, step
        for begin, stop in world.work:
            if stop <= end:
                continue
            if begin - end >= needed:
                break
            needed -= max(0.0, begin - end)
            end = stop
        longest = max(longest, end + needed - start)
    return longest
