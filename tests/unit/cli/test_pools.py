"""`emo-serve pools` as a user types it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from emo_serve.cli import pools as commands
from emo_serve.cli.model_flag import KnownModel
from emo_serve.facts import MoeLayer
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolCalibration

MODEL = (None, MoeLayer(num_experts=12, num_shared_experts=1, always_active=(), top_k=4))


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="emo-serve")
    commands.add_pools_parser(parser.add_subparsers())
    parsed = parser.parse_args(["pools", *arguments])
    status = parsed.run(parsed)
    assert isinstance(status, int)
    return status


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    scores = tuple(float(expert) for expert in range(12))
    made = PoolCalibration("router", 20, 5120)
    math = ExpertPool("math", (None, LayerExperts((1, 3, 9), scores)), calibration=made)
    write_pool(math, tmp_path / "math.json")
    write_pool(
        ExpertPool("code", (None, LayerExperts((2,))), router_temperature=0.5),
        tmp_path / "code.json",
    )
    return tmp_path


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> str:
    """Answer --model without a checkpoint."""
    opened = KnownModel(MODEL, "fed", 2**19)
    monkeypatch.setattr(KnownModel, "open", classmethod(lambda cls, path: opened))
    return "--model=some-directory"


def test_list_prints_one_aligned_row_a_pool(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", str(directory)) == 0
    out, err = capsys.readouterr()
    header, code, math = out.splitlines()
    assert code.split()[:4] == ["code", "1", "1", "0.5"]
    assert "router, 20 documents, 5120 tokens" in math
    assert math.index("router") == header.index("CALIBRATION")
    assert err == ""


def test_list_with_a_model_counts_implied_experts_and_their_size(
    directory: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", str(directory), model) == 0
    header, code, math = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["POOL", "EXPERTS/LAYER", "TOTAL"]
    assert code.split()[:4] == ["code", "2", "2", "1.0"]
    assert math.split()[:4] == ["math", "4", "4", "2.0"]


def test_refused_files_go_to_stderr_with_status_2(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "bad.json").write_text("{")
    assert run("list", str(directory)) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert err.startswith(f"emo-serve: refused {directory / 'bad.json'}: ")
    assert run("show", str(directory / "bad.json")) == 2


def test_an_empty_and_an_absent_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", str(tmp_path)) == 0
    assert "no pool files" in capsys.readouterr().out
    assert run("list", str(tmp_path / "absent")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_show_draws_layers_by_experts(
    directory: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", str(directory / "math.json"), model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "         0       8",
        "layer 0  dense",
        "layer 1  .#.#.....#.+",
    ]
    assert "experts      4 per layer, 4 in all, 2.0 MiB" in lines


def test_show_works_without_the_model_and_on_a_directory(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", str(directory)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layer 1  .#.#.....#.." in lines  # as many as there are scores
    assert "layer 1  ..#" in lines  # as many as there must be


def test_a_default_size_is_shown_where_the_model_is_not_known(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pool(with_default(directory), directory / "math.json")
    assert run("list", str(directory)) == 0
    assert "math  3 (default 2)" in capsys.readouterr().out
    assert run("show", str(directory / "math.json")) == 0
    assert "served at    2 per layer by default" in capsys.readouterr().out


def test_a_default_size_is_what_the_model_would_serve(
    directory: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pool(with_default(directory), directory / "math.json")
    assert run("show", str(directory / "math.json"), model) == 0
    out = capsys.readouterr().out
    assert "experts      2 per layer, 2 in all" in out
    assert out.splitlines()[-1] == "layer 1  ..........#+"


def with_default(directory: Path) -> ExpertPool:
    return replace(read_pool(directory / "math.json"), default_experts=2)


def test_import_writes_a_pool_file(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata, out = tmp_path / "pruning_metadata.json", tmp_path / "law.json"
    metadata.write_text(json.dumps({"experts_kept_per_layer": [None, [2, 11]]}))
    assert run("import", str(metadata), "--name", "law", "--out", str(out), model) == 0
    assert "pool law, 2 experts per layer (fits" in capsys.readouterr().out
    assert read_pool(out).expert_ids == ((), (2, 11))


def test_import_refuses_what_does_not_fit_and_writes_nothing(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata, out = tmp_path / "pruning_metadata.json", tmp_path / "law.json"
    metadata.write_text(json.dumps({"experts_kept_per_layer": [None, [2, 12]]}))
    assert run("import", str(metadata), "--name", "law", "--out", str(out), model) == 2
    assert "layer 1: an expert is 12" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", ["list", "compare"])
def test_a_pool_command_without_a_model_imports_nothing_heavy(
    command: str, directory: Path
) -> None:
    program = (
        "import argparse, sys\n"
        "from emo_serve.cli.pools import add_pools_parser\n"
        "parser = argparse.ArgumentParser()\n"
        "add_pools_parser(parser.add_subparsers())\n"
        "arguments = parser.parse_args(['pools', *sys.argv[1:]])\n"
        "status = arguments.run(arguments)\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(status or ', '.join(heavy) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, command, str(directory)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
