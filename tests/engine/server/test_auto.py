"""`model: "auto"` on real servers: the pool that the reference model's router says, everywhere."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.model import EmoForCausalLM, RouterRecord
from emo_serve.emo.routing import router_probabilities
from emo_serve.pools.document import read_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.server.auto.by_router import coverages, trunk_pool
from emo_serve.vllm_plugin.contract import RouterMass
from tests.engine.server.conftest import POOLS
from tests.support.server_process import error_of
from tests.unit.emo.test_model import masks

pytestmark = pytest.mark.vllm

MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def reference(golden_checkpoint: Path) -> EmoForCausalLM:
    return load_model(golden_checkpoint)


@pytest.fixture(scope="module")
def pools(golden_pools: Path, reference: EmoForCausalLM) -> list[ExpertPool]:
    layers = reference.config.moe_layers
    return [read_pool(golden_pools / f"{name}.json").complete(layers) for name in POOLS]


@torch.no_grad()
def covered(
    model: EmoForCausalLM, ids: list[int], pools: list[ExpertPool], path: ExpertPool | None
) -> dict[str, float]:
    """Return what each pool covers of the router's mass on these tokens, run inside `path`."""
    records: list[RouterRecord] = []
    inside = None if path is None else masks([list(e) for e in path.expert_ids], "shared1")
    model(torch.tensor([ids]), pool=inside, record=records)
    layers: list[tuple[float, ...]] = [()] * len(model.config.moe_layers)
    for record in records:
        moe = model.config.moe_layers[record.layer]
        assert moe is not None
        mass_E = router_probabilities(record.logits_BTE[0], moe).double().sum(0)
        layers[record.layer] = tuple(mass_E.tolist())
    mass = RouterMass(len(ids), tuple(layers))
    shares = coverages(mass, pools, model.config.moe_layers)
    return {pool.name: share for pool, share in zip(pools, shares, strict=True)}


def prompts() -> list[list[int]]:
    """Return prompts as ids; each has few different ones, so that they want different experts."""
    draw = random.Random(0)
    return [draw.choices(draw.sample(range(256), 2), k=draw.randint(4, 60)) for _ in range(24)]


def choices_made(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("emo_serve_auto_choices_total{")]
    assert len(found) > len(POOLS)
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


# -- the base pool is resident --


def test_the_pool_that_covers_most_is_chosen_or_the_base_pool(
    http: httpx.Client, reference: EmoForCausalLM, pools: list[ExpertPool]
) -> None:
    chosen, before = set(), choices_made(http)
    for ids in prompts():
        body = {"model": "auto", "prompt": ids, "max_tokens": 1}
        response = http.post("/v1/completions", json=body)
        shares = covered(reference, ids[:256], pools, None)
        best = max(shares, key=shares.__getitem__)
        expected = best if shares[best] >= 0.4 else "base"
        assert response.status_code == 200, response.text
        assert response.headers["x-emo-pool"] == expected, shares
        assert response.json()["model"] == ("emo" if expected == "base" else expected)
        chosen.add(expected)
    assert len(chosen) > 1
    assert choices_made(http) == before + len(prompts())


