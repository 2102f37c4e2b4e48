"""Pools built on a real server, beside its requests, against the offline build."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tests.support.server_process import RunningServer, serve, stopped_engine, wait_for

pytestmark = pytest.mark.vllm

K = 8
SLOTS = 20  # two of the golden pools, or one and what a build needs


@pytest.fixture(scope="module")
def own_pools(golden_pools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the golden pools: what is built here is stored there."""
    return Path(shutil.copytree(golden_pools, tmp_path_factory.mktemp("build-pools") / "pools"))


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, own_pools: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with serve(
        tmp_path_factory.mktemp("build"),
        str(golden_checkpoint),
        *("--pools", str(own_pools), "--expert-slots", str(SLOTS), "--default-pool", "math"),
        *("--served-model-name", "emo", "--dtype", "float32", "--max-model-len", "256"),
        "--enforce-eager",
    ) as running:
        yield running


def texts(seed: int, count: int = 12) -> list[str]:
    """Return texts of different lengths, one of them longer than the server takes."""
    rng = random.Random(seed)
    lengths = [300, *(rng.randint(5, 200) for _ in range(count - 1))]
    return ["".join(rng.choices("abcdefgh (=)", k=length)) for length in lengths]


def offline(directory: Path, documents: list[str], k: int = K) -> Calibration:
    checkpoint = Checkpoint.open(directory)
    examples = [Example("text", text) for text in documents]
    tokenizer = ModelTokenizer(directory)
    ids = encode_examples(examples, tokenizer, checkpoint.config, max_tokens=255).ids
    return calibrate(checkpoint, ids, k)


def scores_of(directory: Path, name: str) -> list[list[float]]:
    pool = read_pool(directory / f"{name}.json")
    return [list(layer.scores or ()) for layer in pool.layers if layer is not None]


async def post(http: httpx.AsyncClient, name: str, documents: list[str], **more: Any) -> Any:
    body = {"name": name, "examples": documents, "experts": K, **more}
    answer = await http.post("/v1/pools", json=body, params={"replace": "true"})
    assert answer.is_success, answer.text
    return answer.json()


async def test_a_build_beside_requests_finds_the_offline_builds_pool(
    server: RunningServer, golden_checkpoint: Path, own_pools: Path
) -> None:
    """Others ask for more pools than fit, and neither they nor the build come out any different."""
    expected = [offline(golden_checkpoint, texts(seed)) for seed in (0, 1)]
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=300) as http,
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
                scores_of(own_pools, f"built-{seed}"), found.layers, strict=True
            ):
                assert layer is not None
                assert scores == pytest.approx(layer.scores, rel=1e-3, abs=1e-6)
            assert await ask(f"built-{seed}")


async def test_the_same_build_gives_the_same_pool_and_leaves_only_that(
    server: RunningServer,
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
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


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def is_under_way(http: httpx.Client) -> bool:
    listed = http.get("/v1/pools").json()
    return bool(listed["running_requests"] + listed["waiting_requests"])


def test_a_client_that_leaves_gets_its_pool_and_a_second_is_told_to_wait(
    server: RunningServer, http: httpx.Client
) -> None:
    body = {"name": "left", "examples": texts(4), "experts": K}
    other = {"name": "other", "examples": ["a"], "experts": K}
    with stopped_engine(server):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/pools", json=body, timeout=1)
        assert is_under_way(http)
        refused = http.post("/v1/pools", json=other)
        assert refused.status_code == 409
        assert "pool 'left' is being built, and a server builds one pool at a time" in refused.text
    wait_for(lambda: http.get("/v1/pools/left").is_success)
    assert http.post("/v1/pools", json=other).status_code == 201


def test_a_pool_that_the_slab_cannot_hold_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/pools", json={"name": "big", "examples": ["a"], "experts": SLOTS + 1})
    assert answer.status_code == 400
    assert f"needs {SLOTS + 1} slots and has {SLOTS}" in answer.json()["error"]["message"]


def test_a_drain_waits_for_a_build(server: RunningServer, http: httpx.Client) -> None:
    """Ends the server, so it is the last."""
    body = {"name": "late", "examples": texts(5), "experts": K}
    with ThreadPoolExecutor() as threads:
        with stopped_engine(server):
            building = threads.submit(http.post, "/v1/pools", json=body)
            with server.http() as others:
                wait_for(lambda: is_under_way(others))
                server.terminate()
                wait_for(lambda: others.get("/ready").status_code == 503)
        assert building.result().status_code == 201
    assert server.process.wait(60) == 0
