"""promtool, Prometheus' own, reads what deploy/ gives to Prometheus, and tries every alert."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from tests.support.prometheus import DEPLOY, NEEDS_PROMETHEUS, PROMTOOL

TESTS = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
}


def promtool(*arguments: str) -> str:
    """Run promtool, which must find no fault."""
    if PROMTOOL is None:
        pytest.skip(NEEDS_PROMETHEUS)
    result = subprocess.run(
        [PROMTOOL, *arguments], cwd=DEPLOY, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_prometheus_reads_its_configuration() -> None:
    assert "valid prometheus config file" in promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_the_tests_of_an_alert_see_it_fire_and_not_fire(alert: str) -> None:
    (scenario,) = (test for test in TESTS if test["name"].startswith(f"{alert},"))
    fired = [
        sample["labels"]
        for expected in scenario["promql_expr_test"]
        for sample in expected["exp_samples"]
    ]
    severity = ALERTS[alert]["labels"]["severity"]
    assert fired == [f'{{alertname="{alert}", instance="a", severity="{severity}"}}']
    assert any(not expected["exp_samples"] for expected in scenario["promql_expr_test"])
    series = " ".join(entry["series"] for entry in scenario["input_series"])
    for name in re.findall(r"\b(?:emo_serve_\w+|up)\b", ALERTS[alert]["expr"]):
        assert name in series, f"{alert} is tried without {name}"
