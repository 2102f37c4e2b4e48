"""Measurements in turn, and the ratio of their rounds."""

from __future__ import annotations

from benchmarks.harness.pairs import Spread, in_turn


def test_each_round_takes_every_measurement_and_the_first_warms_up() -> None:
    taken: list[str] = []

    def measure(name: str) -> str:
        taken.append(name)
        return f"{name}{len(taken)}"

    rounds = in_turn(2, lambda: measure("a"), lambda: measure("b"))
    assert taken == ["a", "b"] * 3
    assert rounds == [["a3", "b4"], ["a5", "b6"]]


def test_the_ratio_is_of_each_round_not_of_the_medians() -> None:
    spread = Spread.of_ratios([(1, 2), (10, 5), (100, 300)])
    assert spread == Spread(2, 0.5, 3)
    assert str(spread) == "2.00 (0.50-3.00)"
    assert Spread(**spread.to_json()) == spread
