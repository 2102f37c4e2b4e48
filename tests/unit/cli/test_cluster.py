"""`emo-serve cluster`: which arguments are whose, what is printed, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from emo_serve.cli import cluster, replica_flags
from emo_serve.cli.cluster import split_arguments
from emo_serve.cli.main import main
from emo_serve.cli.rendering.fleet import fleet_table
from emo_serve.errors import ConfigError


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[str], bool]]:
    """Note what would be checked by vLLM, and whether with the model."""
    calls: list[tuple[Sequence[str], bool]] = []

    def check(argv: Sequence[str], *, opens_model: bool) -> None:
        calls.append((argv, opens_model))

    monkeypatch.setattr(cluster, "check_replica_flags", check)
    return calls


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
    assert main(["cluster", "config", "--cpus", "4", *arguments]) == 0
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
    assert args["drain_seconds"] == 7.0
    (deployment,) = application["deployments"]
    scaling = deployment["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 3)


def test_a_manifest_says_what_a_pod_gets(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--memory", "32GiB", "--replicas", "2", "--image", "registry/emo:1")
    manifest = config_of(capsys, "--kubernetes", *flags)
    assert manifest["kind"] == "RayService"
    assert "registry/emo:1" in str(manifest)
    (workers,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "32768Mi"}
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    assert application["deployments"] == [{"name": "EmoServe", "num_replicas": 2}]
    assert application["args"]["memory_bytes"] == 0


def test_a_config_needs_to_know_what_a_replica_gets(capsys: pytest.CaptureFixture[str]) -> None:
    (application,) = config_of(capsys, "--memory", "1GiB")["applications"]
    assert application["args"]["memory_bytes"] == 2**30
    for more in ((), ("--kubernetes",)):
        assert main(["cluster", "config", *more]) == 2
        assert "give --cpus or --gpus" in capsys.readouterr().err


# -- the flags of replicas --


@pytest.mark.parametrize(
    ("flags", "is_checked_with_model"), [((), True), (("--address", "auto"), False)]
)
def test_flags_are_checked_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
    checked: list[tuple[Sequence[str], bool]],
    flags: tuple[str, ...],
    is_checked_with_model: bool,
) -> None:
    started: list[int] = []

    def run_fleet(*_: object) -> int:
        started.append(len(checked))
        return 0

    module = SimpleNamespace(run_fleet=run_fleet)
    monkeypatch.setitem(sys.modules, "emo_serve.ray_cluster.on_machine", module)
    prepare = "emo_serve.ray_cluster.environment.prepare_environment"
    monkeypatch.setattr(prepare, lambda *, is_alone: None)
    assert main(["cluster", "serve", "--dtype", "float32", *flags]) == 0
    ((argv, opens_model),) = checked
    assert (list(argv[:2]), opens_model) == (["--dtype", "float32"], is_checked_with_model)
    assert started == [1]


def test_vllm_itself_checks_the_flags_in_a_process_of_its_own() -> None:
    with pytest.raises(ConfigError, match="--no-such-flag"):
        replica_flags.check_replica_flags(["--no-such-flag"], opens_model=False)


@pytest.mark.parametrize(
    ("argv", "opens_model", "words"),
    [
        (["--enable-lora"], False, "--enable-lora is True, which emo-serve does not support yet"),
        (["--expert-slots", "many"], False, "--expert-slots is 'many'"),
        (["/no/such/model"], True, "/no/such/model"),
        (["/no/such/model"], False, ""),
        ([], True, ""),
    ],
)
def test_what_a_replica_would_refuse_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    opens_model: bool,
    words: str,
) -> None:
    monkeypatch.setattr("emo_serve.server.startup.quiet.be_quiet", lambda: None)
    status = replica_flags._check(argv, opens_model)
    lines = capsys.readouterr().out.splitlines()
    assert (status, len(lines)) == ((2, 1) if words else (0, 0))
    assert words in "".join(lines)


@pytest.mark.parametrize(
    ("status", "out", "err", "words"),
    [
        (2, "", "usage: ...\nemo-serve serve: error: argument --dtype: what", "argument --dtype"),
        (1, "", "ImportError: no vLLM on this machine", None),
        (0, "", "", None),
    ],
)
def test_only_a_refusal_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch, status: int, out: str, err: str, words: str | None
) -> None:
    done = SimpleNamespace(returncode=status, stdout=out, stderr=err)
    monkeypatch.setattr(replica_flags.subprocess, "run", lambda *_, **__: done)
    if words is None:
        replica_flags.check_replica_flags([], opens_model=True)
    else:
        with pytest.raises(ConfigError, match=f"^{words}"):
            replica_flags.check_replica_flags([], opens_model=True)


# -- what is refused --


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
