"""GET /metrics shows each of our metrics once, whether or not vLLM reads it from shared files.

GET /metrics/routing shows what routers read, and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# In a process of its own: prometheus_client decides at its import where values are kept.
PROGRAM = """
import sys
from prometheus_client import Gauge
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from emo_serve.metrics import MetricsSnapshot, PoolMetrics, PoolSnapshot, gauges
from emo_serve.router_metrics import PoolsAtHand, pools_family
from emo_serve.server.vllm_adapter.metrics_routes import add_metrics_routes, metrics_registry

resident = [False]
def snapshot():
    pool = PoolSnapshot("math", resident[0], False, 2, 0)
    return MetricsSnapshot((pool,), 8, 4, 4, 0, 100)

app = FastAPI()
attach_router(app)
metrics = PoolMetrics(metrics_registry(), ["math", "gone"], ["unknown_pool"])
(theirs,) = (
    route.endpoint
    for route in app.routes
    if isinstance(route, APIRoute) and route.path == "/metrics"
)
at_hand = [PoolsAtHand((), ("math",), 2)]
add_metrics_routes(
    app, lambda: gauges(snapshot(), 0.0), lambda: pools_family(at_hand[0], 7.0)
)
running = Gauge(
    "vllm:num_requests_running", "Running", ["engine"], multiprocess_mode="mostrecent"
)
running.labels("0").set(3)
client = TestClient(app)
client.get("/metrics").raise_for_status()
resident[0] = True
at_hand[0] = PoolsAtHand(("math",), (), 2)
metrics.count_request("math", "finished")
metrics.count_wait("math", "granted", 0.3)
metrics.remove_pool("gone")
answer = client.get("/metrics")
assert answer.headers["content-type"].startswith("text/plain; version="), answer.headers
assert "/metrics" in app.openapi()["paths"]
print(answer.text)
def series(text):
    return [line.rpartition(" ")[0] for line in text.splitlines()]
shown = series(bytes(theirs(None).body).decode())
assert series(answer.text)[:len(shown)] == shown, "all that vLLM shows, then what is ours"
routing = client.get("/metrics/routing")
assert routing.headers["content-type"] == answer.headers["content-type"]
assert "/metrics/routing" not in app.openapi()["paths"]
print(routing.text, file=sys.stderr)
"""

ROUTING = """\
# HELP vllm:lora_requests_info Pools as LoRA adapters, for routers: names, and how many of them fit without eviction
# TYPE vllm:lora_requests_info gauge
vllm:lora_requests_info{max_lora="3",running_lora_adapters="math",waiting_lora_adapters=""} 7.0
# HELP vllm:num_requests_running Running
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
"""  # noqa: E501


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("is_shared", [False, True])
def test_gauges_and_counters_are_shown_once(tmp_path: Path, is_shared: bool) -> None:
    environment = {key: v for key, v in os.environ.items() if key != "PROMETHEUS_MULTIPROC_DIR"}
    if is_shared:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "error::UserWarning:prometheus_client", "-c", PROGRAM]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stderr.strip() == ROUTING.strip()
    lines = [line for line in found.stdout.splitlines() if line.startswith("emo_serve_")]
    samples = dict(line.rsplit(" ", 1) for line in lines if "_created" not in line)
    assert samples['emo_serve_pool_resident{pool="math"}'] == "1.0"
    assert samples['emo_serve_running_requests{pool="math"}'] == "2.0"
    assert samples["emo_serve_slots_in_use"] == "4.0"
    assert samples["emo_serve_resident_bytes"] == "400.0"
    assert samples['emo_serve_requests_total{outcome="finished",pool="math"}'] == "1.0"
    assert samples['emo_serve_waiting_seconds_count{outcome="granted"}'] == "1.0"
    counts = Counter(line.rsplit(" ", 1)[0] for line in found.stdout.splitlines())
    assert {text: n for text, n in counts.items() if n > 1 and "emo_serve" in text} == {}
    assert bool(list(tmp_path.glob("*.db"))) is is_shared
