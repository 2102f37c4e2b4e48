"""`emo-serve pools export` and `compare` as a user types them, on the model and pools that ship."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emo_serve import demo
from emo_serve.cli import plots as heat_maps
from emo_serve.emo.checkpoint import load_model
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.document import read_pool, write_pool
from tests.support.golden.checkpoints import RENAMED, write_checkpoint
from tests.unit.cli.test_pools import run

MODEL, POOLS = str(demo.model_dir()), demo.pools_dir()


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


# -- export --


def test_export_by_name_then_import_gives_the_same_pool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    status = run("export", "python", "--pools", str(POOLS), "--model", MODEL, "--out", out)
    assert status == 0
    assert lines_of(capsys) == [
        f"wrote {out}: pool python, 8 of 32 experts per layer, 5.7 MiB of weights in 1 file"
    ]
    back = str(tmp_path / "back.json")
    metadata = str(tmp_path / "out" / "pruning_metadata.json")
    assert run("import", metadata, "--name", "python", "--out", back, "--model", MODEL) == 0
    shipped = read_pool(POOLS / "python.json")
    assert read_pool(Path(back)).content_hash == shipped.content_hash


def test_export_of_a_file_computes_what_the_pool_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = str(POOLS / "spanish.json")
    assert run("export", file, "--model", MODEL, "--out", str(out)) == 0
    ids = torch.arange(2, 42)[None]
    kept = read_pool(POOLS / "spanish.json").expert_ids
    mask = [torch.isin(torch.arange(32), torch.tensor(experts)) for experts in kept]
    with torch.no_grad():
        want = load_model(MODEL)(ids, mask)
        got = load_model(out)(ids)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (out / "tokenizer.json").read_bytes() == (Path(MODEL) / "tokenizer.json").read_bytes()


def test_build_and_export_of_a_model_under_its_older_name(tmp_path: Path) -> None:
    model = str(write_checkpoint("shared1", tmp_path / "model", **RENAMED))
    pool, out = tmp_path / "p.json", tmp_path / "out"
    build = ["build", "p", "--method", "random", "--experts", "8", "--model", model]
    assert run(*build, "--out", str(pool)) == 0
    assert run("export", str(pool), "--model", model, "--out", str(out)) == 0
    ids = torch.arange(2, 42)[None]
    mask = [torch.isin(torch.arange(32), torch.tensor(e)) for e in read_pool(pool).expert_ids]
    with torch.no_grad():
        want, got = load_model(model)(ids, mask), load_model(out)(ids)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    fields = json.loads((out / "config.json").read_text())
    assert fields["model_type"] == RENAMED["model_type"]


def test_export_of_a_union(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run("export", "python+c", "--pools", str(POOLS), "--model", MODEL, "--out", out) == 0
    (line,) = lines_of(capsys)
    assert "pool c+python, 11-14 of 32 experts per layer" in line
    united = PoolCatalog.read(POOLS).resolve("c+python")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts_per_layer"] == [len(ids) for ids in united.expert_ids]


def test_export_of_a_size_and_of_a_default_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(read_pool(POOLS / "c.json"), default_experts=4)
    write_pool(small, tmp_path / "c.json")
    for pool, directory in (("c@4", POOLS), ("c", tmp_path), (str(tmp_path / "c.json"), None)):
        out = tmp_path / f"out-of-{directory and directory.name}"
        pools = ["--pools", str(directory)] if directory else []
        assert run("export", pool, *pools, "--model", MODEL, "--out", str(out)) == 0
        (line,) = lines_of(capsys)
        assert "4 of 32 experts per layer" in line
        kept = json.loads((out / "pruning_metadata.json").read_text())["experts_kept_per_layer"]
        assert kept == [list(ids) for ids in PoolCatalog.read(POOLS).resolve("c@4").expert_ids]


def test_export_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--model", MODEL, "--out", str(tmp_path / "out")]
    for arguments, message in (
        (["python", *out], "python is not a file; to name a pool, give"),
        (["cobol", "--pools", str(POOLS), *out], "there is no pool 'cobol'; the pools are: arith"),
        ([str(POOLS / "c.json"), "--model", MODEL, "--out", str(POOLS)], "is not empty"),
        (
            [str(POOLS / "c.json"), "--model", str(POOLS), "--out", "x"],
            "config.json does not exist",
        ),
    ):
        assert run("export", *arguments) == 2
        out_text, err = capsys.readouterr()
        assert out_text == ""
        assert err.startswith("emo-serve: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_export_says_why_a_pools_file_was_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{")
    out = str(tmp_path / "out")
    assert run("export", "bad", "--pools", str(tmp_path), "--model", MODEL, "--out", out) == 2
    refused, unknown = capsys.readouterr().err.splitlines()
    assert refused.startswith(f"emo-serve: refused {tmp_path / 'bad.json'}: ")
    assert "there is no pool 'bad'; the pools are: none" in unknown


# -- compare --


def test_compare_of_the_shipped_pools(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", str(POOLS), "--model", MODEL) == 0
    lines = lines_of(capsys)
    assert lines[0] == "10 pools, 4 MoE layers, 8 of 32 experts per layer"
    assert "most similar: c and html, 0.83 (layers 0.78 to 1.00)" in lines
    assert "least similar: c and spanish, 0.07 (layers 0.07 to 0.07)" in lines
    assert any(line.split() == ["0", "32", "32", "1", "0.19", "0.07", "0.78"] for line in lines)
    assert any(line.split()[:5] == ["2", "15", "4.2", "9", "2.5"] for line in lines)
    assert lines[-1].startswith("all together: --expert-slots 32, or --expert-memory 9437184 ")


def test_compare_without_the_model_counts_the_same_slots(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("compare", str(POOLS)) == 0
    lines = lines_of(capsys)
    assert "MIB" not in "".join(lines)
    assert any(line.split()[:3] == ["2", "15", "9"] for line in lines)
    assert lines[-1] == "all together: --expert-slots 32 (give --model to see the bytes)"


def test_compare_cuts_first_when_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", str(POOLS), "--model", MODEL, "--experts", "4") == 0
    lines = lines_of(capsys)
    assert lines[0] == "10 pools, 4 MoE layers, 4 of 32 experts per layer"
    assert any(line.split()[:2] == ["2", "7"] for line in lines)
    assert run("compare", str(POOLS), "--model", MODEL, "--experts", "0") == 2
    assert "cannot cut pool 'arithmetic' to 0" in capsys.readouterr().err


def test_compare_shows_the_pools_it_can_and_reports_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("c", "html"):
        write_pool(read_pool(POOLS / f"{name}.json"), tmp_path / f"{name}.json")
    (tmp_path / "bad.json").write_text("{")
    assert run("compare", str(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out.startswith("2 pools, ")
    assert err.startswith("emo-serve: refused ")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("compare", str(empty)) == 0
    assert "no pool files" in capsys.readouterr().out


def test_compare_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    png = tmp_path / "pools.png"
    assert run("compare", str(POOLS), "--png", str(png)) == 0
    assert lines_of(capsys)[-1] == f"drew {png}"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert run("compare", str(POOLS), "--png", str(tmp_path / "absent" / "x.png")) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_compare_without_matplotlib_refuses_before_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("compare", str(POOLS), "--png", str(tmp_path / "x.png")) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "pip install 'emo-serve[plot]'" in err
    assert run("compare", str(POOLS)) == 0  # the table needs none
    assert heat_maps.__name__ in sys.modules
