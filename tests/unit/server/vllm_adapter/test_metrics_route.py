"""GET /metrics shows each of our metrics once, whether or not vLLM reads it from shared files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

# In a process of its own: prometheus_client decides at its import where values are kept.
PROGRAM = """
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from emo_serve.metrics import MetricsSnapshot, PoolMetrics, PoolSnapshot, gauge_text
from emo_serve.server.vllm_adapter.openai import add_to_metrics, metrics_registry

resident = [False]
def snapshot():
    pool = PoolSnapshot("math", resident[0], False, 2, 0)
    return MetricsSnapshot((pool,), 8, 4, 4, 0, 100)

app = FastAPI()
attach_router(app)
metrics = PoolMetrics(metrics_registry(), ["math", "gone"], ["unknown_pool"])
add_to_metrics(app, gauge_text(snapshot, lambda: 0.0))
client = TestClient(app)
client.get("/metrics").raise_for_status()
resident[0] = True
metrics.count_request("math", "finished")
metrics.count_wait("math", "granted", 0.3)
metrics.remove_pool("gone")
answer = client.get("/metrics")
assert answer.headers["content-type"].startswith("text/plain; version="), answer.headers
assert "/metrics" in app.openapi()["paths"]
print(answer.text)
"""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("is_shared", [False, True])
def test_gauges_and_counters_are_shown_once(tmp_path: Path, is_shared: bool) -> None:
    environment = {key: v for key, v in os.environ.items() if key != "PROMETHEUS_MULTIPROC_DIR"}
    if is_shared:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "error::UserWarning:prometheus_client", "-c", PROGRAM]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
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
