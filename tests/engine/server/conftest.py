"""One server for all tests of a session: a random checkpoint with golden values, four pools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from emo_serve.pools.document import write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts
from tests.support.golden.checkpoints import pools_of, write_checkpoint
from tests.support.server_process import RunningServer, serve

POOLS = ("math", "code", "law", "tiny")


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the golden values."""
    return write_checkpoint("shared1", tmp_path_factory.mktemp("model") / "shared1")


@pytest.fixture(scope="session")
def golden_pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pools of that checkpoint, and a file that fits no model."""
    directory = tmp_path_factory.mktemp("pools")
    for name in POOLS:
        layers = tuple(LayerExperts(tuple(ids)) for ids in pools_of("shared1")[name])
        write_pool(
            ExpertPool(name, layers, description=f"golden {name}"), directory / f"{name}.json"
        )
    (directory / "broken.json").write_text('{"format": "emo-pool/1", "name": "broken"}')
    return directory


@pytest.fixture(scope="session")
def server(
    golden_checkpoint: Path, golden_pools: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server of the golden checkpoint, called `emo`, with all experts held."""
    with serve(
        tmp_path_factory.mktemp("server"),
        str(golden_checkpoint),
        *("--pools", str(golden_pools)),
        *("--served-model-name", "emo"),
        *("--dtype", "float32"),  # greedy answers then do not depend on what else is in the batch
        *("--max-model-len", "512"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        # random weights like white space, which JSON allows without end
        *("--structured-outputs-config.backend", "xgrammar"),
        *("--structured-outputs-config.disable_any_whitespace", "true"),
        "--enable-prompt-tokens-details",
    ) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http
