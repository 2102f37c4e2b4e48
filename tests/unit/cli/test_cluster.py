"""`emo-serve cluster`: which arguments are whose, what is printed, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from emo_serve.cli import cluster
from emo_serve.cli.cluster import split_arguments
from emo_serve.cli.main import main
from emo_serve.cli.rendering.fleet import fleet_table


@pytest.mark.parametrize(
    ("arguments", "ours", "others"),
    [
        ("pools list", "pools list", ""),
        ("cluster status --server u", "cluster status --server u", ""),
        ("cluster serve m --replicas 2 --dtype x", "cluster serve --replicas 2", "m --dtype x"),
        ("cluster serve --port=1 -tp 2", "cluster serve --port=1", "-tp 2"),
        ("cluster config --kubernetes --a b", "cluster config --kubernetes", "--a b"),
        ("cluster serve --replicas", "cluster serve --replicas", ""),
    ],
)
def test_arguments_are_the_commands_or_the_servers(arguments: str, ours: str, others: str) -> None:
    assert split_arguments(arguments.split()) == (ours.split(), others.split())


def config_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["cluster", "config", *arguments]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_config_passes_the_servers_flags_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "pools").mkdir()
    flags = ("--replicas", "1..3", "--pools", "pools", "--expert-slots=16", "--drain-timeout", "7")
    document = config_of(capsys, "model", *flags)
    (application,) = document["applications"]
    args = application["args"]
    assert args["argv"][:3] == [str(tmp_path / "model"), "--pools", str(tmp_path / "pools")]
    assert args["argv"][3:] == [
        *("--expert-slots=16", "--drain-timeout", "7", "--host", "0.0.0.0", "--port", "8000"),
    ]
    assert (args["min_replicas"], args["max_replicas"], args["drain_seconds"]) == (1, 3, 7.0)


def test_a_manifest_needs_to_know_what_a_pod_gets(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = config_of(capsys, "--kubernetes", "--cpus", "4", "--image", "registry/emo:1")
    assert manifest["kind"] == "RayService"
    assert "registry/emo:1" in str(manifest)
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    assert main(["cluster", "config", "--kubernetes"]) == 2
    assert "--cpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--replicas", "0"), "--replicas is '0'"),
        (("--expert-slots", "x"), "--expert-slots is 'x'"),
        (("--uds", "/tmp/x"), "--uds does not apply"),
        (("--ssl-keyfile=k",), "--ssl-keyfile does not apply"),
        (("--cpus", "-1"), "--cpus is -1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    for command in ("config", "serve"):
        assert main(["cluster", command, *arguments]) == 2
        out, err = capsys.readouterr()
        assert words in err
        assert (out, err.count("\n")) == ("", 1)


def test_serve_without_ray_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("ray", "emo_serve.ray_cluster.on_machine"):
        monkeypatch.setitem(sys.modules, module, None)
    prepare = "emo_serve.ray_cluster.environment.prepare_environment"
    monkeypatch.setattr(prepare, lambda *, is_alone: None)
    assert main(["cluster", "serve"]) == 2
    assert "emo-serve[cluster]" in capsys.readouterr().err


class OneServer:
    """A server's client with one answer."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer

    def __enter__(self) -> OneServer:
        return self

    def __exit__(self, *_: object) -> None: ...

    def list_pools(self) -> dict[str, Any]:
        return self.answer


REPLICA = {
    "resident": ["base", "math"],
    "pinned": [],
    "slots": {"used": 3, "total": 8},
    "running_requests": 1,
    "waiting_requests": 0,
}
ANSWER = {"replicas": {"b2": REPLICA, "a1": REPLICA}, "running_requests": 2, "waiting_requests": 0}


def test_status_shows_each_replica(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "server_of", lambda _: OneServer(ANSWER))
    assert main(["cluster", "status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["a1", "1", "0", "3/8", "-", "base,math"]
    assert lines[-1].endswith("2 running, 0 waiting")
    assert fleet_table(ANSWER) == "\n".join(lines)
    assert main(["cluster", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ANSWER


def test_status_of_one_server_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "server_of", lambda _: OneServer({"data": []}))
    assert main(["cluster", "status"]) == 2
    assert "one server, not a cluster" in capsys.readouterr().err
