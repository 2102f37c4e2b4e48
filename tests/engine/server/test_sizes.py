"""Pools at other sizes on a real server: `sums@5` is what the cut file is, and shares its slots."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from emo_serve.cli.main import main
from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.model import EmoForCausalLM
from emo_serve.pools.document import read_pool
from tests.engine.server.conftest import ADMIN, API, hold_only
from tests.support.golden.checkpoints import golden, pools_of
from tests.support.server_process import RunningServer, error_of
from tests.unit.emo.test_model import logprobs, masks

pytestmark = [pytest.mark.vllm, pytest.mark.server("tight"), pytest.mark.usefixtures("restored")]

TOLERANCE = 1e-3  # nats per token
NUM_EXPERTS, NUM_LAYERS, SHARED = 32, 3, 31
PROMPT = (golden().prompts[1] * 8)[:100]  # several KV blocks, so that a foreign prefix would show


def sums(**fields: Any) -> dict[str, Any]:
    """Return the document of a pool that lists its 12 best experts, by random scores."""
    chance = random.Random(0)
    layers = []
    for _ in range(NUM_LAYERS):
        ranks = chance.sample(range(NUM_EXPERTS), NUM_EXPERTS)
        best = [expert for expert in ranks if expert != SHARED][:11]
        scores = [-float(ranks.index(expert)) for expert in range(NUM_EXPERTS)]
        layers.append({"experts": [*best, SHARED], "scores": scores})
    model = {"implied": [[SHARED]] * NUM_LAYERS}
    return {"format": "emo-pool/1", "name": "sums", "layers": layers, "model": model, **fields}


@pytest.fixture
def pools(http: httpx.Client, restored: None) -> httpx.Client:
    """The server with the pool `sums`, and nothing resident."""
    http.post("/v1/pools", json=sums()).raise_for_status()
    hold_only(http)
    return http


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client(API) as client:
        yield client


@pytest.fixture(scope="module")
def reference(golden_checkpoint: Path) -> EmoForCausalLM:
    return load_model(golden_checkpoint)


def answer_of(client: openai.OpenAI, model: str, **options: Any) -> Any:
    """Return an answer's tokens, their log-probabilities and its header x-emo-pool."""
    answer = client.completions.with_raw_response.create(
        model=model,
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        logprobs=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        **options,
    )
    choice: Any = answer.parse().choices[0]
    return choice.token_ids, choice.logprobs.token_logprobs, answer.headers["x-emo-pool"]


