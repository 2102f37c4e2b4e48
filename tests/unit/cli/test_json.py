"""--json of every listing: the values of its tables, for programs."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from emo_serve import demo
from emo_serve.cli import model_flag
from emo_serve.server.startup import checkpoint as hub
from emo_serve.vllm_plugin.contract import PoolUsage
from tests.support.pool_services import EXPERTS_PER_LAYER
from tests.unit.cli.test_pools import run
from tests.unit.cli.test_pools_of_server import Served, cli_of

MODEL, POOLS = str(demo.model_dir()), str(demo.pools_dir())


def answer(capsys: pytest.CaptureFixture[str], *line: str) -> Any:
    assert run(*line, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_list_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    listed = answer(capsys, "list", POOLS, "--model", MODEL)
    pools = {pool["name"]: pool for pool in listed["data"]}
    assert {"math", "python"} <= set(pools)
    python = pools["python"]
    assert (python["object"], python["has_scores"]) == ("pool", True)
    assert python["experts_per_layer"] == [8, 8, 8, 8]
    assert python["bytes"] % 32 == 0 and python["calibration"]["method"]
    assert (listed["refused"], "experts" in python) == ([], False)
    assert answer(capsys, "list", POOLS)["data"][0]["bytes"] is None


def test_a_refused_file_is_in_the_list_and_in_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{")
    assert run("list", str(tmp_path), "--json") == 2
    listed = json.loads(capsys.readouterr().out)
    assert listed["data"] == []
    assert "bad.json" in listed["refused"][0]


def test_show_has_the_experts(capsys: pytest.CaptureFixture[str]) -> None:
    one = answer(capsys, "show", f"{POOLS}/python.json")
    assert [len(ids) for ids in one["experts"]] == one["experts_per_layer"]
    assert {pool["name"] for pool in answer(capsys, "show", POOLS)} >= {"math", "python"}


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    compared = answer(capsys, "compare", POOLS, "--model", MODEL)
    count = len(compared["pools"])
    assert [len(row) for row in compared["similarity"]] == [count] * count
    assert [need["pools"] for need in compared["slots"]] == list(range(1, count + 1))
    assert compared["slots"][-1]["best_pools"] == compared["pools"]
    assert compared["slots"][-1]["best_bytes"] > compared["slots"][0]["best_bytes"] > 0
    assert answer(capsys, "compare", POOLS)["slots"][0]["any_bytes"] is None


def test_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Served(tmp_path)) as served:
        counts = tuple((3,) * number for number in EXPERTS_PER_LAYER)
        served.usage["math"] = PoolUsage(9, counts)
        cli = cli_of(served, monkeypatch, capsys)
        listed = json.loads(cli("list", "--json")[1])
        shown = json.loads(cli("show", "math", "--json")[1])
        used = json.loads(cli("usage", "math", "--json")[1])
        unused = json.loads(cli("usage", "law", "--json")[1])
    assert [card["name"] for card in listed["data"]] == ["base", "code", "law", "math"]
    assert listed["slots"]["total"] > 0
    assert shown["experts"] == [[], [0, 1, 7], [0, 1, 7]]
    assert (used["tokens"], unused["tokens"]) == (9, 0)


def test_a_model_may_be_named_as_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return MODEL

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    facts = model_flag.KnownModel.open("allenai/some-model")
    assert asked == ["allenai/some-model"]
    assert facts.experts_per_layer == [32, 32, 32, 32]
    assert hub.resolve_checkpoint(MODEL, None, None, None) == Path(MODEL).resolve()
