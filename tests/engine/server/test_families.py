"""A model of another family on a real server: everything that is asked of pools, in few slots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.families.cases import write_pools
from benchmarks.families.models import MODELS, write_checkpoint
from benchmarks.families.oracle import Pool, expected_logprobs, pools_of, prompts
from emo_serve.cli import main as cli
from tests.support.server_process import RunningServer, serve

pytestmark = pytest.mark.vllm

FAMILY = "qwen3-moe"  # it has a dense layer, normalises weights, and a width of its own
SLOTS = 9  # pools a, b and c of 8, 4 and 2 experts do not fit together
FLAGS = (
    *("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256"),
    *("--expert-slots", str(SLOTS), "--default-pool", "b", "--preload", "b"),
    *("--enforce-eager", "--auto-tokens", "32"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(FAMILY, tmp_path_factory.mktemp("family") / FAMILY)


@pytest.fixture(scope="module")
def family_server(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("family-server")
    write_pools(pools_of(FAMILY), root / "pools")
    with serve(root, str(checkpoint), "--pools", str(root / "pools"), *FLAGS) as running:
        yield running


def logprobs(client: openai.OpenAI, model: str, ids: list[int]) -> list[float]:
    extra = {"prompt_logprobs": 0}
    answer = client.completions.create(model=model, prompt=ids, max_tokens=1, extra_body=extra)
    entries: Any = answer.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    return [entry[str(t)]["logprob"] for entry, t in zip(entries[1:], ids[1:], strict=True)]


def check(checkpoint: Path, got: list[float], pool: Pool, ids: list[int]) -> None:
    (expected,) = expected_logprobs(FAMILY, checkpoint, {"p": pool}, [ids])["p"]
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 1e-4


def test_pools_are_loaded_evicted_and_joined(
    family_server: RunningServer, checkpoint: Path
) -> None:
    pools, (ids, *_) = pools_of(FAMILY), prompts()
    with family_server.client() as client, family_server.http() as http:
        for name in (*pools, "a", "tiny"):  # a and b evict each other; the model is pool b
            check(
                checkpoint, logprobs(client, name, ids), pools[name if name in pools else "b"], ids
            )
        used = http.get("/v1/pools").json()["slots"]
        assert 0 < used["used"] <= used["total"] == 2 * SLOTS
        cards = [http.get(f"/v1/pools/{name}").json() for name in "ab"]
        assert [card["resident"] for card in cards] == [False, True]
        assert [len(layer) for layer in cards[0]["experts"]] == [8, 0, 8]
        count = MODELS[FAMILY].num_experts
        everything = [list(range(count)) if layer else [] for layer in pools["a"]]
        check(checkpoint, logprobs(client, "base", ids), everything, ids)  # which is streamed


def test_a_pool_is_built_here_and_reports_coverage(
    family_server: RunningServer, checkpoint: Path
) -> None:
    ids = prompts()[0]
    texts = ["def f(x):\n    return x\n", "import os\n\nprint(os.name)\n"]
    with family_server.client() as client, family_server.http() as http:
        body = {"name": "built", "examples": texts, "experts": 4}
        built = http.post("/v1/pools", json=body)
        assert built.is_success, built.text
        assert 0 < built.json()["calibration"]["coverage"] < 1
        card = http.get("/v1/pools/built").json()
        check(checkpoint, logprobs(client, "built", ids), card["experts"], ids)
        raw = client.completions.with_raw_response.create(
            model="built@2", prompt="def", max_tokens=2, extra_headers={"x-emo-coverage": "true"}
        )
        report = json.loads(raw.content)["emo_serve"]
        assert 0 < report["coverage"] < 1 and report["pool"] == "built@2"
        usage = httpx.get(f"{family_server.url}/v1/pools/built/usage").json()
        assert usage["tokens"] >= len(ids)
        auto = client.completions.with_raw_response.create(model="auto", prompt="def", max_tokens=1)
        assert auto.headers["x-emo-pool"] in {*pools_of(FAMILY), "built"}


# -- a dense model --


@pytest.fixture(scope="module")
def dense_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = write_checkpoint("dense", tmp_path_factory.mktemp("dense") / "dense")
    flags = ("--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "256")
    with serve(tmp_path_factory.mktemp("s"), str(directory), *flags, "--enforce-eager") as running:
        yield running


def test_a_dense_model_is_served_as_one_pool(dense_server: RunningServer) -> None:
    assert "experts  none: a dense model" in dense_server.summary
    with dense_server.client() as client, dense_server.http() as http:
        assert [card["name"] for card in http.get("/v1/pools").json()["data"]] == ["base"]
        answers = {
            client.completions.create(model=name, prompt="def", max_tokens=8, temperature=0)
            .choices[0]
            .text
            for name in ("tiny", "base")
        }
        assert len(answers) == 1
        build = http.post("/v1/pools", json={"name": "p", "examples": ["x"], "experts": 4})
        assert build.status_code == 400 and "has no MoE layer" in build.text


# -- refused --


def test_a_pool_of_a_dense_model_is_refused_before_the_engine_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emo_serve.server.startup.quiet.log_to_stderr", lambda: None)
    directory = write_checkpoint("dense", tmp_path / "dense")
    write_pools({"p": [[0], [1], [2]]}, tmp_path / "pools")
    arguments = ["serve", str(directory), "--pools", str(tmp_path / "pools")]
    assert cli.main(arguments) == 2
    assert "--pools: dense is dense: it has no experts" in capsys.readouterr().err


def test_what_cannot_be_served_is_refused_by_field(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("emo_serve.server.startup.quiet.log_to_stderr", lambda: None)
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scoring_func": "sigmoid"}))
    assert cli.main(["serve", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "config.json: scoring_func is 'sigmoid': only routers with softmax scores" in said
    assert MODELS[FAMILY].slots