def assert_computed(
    reference: EmoForCausalLM, answer: Any, experts: list[list[int]], pool: str
) -> None:
    """Compare an answer with the reference model, restricted to these experts."""
    tokens, found, header = answer
    restricted = masks(experts, "shared1")
    expected = logprobs(reference, [[*PROMPT, *tokens]], pool=restricted)[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(torch.tensor(found), expected, atol=TOLERANCE, rtol=0)
    assert header == pool


def cut(tmp_path: Path, size: int) -> list[list[int]]:
    """Return the experts that `emo-serve pools cut` keeps."""
    source, out = tmp_path / "sums.json", tmp_path / f"sums-{size}.json"
    source.write_text(json.dumps(sums()))
    assert main(["pools", "cut", str(source), "--experts", str(size), "--out", str(out)]) == 0
    return [list(ids) for ids in read_pool(out).expert_ids]


def test_a_size_answers_as_its_cut_file_and_takes_nothing_of_another_size(
    pools: httpx.Client, client: openai.OpenAI, reference: EmoForCausalLM, tmp_path: Path
) -> None:
    """One prompt at size after size: a prefix of another size would give other answers."""
    experts = {size: cut(tmp_path, size) for size in (3, 5, 12, 20)}
    for size in (12, 5, 20, 3, 5, 12):
        model = f"sums@{size}"
        assert_computed(reference, answer_of(client, model), experts[size], model)
    assert_computed(reference, answer_of(client, "sums"), experts[12], "sums")
    code = pools_of("shared1")["code"]
    united = [sorted({*a, *b}) for a, b in zip(experts[5], code, strict=True)]
    for model in ("sums@5+code", "emo:code+sums@5"):
        assert_computed(reference, answer_of(client, model), united, "code+sums@5")
    in_header = answer_of(client, "emo", extra_headers={"x-emo-pool": "sums@3"})
    assert_computed(reference, in_header, experts[3], "sums@3")


def test_nested_sizes_share_their_slots(pools: httpx.Client, client: openai.OpenAI) -> None:
    answer_of(client, "sums")
    before = pools.get("/v1/pools").json()["slots"]
    assert before["used"] == NUM_LAYERS * 12
    for size in (3, 5, 8):
        preview = pools.get("/v1/pools/sums", params={"experts": size}).json()
        assert (preview["name"], preview["experts_missing"]) == (f"sums@{size}", 0)
        assert preview["bytes"] == NUM_LAYERS * size * before["bytes_per_slot"]
        answer_of(client, f"sums@{size}")
    listed = pools.get("/v1/pools").json()
    assert listed["slots"]["used"] == before["used"]
    assert [card["name"] for card in listed["data"]][-3:] == ["sums@3", "sums@5", "sums@8"]
    assert pools.get("/v1/pools/sums?experts=20").json()["experts_missing"] == NUM_LAYERS * 8
    pools.post("/v1/pools/sums/evict").raise_for_status()
    assert pools.get("/v1/pools").json()["slots"]["used"] == NUM_LAYERS * 8
    models = {model["id"] for model in pools.get("/v1/models").json()["data"]}
    assert "sums" in models and not any("@" in name for name in models)
    metrics = pools.get("/metrics").text.splitlines()
    ours = [line for line in metrics if line.startswith("emo_serve_")]
    assert any(line.startswith('emo_serve_request_experts_count{pool="sums"}') for line in ours)
    assert not any("@" in line for line in ours), "one series per pool, not one per size"


def test_a_default_size_is_what_the_bare_name_means(
    pools: httpx.Client, client: openai.OpenAI
) -> None:
    card = pools.post("/v1/pools?replace=true", json=sums(default_experts=5)).json()
    assert (card["experts_per_layer"], card["sizes"]) == ([5] * 3, {"least": 1, "most": 32})
    assert answer_of(client, "sums")[:2] == answer_of(client, "sums@5")[:2]
    assert answer_of(client, "sums@12")[1] != answer_of(client, "sums")[1]


def test_an_elastic_pool_answers_in_the_size_that_is_there_and_says_which(
    pools: httpx.Client, client: openai.OpenAI, reference: EmoForCausalLM, tmp_path: Path
) -> None:
    """One prompt, while the pool grows: each answer is the reference's at the size it names."""

    def ask(least: str) -> Any:
        return answer_of(client, "sums", extra_headers={"x-emo-min-experts": least})

    sizes = {k: f"sums@{k}" for k in range(3, 12)} | {12: "sums"}
    experts = {name: cut(tmp_path, k) for k, name in sizes.items()}
    first = ask("3")
    assert_computed(reference, first, experts["sums@3"], "sums@3")
    for _ in range(3):
        answer = ask("3")
        assert_computed(reference, answer, experts[answer[2]], answer[2])
    assert ask("all")[2] == "sums"
    assert_computed(reference, ask("3"), experts["sums"], "sums")
    hold_only(pools, "sums@7")
    answer = ask("4")
    assert_computed(reference, answer, experts["sums@7"], "sums@7")
    with pytest.raises(openai.BadRequestError, match="a whole number from 1, or 'all'"):
        ask("few")


def test_a_request_routes_at_a_temperature_of_its_own_within_the_operators_bound(
    pools: httpx.Client, client: openai.OpenAI, reference: EmoForCausalLM, tmp_path: Path
) -> None:
    """One prompt at two temperatures: a prefix of the other would give other answers."""
    mask = masks(cut(tmp_path, 5), "shared1")
    for temperature in ("0.5", "2", "0.5"):
        headers = {"x-emo-router-temperature": temperature}
        tokens, found, pool = answer_of(client, "sums@5", extra_headers=headers)
        ids = [[*PROMPT, *tokens]]
        expected = logprobs(reference, ids, pool=mask, temperature=float(temperature))
        expected = expected[0, len(PROMPT) - 1 :]
        torch.testing.assert_close(torch.tensor(found), expected, atol=TOLERANCE, rtol=0)
        assert pool == "sums@5"
    with pytest.raises(openai.BadRequestError, match="this server takes 0.5 to 2"):
        answer_of(client, "sums@5", extra_headers={"x-emo-router-temperature": "2.5"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("sums@33", "the sizes of pool 'sums' are 1 to 32 experts per layer"),
        ("sums@0", "from 'sums@1' to 'sums@32'"),
        ("math@4", "pool 'math' has no scores"),
        ("base@4", "the base pool has all experts, and no other size"),
        ("emo@4", "the pools are: code, law, math, sums, tiny; the model itself is 'emo'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_size_there_is_not_is_a_404_that_says_what_there_is(
    pools: httpx.Client, client: openai.OpenAI, model: str, message: str, stream: bool
) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        client.completions.create(model=model, prompt="hello", max_tokens=1, stream=stream)
    assert message in error_of(refusal.value)["message"]


@pytest.mark.parametrize(("model", "pool"), [("emo", "sums@05"), ("auto@5", None)])
def test_a_size_that_cannot_be_read_is_a_400(
    client: openai.OpenAI, http: httpx.Client, model: str, pool: str | None
) -> None:
    headers = {} if pool is None else {"x-emo-pool": pool}
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=model, prompt="a", extra_headers=headers)
    bad = http.get("/v1/pools/math?experts=0")
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, 400)


def test_the_terminal_previews_loads_and_evicts_a_size(
    server: RunningServer,
    pools: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EMO_SERVE_ADMIN_API_KEY", ADMIN)

    def run(*arguments: str) -> str:
        assert main(["pools", *arguments, "--server", server.url]) == 0
        return capsys.readouterr().out

    assert "sizes        1 to 32 per layer, as sums@1" in run("show", "sums")
    assert "0 alone, 0 shared, 15 missing" in run("show", "sums@5")
    assert run("load", "sums@5").startswith("sums@5: resident, 5 experts per layer")
    assert run("evict", "sums@5").startswith("sums@5: absent")
