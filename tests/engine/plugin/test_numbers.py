"""The plugin's numbers on one engine each: dtypes, plain vLLM, corners of the config space."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emo_serve.emo.checkpoint import Checkpoint, load_model
from tests.support.golden.checkpoints import CASES, golden, pools_of, prompts_of, write_checkpoint
from tests.support.golden_run import TOLERANCE, golden_pools, worst_difference
from tests.support.offline_engine import (
    PooledEngine,
    pooled_engine,
    started_engine,
)
from tests.unit.emo.test_model import logprobs, masks

pytestmark = pytest.mark.vllm


def test_golden_values_in_plain_vllm(shared1: Path) -> None:
    with started_engine(shared1) as llm:
        engine = PooledEngine(llm, {"full": golden_pools()["full"]})
        assert worst_difference(engine) < TOLERANCE
        for row in (1, 99, -1, -2, 2**40, "math", None, [0]):  # a client may send anything
            engine.rows["full"] = row  # type: ignore[assignment]
            assert worst_difference(engine, prompts=[0]) < TOLERANCE, row


def test_bfloat16_stays_in_its_pool(shared1: Path) -> None:
    with pooled_engine(shared1, golden_pools(), dtype="bfloat16") as engine:
        requests = [(pool, ids) for pool in engine.rows for ids in golden().prompts]
        got = torch.tensor(engine.prompt_logprobs(requests)).view(4, 3, 39)
    names = list(golden_pools())
    expected = torch.tensor([golden().prompt_logprobs[name] for name in names])
    distance = (got[:, None] - expected[None]).abs().mean((2, 3))  # [served as, golden of]
    assert distance.diagonal().max() < 0.05
    others = distance + torch.eye(4) * 9
    assert others.min() > 4 * distance.diagonal().max()


@pytest.mark.parametrize("case", [case for case in CASES if case != "shared1"])
def test_corners_of_the_config_space(case: str, tmp_path: Path) -> None:
    model = load_model(write_checkpoint(case, tmp_path))
    pools, prompts = pools_of(case), prompts_of(case)
    backend = "reference" if case == "shared2-gqa" else "auto"
    with pooled_engine(tmp_path, pools, moe_backend=backend) as engine:
        requests = [(pool, ids) for ids in prompts for pool in pools]
        got = engine.prompt_logprobs(requests)
        name = engine.call("emo_describe")[0]["moe_backend"]
    assert name == ("reference" if backend == "reference" else "cpu")
    for (pool, ids), mine in zip(requests, got, strict=True):
        theirs = logprobs(model, [ids], pool=masks(pools[pool], case))[0]
        torch.testing.assert_close(torch.tensor(mine), theirs, atol=TOLERANCE, rtol=0)


def test_only_wanted_experts_are_read(shared1: Path) -> None:
    pools = {name: golden().pools[name] for name in ("math", "code")}
    wanted = [len({e for pool in pools.values() for e in pool[layer]}) for layer in range(3)]
    with pooled_engine(shared1, pools) as engine:
        (described,) = engine.call("emo_describe")
        requests = [(pool, ids) for pool in pools for ids in golden().prompts]
        got = engine.prompt_logprobs(requests)
    assert [*described["num_slots"]] == [max(wanted)] * 3 and max(wanted) < 32
    expert_bytes = 3 * 64 * 128 * 2
    checkpoint = Checkpoint.open(shared1)
    trunk = sum(checkpoint.tensor(name).nbytes for name in checkpoint.trunk_names())
    assert described["bytes_read"] == trunk + sum(wanted) * expert_bytes
    assert (described["disk_reads"], described["host_hits"]) == (sum(wanted), 0)
    for (pool, ids), mine in zip(requests, got, strict=True):
        row = golden().prompts.index(ids)
        assert mine == pytest.approx(golden().prompt_logprobs[pool][row], abs=TOLERANCE)
