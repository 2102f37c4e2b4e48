"""deploy/kubernetes agrees with itself, with the server, and with what the command prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from emo_serve.cli import cluster
from emo_serve.cli.main import main
from emo_serve.config import ServeSettings

ROOT = Path(__file__).resolve().parents[3]
FILES = ROOT / "deploy" / "kubernetes"
README = (FILES / "README.md").read_text()
DEPLOYMENT = yaml.safe_load((FILES / "deployment.yaml").read_text())
SERVICE = yaml.safe_load((FILES / "service.yaml").read_text())
POOL = yaml.safe_load((FILES / "inferencepool.yaml").read_text())
(CONTAINER,) = DEPLOYMENT["spec"]["template"]["spec"]["containers"]


def test_the_manifest_is_what_the_command_in_the_readme_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "check_replica_flags", lambda *_, **__: None)
    found = re.search(r"^    emo-serve (cluster config .*)$", README, re.M)
    assert found is not None
    assert main(found[1].split()) == 0
    assert capsys.readouterr().out == (FILES / "rayservice.yaml").read_text()


def test_the_readme_names_every_file() -> None:
    files = {path.name for path in FILES.iterdir()} - {"README.md"}
    assert files == set(re.findall(r"^\| `([\w.]+)`", README, re.M))


def test_pool_and_service_select_the_pods() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert POOL["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["selector"] == labels


def test_ports_agree() -> None:
    (port,) = CONTAINER["ports"]
    assert [target["number"] for target in POOL["spec"]["targetPorts"]] == [port["containerPort"]]
    assert SERVICE["spec"]["ports"][0]["targetPort"] == port["name"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[name]["httpGet"]["port"] == port["name"]


def test_probes_ask_open_paths() -> None:
    open_paths: Any = ServeSettings.__dataclass_fields__["open_paths"].default
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[name]["httpGet"]["path"] in open_paths


def test_a_pod_may_drain() -> None:
    flags = CONTAINER["args"]
    drain = float(flags[flags.index("--drain-timeout") + 1])
    assert DEPLOYMENT["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= drain + 10
