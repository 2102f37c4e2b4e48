"""A real Prometheus scrapes a real server, and Grafana's dashboard has something to show."""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from tests.engine.server.conftest import hold_only
from tests.support.progress import wait_for
from tests.support.prometheus import DEPLOY, NEEDS_PROMETHEUS, PROMETHEUS, Prometheus, scraping
from tests.support.server_process import RunningServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.server("shipped"),
    pytest.mark.skipif(PROMETHEUS is None, reason=NEEDS_PROMETHEUS),
]

VARIABLES = {"$instance": ".*", "$pool": ".*", "$__rate_interval": "15s"}
"""What Grafana puts in: all servers and pools, and at least four scrapes."""


def dashboard_queries() -> set[str]:
    board = json.loads((DEPLOY / "grafana/dashboards/emo-serve.json").read_text())
    found = {target["expr"] for panel in board["panels"] for target in panel.get("targets", ())}
    for name, value in VARIABLES.items():
        found = {expr.replace(name, value) for expr in found}
    return found


def ask_some(http: httpx.Client) -> None:
    """Hit a pool, miss another, let the server choose, stream one, ask for what is not there."""
    for model in ("python", "python", "math", "auto", "base", "nope"):
        body = {"model": model, "prompt": "def add(a, b):\n", "max_tokens": 3, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body)
        expected = HTTPStatus.NOT_FOUND if model == "nope" else HTTPStatus.OK
        assert answer.status_code == expected, answer.text


def test_every_query_of_the_dashboard_returns_data_under_traffic(
    server: RunningServer, http: httpx.Client, tmp_path: Path
) -> None:
    hold_only(http, "python")
    without = dashboard_queries()
    assert len(without) > 30

    def all_shown(prometheus: Prometheus) -> bool:
        ask_some(http)
        without.difference_update([expr for expr in without if prometheus.values(expr)])
        return not without

    with scraping(tmp_path, server.port, "1s") as prometheus:
        try:
            wait_for(lambda: all_shown(prometheus), server.activity)
        except AssertionError as error:
            raise AssertionError(f"no data: {sorted(without)}") from error
        assert prometheus.values('up{job="emo-serve"}') == [1.0]
        (group,) = prometheus.get("rules")["groups"]
        assert {(rule["health"], rule["state"]) for rule in group["rules"]} == {("ok", "inactive")}
        instances = {series["instance"] for series in prometheus.get("series", **{"match[]": "up"})}
        assert instances == {f"127.0.0.1:{server.port}"}
