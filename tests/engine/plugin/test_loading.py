"""Loads in a real engine: beside decoding, into slots others had, from memory and broken files."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.model import EmoForCausalLM
from emo_serve.residency.slots import SlotTable
from tests.support.golden.checkpoints import golden, write_checkpoint
from tests.support.golden_run import TOLERANCE, assert_greedy, golden_pools
from tests.support.offline_engine import PooledEngine, pooled_engine

pytestmark = pytest.mark.vllm
POOLS = golden().pools
NUM_SLOTS = 26  # of 32 experts: room for any two of the pools, never for all three
HOST_EXPERTS = 50  # of 96
EXPERT_BYTES = 3 * 64 * 128 * 4  # float32 in the slab
NUM_TOKENS = 40


class Residency:
    """The front end's part in plain calls: which pool is where, and requests under way."""

    def __init__(self, engine: PooledEngine, directory: Path) -> None:
        self.engine, self.path = engine, directory / "model.safetensors"
        self.table = SlotTable([32] * 3, NUM_SLOTS)
        self.asked: dict[str, tuple[str, list[int]]] = {}
        self.answers: dict[str, list[int]] = {}

    def begin(self, pool: str) -> int:
        """Start to load a pool for which there is room; return how many experts are copied."""
        plan = self.table.plan_load(pool, POOLS[pool])
        self.table.begin(plan)
        self.engine.start_load([(c.layer, c.expert, c.slot) for c in plan.copies])
        return len(plan.copies)

    def finish(self, pool: str) -> dict[str, Any]:
        """Wait until the load is done and say how."""
        (answer,) = self.engine.finish_load(self.engine.rows[pool], POOLS[pool])
        done = self.table.finish if answer["state"] == "published" else self.table.abandon
        done(pool)
        return answer

    def ask(self, pool: str) -> None:
        """Have the engine work on one request more."""
        number, prompt = len(self.asked), golden().prompts[len(self.asked) % 3]
        params = self.engine.params(pool, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = {"prompt_token_ids": prompt}
        self.engine.llm.llm_engine.add_request(str(number), request, params)
        self.asked[str(number)] = (pool, prompt)

    def step(self) -> None:
        """Take the outputs of one step."""
        for output in self.engine.llm.llm_engine.step():
            self.answers[output.request_id] = list(output.outputs[0].token_ids)

    def check_answers(self, reference: EmoForCausalLM) -> None:
        """Run every request to its end and compare what came out with the reference."""
        while self.engine.llm.llm_engine.has_unfinished_requests():
            self.step()
        for number, (pool, prompt) in self.asked.items():
            assert len(self.answers[number]) == NUM_TOKENS
            assert_greedy(reference, pool, prompt, self.answers[number])
        self.asked, self.answers = {}, {}

    def check_golden(self, *pools: str) -> None:
        """Compare prompts' log-probabilities of resident pools with the published ones."""
        requests = [(pool, ids) for pool in pools for ids in golden().prompts]
        for (pool, ids), got in zip(requests, self.engine.prompt_logprobs(requests), strict=True):
            row = golden().prompts.index(ids)
            assert got == pytest.approx(golden().prompt_logprobs[pool][row], abs=TOLERANCE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("shared1"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> EmoForCausalLM:
    return load_model(directory)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[PooledEngine]:
    with pooled_engine(
        directory,
        {**POOLS, "full": golden_pools()["full"]},
        num_slots=NUM_SLOTS,
        stream_slots=4,
        host_expert_bytes=HOST_EXPERTS * EXPERT_BYTES,
        is_empty=True,
    ) as engine:
        yield engine
    gc.collect()


@pytest.fixture
def residency(engine: PooledEngine, directory: Path) -> Residency:
    """Start from an empty table; experts that the workers still hold belong to no pool."""
    return Residency(engine, directory)


def test_pools_come_and_go_while_another_decodes(
    residency: Residency, reference: EmoForCausalLM
) -> None:
    rng = random.Random(3)
    stays, leaves, comes = POOLS
    full = golden_pools()["full"]  # more than there are slots: streamed beside all that follows
    residency.engine.call("emo_publish_pool", residency.engine.rows["full"], full, 1.0)
    residency.begin(stays)
    residency.finish(stays)
    residency.begin(leaves)
    residency.finish(leaves)
    counts: list[dict[str, Any]] = []
    for _ in range(12):
        for pool in (stays, stays, stays, "full"):
            residency.ask(pool)
        residency.step()
        residency.table.evict(leaves)
        copies = residency.begin(comes)
        assert 0 < copies < sum(map(len, POOLS[comes]))
        for _ in range(rng.randrange(10)):
            residency.step()
        answer = residency.finish(comes)
        assert (answer["state"], answer["experts_copied"]) == ("published", copies)
        assert answer["bytes_copied"] == copies * EXPERT_BYTES
        assert answer["host_hits"] + answer["disk_reads"] == copies
        assert answer["bytes_read"] == answer["disk_reads"] * EXPERT_BYTES // 2  # bf16 in the file
        counts.append(answer)
        residency.ask(comes)
        residency.check_answers(reference)
        stays, leaves, comes = rng.sample([stays, comes], 2) + [leaves]
        residency.table.check_integrity()
    residency.check_golden(stays, leaves, "full")
    assert sum(answer["host_hits"] for answer in counts) > 0
    (described,) = residency.engine.call("emo_describe")
    assert described["host_bytes"] == HOST_EXPERTS * EXPERT_BYTES
    assert described["host_experts"] == HOST_EXPERTS


def test_the_worker_says_no_to_a_second_load(residency: Residency) -> None:
    math, code, _ = POOLS
    residency.begin(math)
    args = (7, 999, [[0, 0, 25]])
    (answer,) = residency.engine.llm.collective_rpc("emo_start_load", args=args)
    assert answer["call_id"] == 7 and not answer["ok"]
    assert "is under way; 999 must wait" in answer["error"]
    first = residency.finish(math)
    again = residency.engine.finish_load(residency.engine.rows[math], POOLS[math])
    assert [{**first, "call_id": 0}] == [{**a, "call_id": 0} for a in again], "asking is harmless"
    residency.begin(code)
    residency.finish(code)
    residency.check_golden(math, code)


def test_a_file_truncated_while_serving_fails_one_load_and_harms_no_request(
    residency: Residency, reference: EmoForCausalLM
) -> None:
    math, code, law = POOLS
    for pool in (math, code):
        residency.begin(pool)
        residency.finish(pool)
    whole, times = residency.path.read_bytes(), residency.path.stat()
    residency.ask(math)
    residency.step()
    residency.table.evict(code)
    try:
        os.truncate(residency.path, len(whole) // 2)
        residency.begin(law)
        answer = residency.finish(law)
        assert answer["state"] == "failed"
        assert f"{residency.path} has {len(whole) // 2} bytes" in answer["failure"]
        residency.ask(math)
        residency.check_answers(reference)
        residency.check_golden(math)
    finally:
        residency.path.write_bytes(whole)
        os.utime(residency.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    residency.begin(law)
    assert residency.finish(law)["state"] == "published"
    residency.check_golden(math, law)
