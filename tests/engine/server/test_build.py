"""Pools built on a real server, beside its requests, against the offline build."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.pools.calibration.build import calibrate
from emo_serve.pools.calibration.examples import Example, encode_examples
from emo_serve.pools.calibration.findings import Calibration
from emo_serve.pools.document import read_pool
from emo_serve.server.auto.classifier import read_counts
from tests.engine.server.conftest import TIGHT_SLOTS
from tests.support.progress import wait_for
from tests.support.server_process import RunningServer, stopped_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.server("tight"),
    pytest.mark.usefixtures("restored"),
]

K = 8


def texts(seed: int, count: int = 12) -> list[str]:
    """Return texts of different lengths, one of them longer than the server takes."""
    rng = random.Random(seed)
    lengths = [600, *(rng.randint(5, 200) for _ in range(count - 1))]
    return ["".join(rng.choices("abcdefgh (=)", k=length)) for length in lengths]


def offline(
    directory: Path, documents: list[str], k: int = K, method: str = "layerwise"
) -> Calibration:
    checkpoint = Checkpoint.open(directory)
    examples = [Example("text", text) for text in documents]
    tokenizer = ModelTokenizer(directory)
    ids = encode_examples(examples, tokenizer, checkpoint.config, max_tokens=511).ids
    return calibrate(checkpoint, ids, k, method)


def scores_of(directory: Path, name: str) -> list[list[float]]:
    pool = read_pool(directory / f"{name}.json")
    return [list(layer.scores or ()) for layer in pool.layers if layer is not None]


async def post(http: httpx.AsyncClient, name: str, documents: list[str], **more: Any) -> Any:
    body = {"name": name, "examples": documents, "experts": K, **more}
    answer = await http.post("/v1/pools", json=body, params={"replace": "true"})
    assert answer.is_success, answer.text
    return answer.json()


async def test_a_build_beside_requests_finds_the_offline_builds_pool(
    server: RunningServer, golden_checkpoint: Path, tight_pools: Path
) -> None:
    """Others ask for more pools than fit, and neither they nor the build come out any different."""
    expected = [offline(golden_checkpoint, texts(seed)) for seed in (0, 1)]
    async with (
        server.async_http() as http,
        server.async_client() as client,
    ):

        async def ask(pool: str) -> str:
            answer = await client.completions.create(
                model=pool, prompt="abc", max_tokens=24, temperature=0
            )
            return answer.choices[0].text

        alone = {pool: await ask(pool) for pool in ("math", "code", "law")}
        is_over = asyncio.Event()

        async def keep_asking(pool: str) -> int:
            served = 0
            while not is_over.is_set():
                assert await ask(pool) == alone[pool]
                served += 1
            return served

        others = [asyncio.create_task(keep_asking(pool)) for pool in alone]
        try:
            for seed, found in enumerate(expected):
                built = await post(http, f"built-{seed}", texts(seed))
                assert built["calibration"]["coverage"] == pytest.approx(found.coverage, rel=1e-4)
                assert built["calibration"]["tokens"] == found.tokens
                assert (built["calibration"]["documents_cut"], built["persisted"]) == (1, True)
        finally:
            is_over.set()
            served = await asyncio.gather(*others)
        assert min(served) > 1, "others were served all along"
        for seed, found in enumerate(expected):
            card = (await http.get(f"/v1/pools/built-{seed}")).json()
            assert card["experts"] == [list(layer.experts) for layer in found.layers if layer]
            for scores, layer in zip(
                scores_of(tight_pools, f"built-{seed}"), found.layers, strict=True
            ):
                assert layer is not None
                assert scores == pytest.approx(layer.scores, rel=1e-3, abs=1e-6)
            assert await ask(f"built-{seed}")
            learned = read_counts(tight_pools / f"built-{seed}.learned.npz")
            assert learned.matrix.shape[0] > len(texts(seed)), "known after a restart"
            (await http.delete(f"/v1/pools/built-{seed}")).raise_for_status()
            assert not list(tight_pools.glob(f"built-{seed}*"))


async def test_a_build_by_the_router_streams_the_full_model(
    server: RunningServer, golden_checkpoint: Path, tight_pools: Path
) -> None:
    found = offline(golden_checkpoint, texts(4), method="router")
    async with server.async_http() as http:
        built = await post(http, "by-router", texts(4), method="router")
    assert built["calibration"]["method"] == "router"
    assert built["calibration"]["coverage"] == pytest.approx(found.coverage, rel=1e-4)
    for scores, layer in zip(scores_of(tight_pools, "by-router"), found.layers, strict=True):
        assert layer is not None
        assert scores == pytest.approx(layer.scores, rel=1e-3, abs=1e-6)


async def test_the_same_build_gives_the_same_pool_and_leaves_only_that(
    server: RunningServer,
) -> None:
    async with server.async_http() as http:
        hashes = [(await post(http, "again", texts(3)))["content_hash"] for _ in range(2)]
        listed = (await http.get("/v1/pools", params={"experts": True})).json()
        metrics = (await http.get("/metrics")).text
    assert hashes[0] == hashes[1]
    assert (listed["running_requests"], listed["waiting_requests"]) == (0, 0)
    held = sum(count > 0 for layer in listed["holders"] for count in layer)
    assert listed["slots"]["used"] == held, "by pools that are listed, and no other"
    assert [card["name"] for card in listed["data"] if "(" in card["name"]] == []
    assert 'emo_serve_pool_resident{pool="math"}' in metrics
    assert 'emo_serve_pool_resident{pool="(build)"}' not in metrics


async def test_a_client_that_leaves_gets_its_pool_and_a_second_is_told_to_wait(
    server: RunningServer,
) -> None:
    body = {"name": "left", "examples": texts(4), "experts": K}
    other = {"name": "other", "examples": ["a"], "experts": K}
    async with server.async_http() as http:

        async def is_under_way() -> bool:
            listed = (await http.get("/v1/pools")).json()
            return bool(listed["running_requests"] + listed["waiting_requests"])

        with stopped_engine(server):
            leaving = asyncio.create_task(http.post("/v1/pools", json=body))
            while not await is_under_way():
                await asyncio.sleep(0.01)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert await is_under_way()
            refused = await http.post("/v1/pools", json=other)
            assert refused.status_code == 409
            assert (
                "pool 'left' is being built, and a server builds one pool at a time" in refused.text
            )
    with server.http() as after:
        wait_for(lambda: after.get("/v1/pools/left").is_success, server.activity)
        answers: list[int] = []

        def is_free() -> bool:  # a moment after the pool is listed: its examples are learned first
            answers.append(after.post("/v1/pools", json=other).status_code)
            return answers[-1] != 409

        wait_for(is_free, server.activity)
        assert answers[-1] == 201


def test_a_pool_that_the_slab_cannot_hold_is_built_and_streamed(http: httpx.Client) -> None:
    body = {"name": "big", "examples": ["a b c d"], "experts": TIGHT_SLOTS + 1}
    built = http.post("/v1/pools", json=body)
    assert (built.status_code, built.json()["state"]) == (201, "streamed"), built.text
    answer = http.post("/v1/completions", json={"model": "big", "prompt": "a", "max_tokens": 2})
    assert (answer.status_code, answer.headers["x-emo-pool"]) == (200, "big")
