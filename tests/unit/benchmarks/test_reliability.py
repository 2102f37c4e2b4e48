"""The figures of benchmarks/reliability: slopes, percentiles, tenths, endings; no server runs."""

from __future__ import annotations

import pytest

from benchmarks.reliability.client import Answer, endings, read_event, tries_of
from benchmarks.reliability.sampling import ProcessSample, ServerSample, growth
from benchmarks.reliability.state import sum_of_metric
from benchmarks.reliability.summary import percentiles, second_half, slope, tenths


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert percentiles(values) == {"count": 200, "p50": 100.5, "p99": 199.0, "max": 200.0}
    assert percentiles([7.0]) == {"count": 1, "p50": 7.0, "p99": 7.0, "max": 7.0}
    assert percentiles([]) == {"count": 0}


def test_a_slope_is_fitted_to_all_points() -> None:
    noise = (3.0, -3.0, -3.0, 3.0)
    points = [(float(x), 2.0 * x + noise[x % 4]) for x in range(400)]
    assert slope(points) == pytest.approx(2.0, abs=1e-3)
    assert slope([]) == 0.0
    assert slope([(1.0, 5.0), (1.0, 9.0)]) == 0.0


def test_the_second_half_is_that_of_the_time_not_of_the_points() -> None:
    points = [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (60.0, 2.0), (100.0, 3.0)]
    assert second_half(points) == [(60.0, 2.0), (100.0, 3.0)]
    assert second_half([]) == []


def test_tenths_leave_out_what_lies_outside() -> None:
    points = [(9.9, 1.0), (10.0, 2.0), (19.9, 4.0), (109.9, 8.0), (110.0, 16.0)]
    parts = tenths(points, 10.0, 110.0)
    assert len(parts) == 10
    assert parts[0] == {"count": 2, "p50": 3.0, "p99": 4.0, "max": 4.0}
    assert parts[9]["max"] == 8.0
    assert [part["count"] for part in parts] == [2, *[0] * 8, 1]


def sample(seconds: float, rss: int, files: int) -> ServerSample:
    return ServerSample(seconds, {"worker": ProcessSample(rss_bytes=rss, threads=4)}, 100, files)


def test_growth_counts_the_second_half_only() -> None:
    """The KV cache fills at first, which is no leak; files leak throughout."""
    filling = [sample(60.0 * minute, min(minute, 20) << 20, minute) for minute in range(61)]
    found = growth(filling)
    worker, server = found["worker"], found["server"]
    assert worker["rss_bytes"] == {
        "first": 0,
        "middle": 20 << 20,
        "last": 20 << 20,
        "per_hour": pytest.approx(0.0, abs=1e-6),
    }
    assert worker["threads"]["per_hour"] == pytest.approx(0.0, abs=1e-6)
    assert server["temporary_files"]["per_hour"] == pytest.approx(60.0)
    assert server["shared_memory_bytes"]["last"] == 100


def test_a_client_counts_at_the_try_at_which_it_was_served() -> None:
    served = Answer(200, "finished", 1.0)
    refused = Answer(503, "refused", 0.1, retry_after=4)
    clients = [[served], [refused, served], [refused, served], [refused, refused], [served]]
    assert tries_of(clients) == {
        "served_at": {"never": 1, "try 1": 2, "try 2": 2},
        "retry_after": {"count": 3, "p50": 4.0, "p99": 4.0, "max": 4.0},
    }


def test_endings_tell_an_error_event_from_a_torn_stream() -> None:
    answers = [
        Answer(200, "finished", 1.0),
        Answer(200, "torn", 1.0),
        Answer(200, "error event", 1.0),
        Answer(200, "torn", 1.0),
        Answer(None, "no answer", 1.0),
    ]
    assert endings(answers) == {
        "- no answer": 1,
        "200 error event": 1,
        "200 finished": 1,
        "200 torn": 2,
    }


def test_events_of_a_stream() -> None:
    assert read_event(b'data: {"choices": []}\n') == {"choices": []}
    assert read_event(b"data: [DONE]\r\n") == "[DONE]"
    assert read_event(b": keep-alive\n") is None
    assert read_event(b"\n") is None


def test_a_metric_is_summed_over_the_labels_asked_for() -> None:
    text = (
        "# HELP loads_total Loads\n"
        'loads_total{outcome="loaded",pool="a"} 2.0\n'
        'loads_total{outcome="failed",pool="a"} 1.0\n'
        'loads_total{outcome="loaded",pool="b"} 4.0\n'
        "loads_total_created 8.0\n"
        "idle 16.0\n"
    )
    assert sum_of_metric(text, "loads_total") == 7.0
    assert sum_of_metric(text, "loads_total", pool="a") == 3.0
    assert sum_of_metric(text, "loads_total", pool="a", outcome="loaded") == 2.0
    assert sum_of_metric(text, "idle") == 16.0
    assert sum_of_metric(text, "absent") == 0.0
