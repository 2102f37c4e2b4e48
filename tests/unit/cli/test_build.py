"""`emo-serve pools build` and `cut` as a user types them."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from emo_serve import demo
from emo_serve.cli import main as cli
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.calibration import METHODS
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolModel
from tests.support.golden.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("dense-first", tmp_path_factory.mktemp("golden"))


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"text": "one " * 90}) + "\n" + json.dumps("two " * 20) + "\n")
    return path


def run(*arguments: object) -> int:
    return cli.main(["pools", *map(str, arguments)])


@pytest.mark.parametrize("method", METHODS)
def test_build_writes_a_pool_that_fits_and_says_what_it_cost(
    golden: Path,
    examples: Path,
    tmp_path: Path,
    method: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "math.json"
    flags = ("--method", method, "--out", out, "--seed", 5, "--description", "sums")
    assert (
        run("build", "math", "--model", golden, "--examples", examples, "--experts", 6, *flags) == 0
    )
    pool, checkpoint = read_pool(out), Checkpoint.open(golden)
    pool.check_fits(checkpoint.config.moe_layers, checkpoint.fingerprint(), "out")
    assert [len(ids) for ids in pool.expert_ids] == [0, 6, 6]
    assert pool.description == "sums"
    assert pool.model == PoolModel(golden.name, checkpoint.fingerprint(), ((), (22, 23), (0, 11)))
    assert pool.calibration is not None
    assert vars(pool.calibration) == {
        "method": method,
        "documents": 2,
        "tokens": 440,
        "seed": 5,
        "experts": 6,
    }
    printed, err = capsys.readouterr()
    assert err == "", "no bar where stderr is no terminal"
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines() if line[:1].isalpha())
    assert lines["wrote"].strip() == str(out)
    assert "of the router's mass is inside" in lines["coverage"]
    read = {"layerwise": "6 of 36, at most 6", "random": "6 of 36, at most 6"}
    if method in read:
        assert f"experts read {read[method]} per layer, one in memory at a time" in printed
    assert "peak memory" in printed
    assert f"emo-serve serve {golden} --pools {tmp_path}" in printed
    assert f"emo-serve pools add {out} --server URL" in printed
    assert '"model": "math"' in printed


def test_without_a_model_the_shipped_one_is_used_and_names_have_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text(demo.heldout("math")[0])
    monkeypatch.chdir(tmp_path)
    assert run("build", "mine", "--examples", "one.txt", "--experts", 8) == 0
    checkpoint = Checkpoint.open(demo.model_dir())
    pool = read_pool(Path("mine.json"))
    pool.check_fits(checkpoint.config.moe_layers, checkpoint.fingerprint(), "mine")
    assert pool.calibration is not None
    assert (pool.calibration.method, pool.calibration.documents) == ("layerwise", 1)
    assert "note" not in capsys.readouterr().out


def test_random_needs_no_examples(golden: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{seed}.json" for seed in (1, 1, 2)]
    for seed, out in zip((1, 1, 2), outs, strict=True):
        flags = ("--experts", 6, "--method", "random", "--seed", seed, "--out", out)
        assert run("build", "control", "--model", golden, *flags) == 0
    first, again, other = (read_pool(out).expert_ids for out in outs)
    assert first == again != other


def test_little_text_and_cut_documents_are_noted(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "long.txt").write_text("x" * 600)
    for name, note in (
        ("short", "note: 5 tokens are little text: with fewer than 192"),
        (
            "long",
            "note: 1 of 1 documents are longer than the model's context of 512 tokens: at least 88",
        ),
    ):
        out = tmp_path / f"{name}.json"
        flags = ("--experts", 6, "--out", out)
        assert (
            run("build", name, "--model", golden, "--examples", tmp_path / f"{name}.txt", *flags)
            == 0
        )
        assert note in capsys.readouterr().out


REFUSED = [
    (
        ("--experts", 25),
        "a pool of 25 experts per layer is more than the model has: 24 at most (layer 1)",
    ),
    (("--experts", 1), "a pool of 1 experts per layer is too small: layer 1 needs at least 2"),
    (
        ("--experts", 6, "--method", "greedy"),
        "unknown method 'greedy'; give one of layerwise, router",
    ),
    (("--experts", 6, "--seed", -1), "seed is -1; give 0 or more"),
    (("--experts", 6, "--out", "absent/x.json"), "there is no directory absent"),
    (("--experts", 6, "--out", "."), "--out . is a directory"),
    (("--experts", 6, "--model", "./nowhere"), "--model './nowhere' is not a directory"),
    (("--experts", 6, "--examples", "nothing.txt"), "nothing.txt cannot be read"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_build_refuses_in_one_line_and_writes_nothing(
    golden: Path,
    examples: Path,
    tmp_path: Path,
    flags: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run("build", "math", "--model", golden, "--examples", examples, *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("emo-serve: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_build_refuses_a_bad_name_no_examples_and_no_tokenizer(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_checkpoint("shared1", tmp_path / "bare")
    (directory / "tokenizer.json").unlink()
    out = ("--out", tmp_path / "p.json")
    assert run("build", "a+b", "--examples", examples, "--experts", 6, *out) == 2
    assert "name is 'a+b'; expected" in capsys.readouterr().err
    assert run("build", "a", "--experts", 6, *out) == 2
    assert "give --examples FILE; only random needs none" in capsys.readouterr().err
    assert (
        run("build", "a", "--model", directory, "--examples", examples, "--experts", 6, *out) == 2
    )
    assert "tokenizer.json does not exist" in capsys.readouterr().err


def test_a_terminal_sees_a_bar(golden: Path, examples: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-m", "emo_serve", "pools", "build", "math", "--experts", "6"]
    command += ["--model", str(golden), "--examples", str(examples)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "m.json")],
        stderr=theirs,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=True,
    )
    readable, _, _ = select.select([ours], [], [], 0)
    shown = os.read(ours, 10**6) if readable else b""  # before the last writer closes
    os.close(theirs)
    os.close(ours)
    assert b"calibrating" in shown
    assert b"calibrating" not in done.stdout


# -- cut --


def test_a_built_pool_is_cut_by_its_file_alone(
    golden: Path, examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = tmp_path / "math.json"
    flags = ("--model", golden, "--examples", examples, "--out", big)
    assert run("build", "math", *flags, "--experts", 10) == 0
    assert run("cut", big, "--experts", 4) == 0
    assert f"wrote {tmp_path / 'math-4.json'}: pool math-4, 4 experts" in capsys.readouterr().out
    built, cut = read_pool(big), read_pool(tmp_path / "math-4.json")
    assert cut.name == "math-4"
    assert cut.expert_ids == built.cut(4, Checkpoint.open(golden).config.moe_layers).expert_ids
    assert cut.calibration == built.calibration
    assert run("cut", tmp_path / "math-4.json", "--experts", 10, "--name", "again") == 0
    again = read_pool(tmp_path / "again.json")
    assert again.expert_ids == built.expert_ids, "nothing was lost"


def test_the_shipped_pools_can_be_cut(tmp_path: Path) -> None:
    moe_layers = Checkpoint.open(demo.model_dir()).config.moe_layers
    for domain in demo.domains():
        shipped = demo.pools_dir() / f"{domain}.json"
        out = tmp_path / f"{domain}.json"
        assert run("cut", shipped, "--experts", 4, "--out", out) == 0
        expected = read_pool(shipped).cut(4, moe_layers)
        assert read_pool(out).expert_ids == expected.expert_ids


def test_cut_refuses_what_the_file_does_not_allow(
    tmp_path: Path, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, old, new = (tmp_path / f"{name}.json" for name in ("bare", "old", "new"))
    write_pool(ExpertPool("bare", (LayerExperts((1, 2)),)), bare)
    scored = (LayerExperts((1, 2), (0.1, 0.5, 0.3, 0.2)),)
    write_pool(ExpertPool("old", scored), old)
    write_pool(ExpertPool("new", scored, model=PoolModel(implied=((3,),))), new)
    for path, k, message in (
        (
            bare,
            8,
            "bare.json cannot be cut to 8 experts per layer: layer 0 has no scores, only the 2",
        ),
        (
            old,
            2,
            "old.json cannot be cut to 2 experts per layer by itself: it does not list the shared",
        ),
        (new, 5, "new.json cannot be cut to 5 experts per layer: the layers have 4; give fewer"),
        (new, 0, "cannot cut pool 'new' to 0 experts: layer 0 needs at least 1"),
    ):
        assert run("cut", path, "--experts", k) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert run("cut", new, "--experts", 2, "--model", golden) == 2
    assert "the number of layers is 1" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.json", "new.json", "old.json"]
    assert run("cut", new, "--experts", 2) == 0
    assert read_pool(tmp_path / "new-2.json").expert_ids == ((1, 3),)


def test_an_old_file_is_cut_with_the_model(golden: Path, tmp_path: Path) -> None:
    scores = [tuple(float(e) for e in range(count)) for count in (24, 12)]
    layers = (None, LayerExperts((0,), scores[0]), LayerExperts((0,), scores[1]))
    write_pool(ExpertPool("old", layers), tmp_path / "old.json")
    assert run("cut", tmp_path / "old.json", "--experts", 3, "--model", golden) == 0
    assert read_pool(tmp_path / "old-3.json").expert_ids == ((), (21, 22, 23), (0, 10, 11))


def test_parsing_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from emo_serve.cli.main import _parser\n"
        "_parser().parse_args(['pools', 'build', 'a', '--experts', '4'])\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'tqdm', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
