"""The deployment example agrees with the server: files exist, and queries ask for what is there.

There is no promtool here. What stands in for it knows the few PromQL forms that we use: names,
matchers, `by` lists, ranges on counters, balanced brackets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from emo_serve.metrics import MetricsSnapshot, PoolMetrics, PoolSnapshot, register_gauges
from emo_serve.server.asgi.errors import REFUSAL_REASONS

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/emo-serve.json").read_text())
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())

TARGET_LABELS = {"instance", "job"}
FUNCTIONS = {"sum", "max", "rate", "increase", "histogram_quantile"}
WORDS = FUNCTIONS | {"by", "on", "and", "up", "le"}
OPEN_LABELS = {"pool", *TARGET_LABELS}  # whose values only a running server knows


def our_series() -> dict[str, dict[str, set[str]]]:
    """Return each series of the server with its labels and, of each, the values there are."""
    pool = PoolSnapshot("math", True, True, 1, 1)
    snapshot = MetricsSnapshot((pool,), 1, 1, 0, 1, 1)
    registry = CollectorRegistry()
    PoolMetrics(registry, ["math"], REFUSAL_REASONS)
    register_gauges(registry, lambda: snapshot, lambda: 0.0)
    series: dict[str, dict[str, set[str]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            labels = series.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return series


SERIES = our_series()


def dashboard_queries() -> Iterator[tuple[str, str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"], target["legendFormat"]


def alert_rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


QUERIES = [(title, expr) for title, expr, _ in dashboard_queries()] + [
    (rule["alert"], rule["expr"]) for rule in alert_rules()
]


def find_faults(expr: str) -> list[str]:
    """Return what is wrong with a query."""
    faults = _unbalanced(expr)
    for name, matchers, window in re.findall(
        r"\b(emo_serve_\w+|vllm:\w+)(?:\{(.*?)\})?(\[.*?\])?", expr
    ):
        if name.startswith("emo_serve_"):
            faults += _unknown(name, matchers)
        if bool(window) != name.endswith(("_total", "_bucket", "_sum", "_count")):
            faults.append(f"{name} is a counter without a range, or a gauge with one")
    bare = re.sub(r"\{.*?\}|\[.*?\]|\"[^\"]*\"", " ", expr)
    for labels in re.findall(r"\b(?:by|on) \((.*?)\)", bare):
        faults += _unknown_groups(expr, labels)
    bare = re.sub(r"\b(?:by|on) \(.*?\)", " ", bare)
    words = set(re.findall(r"[A-Za-z_:][\w:]*", bare))
    faults += [
        f"{w} is no function, word or metric"
        for w in words - WORDS
        if not w.startswith(("emo_serve_", "vllm:"))
    ]
    for function, argument in re.findall(r"\b(rate|increase)\(([^()]*)\)", expr):
        if not argument.endswith("]"):
            faults.append(f"{function} of something without a range")
    return faults


def _unbalanced(expr: str) -> list[str]:
    closing, open_brackets = {")": "(", "}": "{", "]": "["}, []
    for character in re.sub(r"\"[^\"]*\"", "", expr):
        if character in "({[":
            open_brackets.append(character)
        elif character in closing and (
            not open_brackets or open_brackets.pop() != closing[character]
        ):
            return ["brackets do not match"]
    return ["brackets do not match"] if open_brackets else []


def _unknown(name: str, matchers: str) -> list[str]:
    if name not in SERIES:
        return [f"{name} does not exist"]
    faults = []
    for label, operator, value in re.findall(r"(\w+)(=~|!~|!=|=)\"(.*?)\"", matchers):
        if label not in SERIES[name].keys() | TARGET_LABELS:
            faults.append(f"{name} has no label {label}")
        elif label not in OPEN_LABELS:
            wanted = value.split("|") if operator in ("=~", "!~") else [value]
            missing = set(wanted) - SERIES[name][label]
            faults += [f"{name} is never {label}={other}" for other in sorted(missing)]
    return faults


def _unknown_groups(expr: str, labels: str) -> list[str]:
    known = set(TARGET_LABELS)
    for name in re.findall(r"\b(?:emo_serve_\w+|vllm:\w+)", expr):
        known |= {"le"} if name.startswith("vllm:") else set(SERIES.get(name, ()))
    return [f"nothing has the label {label}" for label in labels.split(", ") if label not in known]


# -- queries --


@pytest.mark.parametrize(("title", "expr"), QUERIES, ids=lambda value: value[:40])
def test_a_query_asks_for_what_there_is(title: str, expr: str) -> None:
    assert find_faults(expr) == []


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("sum(emo_serve_slots", "brackets"),
        ("sum(emo_serve_slot)", "does not exist"),
        ('rate(emo_serve_requests_total{user="x"}[5m])', "no label user"),
        ('rate(emo_serve_requests_total{outcome="done"}[5m])', "never outcome=done"),
        ('rate(emo_serve_refused_requests_total{reason=~"draining|tired"}[5m])', "reason=tired"),
        ("sum by (tier) (emo_serve_slots)", "label tier"),
        ("rate(emo_serve_requests_total)", "without a range"),
        ("sum(emo_serve_slots[5m])", "gauge with one"),
        ("median(emo_serve_slots)", "median is no function"),
    ],
)
def test_a_fault_is_found(expr: str, fault: str) -> None:
    assert any(fault in found for found in find_faults(expr))


def test_a_legend_names_only_labels_that_the_query_keeps() -> None:
    for title, expr, legend in dashboard_queries():
        kept = {label for group in re.findall(r"by \((.*?)\)", expr) for label in group.split(", ")}
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept, title


def test_every_metric_of_ours_is_on_the_dashboard_or_an_alert() -> None:
    used = set(re.findall(r"emo_serve_\w+", " ".join(expr for _, expr in QUERIES)))
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    ours = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in SERIES}
    assert {name for name in ours if f"{name}_total" not in ours} == shown


def test_vllms_metrics_are_those_of_the_installed_vllm() -> None:
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    source = "".join(
        path.read_text() for path in (Path(spec.origin).parent / "v1" / "metrics").glob("*.py")
    )
    for name in set(re.findall(r"vllm:\w+", json.dumps(DASHBOARD))):
        base = re.sub(r"_(total|bucket|sum|count)$", "", name)
        assert f'"{base}"' in source, name


# -- files --


def test_every_yaml_parses() -> None:
    for path in [*DEPLOY.rglob("*.yml"), *DEPLOY.rglob("*.yaml")]:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_alerts_say_what_to_do_and_their_names_are_unique() -> None:
    names = [rule["alert"] for rule in alert_rules()]
    assert len(set(names)) == len(names)
    for rule in alert_rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_compose_mounts_and_builds_what_is_there() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, service in COMPOSE["services"].items():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"{name} mounts {source}"
            else:
                assert source in COMPOSE["volumes"], f"{name} mounts {source}"
        if "build" in service:
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).exists()
            assert f"AS {service['build']['target']}\n" in dockerfile
        for other in service.get("depends_on", []):
            assert other in COMPOSE["services"]


def test_prometheus_scrapes_the_server_by_the_name_and_port_it_has() -> None:
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    servers = [s for s in COMPOSE["services"].values() if s["image"].startswith("emo-serve")]
    assert len(servers) == 2
    for server in servers:
        assert host in server["networks"]["default"]["aliases"]
        assert server["ports"][0].endswith(f":{port}")
    assert f'job="{job["job_name"]}"' in (DEPLOY / "alerts.yml").read_text()
    assert all((DEPLOY / path).exists() for path in prometheus["rule_files"])


def test_the_dashboard_is_provisioned_with_its_data_source() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())
    boards = yaml.safe_load((provisioning / "dashboards/emo-serve.yml").read_text())
    mounts = [m.split(":")[:2] for m in COMPOSE["services"]["grafana"]["volumes"]]
    assert ["./grafana/dashboards", boards["providers"][0]["options"]["path"]] in mounts
    uid = source["datasources"][0]["uid"]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == uid
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "targets" in panel} == {
        "${datasource}"
    }


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not mine & cells and place["x"] + place["w"] <= 24
        cells |= mine