def vllm_figures(http: httpx.Client) -> dict[str, float]:
    """Return vLLM's counters and the counts of its histograms, of requests, tokens and steps."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("vllm:")]
    found = dict(line.rsplit(" ", 1) for line in lines)
    ending = re.compile(r"_(total|count|sum){")
    return {name: float(value) for name, value in found.items() if ending.search(name)}


def test_probes_are_in_no_figure_of_clients(http: httpx.Client) -> None:
    names = ("success_total", "request_prompt_tokens_count", "time_to_first_token_seconds_count")
    body = {"prompt": "def f(x):", "max_tokens": 3, "ignore_eos": True}

    def counted_by(model: str) -> dict[str, float]:
        before = vllm_figures(http)
        for _ in range(4):
            http.post("/v1/completions", json={"model": model, **body}).raise_for_status()
        after = vllm_figures(http)
        return {
            name: after[name] - before.get(name, 0) for name in after if "seconds_sum" not in name
        }

    by_name, by_choice = counted_by("base"), counted_by("auto")
    assert {name: by_choice[name] for name in by_name} == by_name
    for name in names:
        assert sum(count for full, count in by_name.items() if name in full) == 4
    assert 'emo_serve_running_requests{pool="base"} 0.0' in http.get("/metrics").text


def test_every_protocol_has_it(client: openai.OpenAI, http: httpx.Client) -> None:
    chat = client.chat.completions.create(model="auto", messages=MESSAGES, max_tokens=1)
    asked = {
        "chat/completions": {"messages": MESSAGES, "max_tokens": 1},
        "completions": {"prompt": "hello", "max_tokens": 1},
        "responses": {"input": "hello", "max_output_tokens": 1},
        "messages": {"messages": MESSAGES, "max_tokens": 1},
    }
    for route, body in asked.items():
        for model, headers in (("auto", {}), ("emo:auto", {}), ("emo", {"x-emo-pool": "auto"})):
            answer = http.post(f"/v1/{route}", json={"model": model, **body}, headers=headers)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == chat.model


def test_a_stream_is_told_its_pool_too(client: openai.OpenAI) -> None:
    with client.completions.with_streaming_response.create(
        model="auto", prompt="hello", max_tokens=3, stream=True
    ) as response:
        pool = response.headers["x-emo-pool"]
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    whole = client.completions.create(model="auto", prompt="hello", max_tokens=1)
    assert whole.model == ("emo" if pool == "base" else pool)
    assert len(lines) >= 3
    assert all(f'"model":"{whole.model}"' in line for line in lines)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("auto+math", {}, "alone and not in a union"),
        ("auto", {"extra_headers": {"x-emo-pool": "math"}}, "name different pools"),
        ("auto", {"prompt": [3, 99_999]}, "the prompt has token id 99999; expected 0 to"),
        ("auto", {"prompt": "hi", "max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_cannot_be_chosen_for_is_refused(
    client: openai.OpenAI, model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(**{"model": model, "prompt": "hello", "max_tokens": 1, **options})
    assert message in error_of(refusal.value)["message"]


def test_where_nothing_is_generated_auto_is_no_pool(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"model": "auto", "prompt": "hello"})
    assert answer.status_code == 400
    assert "'auto' is no pool: the server chooses one for it" in answer.text
    answer = http.post("/v1/pools/auto/load")
    assert answer.status_code == 400
    assert "elsewhere name a pool" in answer.text


def test_no_pool_may_be_called_auto(http: httpx.Client, golden_pools: Path) -> None:
    document = (golden_pools / "math.json").read_text().replace('"math"', '"auto"', 1)
    answer = http.post("/v1/pools", content=document)
    assert answer.status_code == 400
    assert "kept for the server's own choice" in answer.text


# -- it is not --


@pytest.mark.server("tight")
def test_without_the_base_pool_the_trunks_router_chooses_and_the_pool_is_loaded(
    http: httpx.Client, reference: EmoForCausalLM, pools: list[ExpertPool]
) -> None:
    layers = reference.config.moe_layers
    trunk, chosen = trunk_pool(layers).complete(layers), set()
    for ids in prompts():
        body = {"model": "auto", "prompt": ids, "max_tokens": 1}
        response = http.post("/v1/completions", json=body)
        shares = covered(reference, ids[:32], pools, trunk)
        expected = max(shares, key=shares.__getitem__)
        assert response.status_code == 200, response.text
        assert response.json()["model"] == expected, shares
        chosen.add(expected)
    listed = {card["name"] for card in http.get("/v1/pools").json()["data"]}
    assert len(chosen) > 1
    assert listed == {"base", *POOLS}
