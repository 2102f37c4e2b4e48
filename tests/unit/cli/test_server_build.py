"""`emo-serve pools build --server` as a user types it, over HTTP to a builder without vLLM."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter

from emo_serve.cli import server_build
from emo_serve.server.pool_admin.api import create_router
from emo_serve.server.pool_admin.feed import ResidencyFeed
from emo_serve.server.pool_admin.live import create_live_router
from tests.support.build_world import K, World, texts
from tests.support.golden.checkpoints import write_checkpoint
from tests.unit.cli.test_pools import run
from tests.unit.cli.test_pools_of_server import API, Cli, Served, cli_of, to_http_error
from tests.unit.cli.test_progress import Terminal


class Building(Served):
    """A server whose engine is the reference model."""

    def __init__(self, directory: Path, world: World) -> None:
        self.world = world
        super().__init__(directory)

    def _router(self) -> APIRouter:
        self.service = self.world.service
        router = APIRouter()
        router.include_router(create_router(self.service, to_http_error, self.world.builder))
        feed = ResidencyFeed(self.service.statuses, look_seconds=0.01, pause_seconds=0.01)
        router.include_router(create_live_router(self.service.statuses, feed, to_http_error))
        return router


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("dense-first", tmp_path_factory.mktemp("golden"))


@pytest.fixture
def served(tmp_path: Path, directory: Path) -> Iterator[Building]:
    with closing(Building(tmp_path, World(directory))) as served:
        yield served


@pytest.fixture
def cli(
    served: Building, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """Run a build against the server; return status, stdout and stderr."""
    return cli_of(served, monkeypatch, capsys, "build")


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "math.jsonl"
    path.write_text("".join(f"{json.dumps({'text': example.text})}\n" for example in texts()))
    return path


def test_the_server_builds_what_the_offline_build_finds(
    served: Building, cli: Cli, examples: Path
) -> None:
    status, out, err = cli("math", "--examples", examples, "--experts", K, "--description", "sums")
    assert (status, err) == (0, "")
    expected = served.world.offline()
    pool = served.service.lookup.find("math")
    assert pool.expert_ids == expected.pool("math").expert_ids
    assert pool.description == "sums"
    assert expected.coverage is not None
    lines = out.splitlines()
    assert lines[:5] == [
        "built        version 1, not stored: lasts until the server stops",
        "pool         math, 6 experts per layer in 2 MoE layers",
        f"server       {served.url}",
        "found by     layerwise, 3 documents, 90 tokens",
        f"coverage     {expected.coverage:.3f} of the router's mass is inside, mean over tokens and"
        f" MoE layers (lowest: layer 1, {expected.layers[1].coverage:.3f})",  # type: ignore[union-attr]
    ]
    assert lines[5].startswith("took")
    assert lines[6].startswith("note: 90 tokens are little text")
    assert lines[-1] == 'then ask:    "model": "math"'
    status, out, err = cli("math", "--examples", examples, "--experts", K)
    assert (status, "replace=true" in err) == (2, True)
    status, out, err = cli("math", "--examples", examples, "--experts", K, "--replace")
    assert (status, err, out.splitlines()[0][:22]) == (0, "", "built        version 2")


def test_a_terminal_sees_how_far_the_server_is(
    cli: Cli, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        status, out, _ = cli("math", "--examples", examples, "--experts", K)
    assert (status, out.splitlines()[0][:15]) == (0, "built        ve")
    assert "building math: " in terminal.getvalue()


class Following:
    """A server that says what happens."""

    def __init__(self, *events: tuple[str, Any]) -> None:
        self._events = events

    def follow(self) -> Any:
        return nullcontext(iter(self._events))


def test_the_stream_tells_of_our_pool_until_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def building(name: str, done: int) -> tuple[str, Any]:
        return "pools", {"building": {"name": name, "done": done, "total": 8}}

    server = Following(
        ("slots", {}),
        ("pools", {"building": None}),
        building("law", 7),
        building("math", 0),
        ("slots", {}),
        building("math", 5),
        ("pools", {"building": None}),
        building("math", 99),
    )
    monkeypatch.setattr(server_build, "server_of", lambda arguments: nullcontext(server))
    told: list[tuple[int, int]] = []
    arguments, is_over = argparse.Namespace(name="math"), threading.Event()
    server_build._follow(arguments, lambda *news: told.append(news), is_over)
    assert told == [(0, 8), (5, 8)]
    is_over.set()
    server_build._follow(arguments, lambda *news: told.append(news), is_over)
    assert len(told) == 2


def test_chats_and_whole_files_are_sent_as_they_are(
    served: Building, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}], "id": 1}\n'
    )
    status, _, err = cli(
        "math", "--examples", tmp_path / "a.txt", tmp_path / "b.jsonl", "--experts", K
    )
    assert (status, err) == (0, "")
    ((name, learned),) = served.world.learned
    assert name == "math"
    assert learned[0].text == "one\n\ntwo\n"
    assert learned[1].messages == ({"role": "user", "content": "hi"},)


REFUSED = [
    (("--model", "somewhere"), "--model is for a build from a checkpoint and --server is not"),
    (("--out", "x.json"), "--out is for a build from a checkpoint"),
    (("--seed", "0"), "--seed is for a build from a checkpoint"),
    (
        ("--method", "easy-ep"),
        "a server builds only by layerwise or router; for --method easy-ep give --model DIR",
    ),
    (("--experts", "25"), "a pool of 25 experts per layer is more than the model has"),
    (("--examples", "nothing.txt"), "nothing.txt cannot be read"),
    (("--timeout", "0"), "--timeout is 0"),
    (("--api-key", API), "set EMO_SERVE_ADMIN_API_KEY"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_in_one_line(
    served: Building, cli: Cli, examples: Path, flags: tuple[str, ...], message: str
) -> None:
    status, out, err = cli("math", "--examples", examples, "--experts", K, *flags)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert served.world.probe.calls == 0


def test_a_server_needs_a_name_and_examples(
    served: Building, cli: Cli, examples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "name is 'a+b'" in cli("a+b", "--examples", examples, "--experts", K)[2]
    assert "give --examples FILE" in cli("math", "--experts", K)[2]
    assert run("build", "math", "--examples", str(examples), "--experts", "6", "--replace") == 2
    assert "--replace needs a server" in capsys.readouterr().err
