"""What a pool's card says clients have asked of it."""

from __future__ import annotations

import pytest

from emo_serve.residency.ports import LoadReport, NullObserver
from emo_serve.server.pool_admin import activity
from emo_serve.server.pool_admin.activity import PoolActivity, PoolUse


class Recorder(NullObserver):
    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def count_ask(self, pool: str, *, is_hit: bool) -> None:
        self.calls.append(("ask", pool, is_hit))

    def count_wait(self, pool: str, outcome: str, seconds: float) -> None:
        self.calls.append(("wait", pool, outcome, seconds))

    def count_load(self, pool: str, report: LoadReport) -> None:
        self.calls.append(("load", pool, report))

    def count_failed_load(self, pool: str) -> None:
        self.calls.append(("failed", pool))

    def count_smaller(self, pool: str) -> None:
        self.calls.append(("smaller", pool))

    def count_eviction(self, pool: str, reason: str) -> None:
        self.calls.append(("eviction", pool, reason))


def test_it_counts_by_the_name_that_was_asked_for() -> None:
    times = iter((5.9, 8.2))
    found = PoolActivity(NullObserver(), lambda: next(times))
    assert found.use_of("math") == PoolUse()
    found.count_ask("math", is_hit=False)
    found.count_ask("math", is_hit=True)
    found.add_coverage("math", 0.5)
    found.add_coverage("math", 0.75)
    use = found.use_of("math")
    assert (use.hits, use.misses, use.last_used, use.coverage) == (1, 1, 8, 0.625)
    assert found.use_of("code+math").coverage is None


def test_its_version_grows_with_all_that_it_remembers() -> None:
    found = PoolActivity(NullObserver())
    versions = [found.version]
    for change in (
        lambda: found.count_ask("math", is_hit=True),
        lambda: found.add_coverage("math", 0.5),
    ):
        change()
        versions.append(found.version)
    assert versions == sorted(set(versions))
    found.use_of("math")
    assert found.version == versions[-1]


def test_it_passes_everything_on() -> None:
    recorder = Recorder()
    found = PoolActivity(recorder)
    report = LoadReport(8, 8, 0, 64, 64, 0.1)
    found.count_ask("math", is_hit=True)
    found.count_wait("math", "granted", 0.2)
    found.count_load("math", report)
    found.count_failed_load("law")
    found.count_smaller("law")
    found.count_eviction("law", "room")
    assert recorder.calls == [
        ("ask", "math", True),
        ("wait", "math", "granted", 0.2),
        ("load", "math", report),
        ("failed", "law"),
        ("smaller", "law"),
        ("eviction", "law", "room"),
    ]


def test_it_keeps_a_bounded_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "_MAX_NAMES", 2)
    found = PoolActivity(NullObserver())
    for name in ("a", "b", "c"):
        found.count_ask(name, is_hit=True)
    assert [found.use_of(name).hits for name in ("a", "b", "c")] == [0, 1, 1]
