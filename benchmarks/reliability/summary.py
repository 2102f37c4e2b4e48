"""Figures from samples: percentiles, slopes, tenths of a run. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["percentiles", "second_half", "slope", "tenths"]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return count, median, 99th percentile (nearest rank) and maximum; only a count for none."""
    if not values:
        return {"count": 0}
    ranked = sorted(values)
    p99 = ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
    return {
        "count": len(ranked),
        "p50": statistics.median(ranked),
        "p99": p99,
        "max": ranked[-1],
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of (x, y) points; 0 for fewer than two different x."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def second_half(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points whose x is in the later half of the range."""
    if not points:
        return []
    middle = (points[0][0] + points[-1][0]) / 2
    return [point for point in points if point[0] >= middle]


def tenths(
    points: Sequence[tuple[float, float]], start: float, end: float
) -> list[dict[str, float]]:
    """Return the percentiles of y in each tenth of the range of x from `start` to `end`."""
    parts: list[list[float]] = [[] for _ in range(10)]
    for x, y in points:
        if start <= x < end:
            parts[int(10 * (x - start) / (end - start))].append(y)
    return [percentiles(part) for part in parts]
