"""A real Prometheus that scrapes servers under test, as deploy/ configures it but more often."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.processes import free_port
from tests.support.progress import START_SECONDS, Activity, wait_for

__all__ = ["DEPLOY", "NEEDS_PROMETHEUS", "PROMETHEUS", "PROMTOOL", "Prometheus", "scraping"]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
NEEDS_PROMETHEUS = "needs Prometheus with promtool: apt-get install prometheus"


class Prometheus:
    """Ask a running Prometheus."""

    def __init__(self, url: str, activity: Activity) -> None:
        self.activity = activity
        self._http = httpx.Client(base_url=url, timeout=30)

    def get(self, path: str, **params: str) -> Any:
        """Return the data of one of its API's answers; raises for a query that is refused."""
        answer = self._http.get(f"/api/v1/{path}", params=params)
        body = answer.json()
        assert body["status"] == "success", (params, body)
        return body["data"]

    def values(self, query: str) -> list[float]:
        """Return what a query yields now, without what is no number."""
        found = self.get("query", query=query)["result"]
        values = [float(series["value"][1]) for series in found]
        return [value for value in values if not math.isnan(value)]

    def is_up(self) -> bool:
        try:
            return self._http.get("/-/ready").is_success
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        self._http.close()


@contextmanager
def scraping(directory: Path, port: int, interval: str) -> Iterator[Prometheus]:
    """Run Prometheus with the configuration of deploy/, on a server of this machine."""
    assert PROMETHEUS is not None
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "alerts.yml", directory)
    own = free_port()
    command = [PROMETHEUS, f"--config.file={directory / 'prometheus.yml'}"]
    command += [
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{own}",
    ]
    log = directory / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, cwd=directory)
    running = Prometheus(f"http://127.0.0.1:{own}", Activity(process.pid, [log]))
    try:
        wait_for(
            lambda: running.is_up() or process.poll() is not None, running.activity, START_SECONDS
        )
        assert process.poll() is None, log.read_text()
        yield running
    finally:
        running.close()
        process.terminate()
        process.wait()
