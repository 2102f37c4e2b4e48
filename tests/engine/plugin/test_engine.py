"""The plugin in a compiled vLLM engine: each request computes inside its own pool."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from emo_serve.emo.model import EmoForCausalLM
from emo_serve.emo.routing import router_probabilities
from emo_serve.vllm_plugin.contract import ACCOUNT_ARG, MASS_SLOT_ARG
from tests.support.golden.checkpoints import golden
from tests.support.golden_run import TOLERANCE, assert_greedy, golden_pools, worst_difference
from tests.support.offline_engine import PooledEngine, chosen_logprobs, pooled_engine
from tests.unit.emo.test_model import logprobs, masks

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def compiled(shared1: Path) -> Iterator[PooledEngine]:
    """An engine as users run it: vLLM's default compilation, core and worker in own processes.

    The full model is too large for its slots, and streamed.
    """
    with pooled_engine(
        shared1,
        golden_pools(),
        own_processes=True,
        enforce_eager=False,
        stream_slots=3,
        streamed=["full"],
    ) as engine:
        (described,) = engine.call("emo_describe")
        assert max(described["num_slots"]) < 32
        yield engine
    gc.collect()


# -- golden values --


def test_golden_values_compiled(compiled: PooledEngine) -> None:
    (before,) = compiled.call("emo_read_coverage")
    assert worst_difference(compiled) < TOLERANCE
    (after,) = compiled.call("emo_read_coverage")
    assert after["streamed_experts"] > before["streamed_experts"]


# -- what requests do --


def test_greedy_continuations_of_all_pools_in_one_batch(
    compiled: PooledEngine, reference: EmoForCausalLM
) -> None:
    requests = [(pool, ids) for ids in golden().prompts for pool in compiled.rows]
    params = [compiled.params(pool, max_tokens=8, logprobs=0) for pool, _ in requests]
    prompts = [{"prompt_token_ids": ids} for _, ids in requests]
    outputs = compiled.llm.generate(prompts, params, use_tqdm=False)
    for (pool, ids), output in zip(requests, outputs, strict=True):
        answer = output.outputs[0]
        chosen = assert_greedy(reference, pool, ids, answer.token_ids)
        got = chosen_logprobs(answer.logprobs, answer.token_ids)
        assert len(got) == 8 and got == pytest.approx(chosen, abs=TOLERANCE)


def test_several_samples_of_one_request(compiled: PooledEngine, reference: EmoForCausalLM) -> None:
    prompt = golden().prompts[0]
    params = compiled.params("code", n=4, temperature=1.0, seed=7, max_tokens=6, logprobs=0)
    (output,) = compiled.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    assert len(output.outputs) == 4
    kept = masks(golden_pools()["code"], "shared1")
    for answer in output.outputs:
        ids = prompt + list(answer.token_ids)
        theirs = logprobs(reference, [ids], pool=kept)[0, len(prompt) - 1 :]
        got = chosen_logprobs(answer.logprobs, answer.token_ids)
        assert got == pytest.approx(theirs.tolist(), abs=TOLERANCE)


def test_a_request_without_a_pool_uses_row_0(compiled: PooledEngine) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    ids = golden().prompts[0]
    (output,) = compiled.llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    got = chosen_logprobs(output.prompt_logprobs[1:], ids[1:])
    assert got == pytest.approx(golden().prompt_logprobs["full"][0], abs=TOLERANCE)


# -- worker calls --


def test_a_failing_call_is_answered_and_harms_no_request(compiled: PooledEngine) -> None:
    for copies in ([[0, 99, 0]], [[0, 0, 32]], [[0, -1, 0]], [[7, 0, 0]], [["x"]]):
        (answer,) = compiled.llm.collective_rpc("emo_start_load", args=(41, 1000, copies))
        assert answer["call_id"] == 41 and not answer["ok"] and answer["error"]
    args = (41, 1000, 0, [[0]] * 3, 1.0)
    (answer,) = compiled.llm.collective_rpc("emo_finish_load", args=args)
    assert not answer["ok"] and "load 1000 is not the last" in answer["error"]
    (answer,) = compiled.llm.collective_rpc("emo_publish_pool", args=(42, 99, [[0]] * 3, 1.0))
    assert not answer["ok"]
    assert worst_difference(compiled) < TOLERANCE


def test_router_temperature_is_the_pools(compiled: PooledEngine, reference: EmoForCausalLM) -> None:
    ids = golden().prompts[0]
    experts = golden_pools()["law"]
    try:
        compiled.call("emo_publish_pool", compiled.rows["law"], experts, 2.5)
        (got,) = compiled.prompt_logprobs([("law", ids)])
    finally:
        compiled.call("emo_publish_pool", compiled.rows["law"], experts, 1.0)
    theirs = logprobs(reference, [ids], pool=masks(experts, "shared1"), temperature=2.5)[0]
    assert got == pytest.approx(theirs.tolist(), abs=TOLERANCE)
    assert worst_difference(compiled) < TOLERANCE


# -- what the router did --


def router_logits(model: EmoForCausalLM, ids: list[int], pool: str) -> list[torch.Tensor]:
    """Return the reference's gate logits [T, E] of each layer, on the pool's path."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, -2)))
        for layer in model.model.layers
    ]
    try:
        with torch.no_grad():
            model(torch.tensor([ids]), pool=masks(golden_pools()[pool], "shared1"))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def test_the_engine_records_what_the_router_does(
    compiled: PooledEngine, reference: EmoForCausalLM
) -> None:
    """Coverage by request, mass by slot and usage by pool, of prompts and of what follows them."""
    moes = reference.config.moe_layers
    pools = list(golden_pools())
    requests = [(pool, prompt) for prompt in golden().prompts for pool in pools]
    before = {pool: compiled.call("emo_usage", golden_pools()[pool], 1.0)[0] for pool in pools}
    compiled.call("emo_read_coverage")
    prompts = [{"prompt_token_ids": ids} for _, ids in requests]
    for argument in (MASS_SLOT_ARG, ACCOUNT_ARG):  # the first are questions of the server's own
        params = []
        for account, (pool, _) in enumerate(requests, 1):
            params.append(compiled.params(pool, max_tokens=5, ignore_eos=True))
            values = {MASS_SLOT_ARG: pools.index(pool), ACCOUNT_ARG: account}
            params[-1].extra_args[argument] = values[argument]
            params[-1].skip_reading_prefix_cache = True
        outputs = compiled.llm.generate(prompts, params, use_tqdm=False)
    (coverage,) = (answer["coverage"] for answer in compiled.call("emo_read_coverage"))
    assert sorted(account for account, _, _ in coverage) == list(range(1, len(requests) + 1))
    found = {account: (mass, tokens) for account, mass, tokens in coverage}
    masses = {pool: [torch.zeros(moe.num_experts).double() for moe in moes] for pool in pools}
    routed = dict.fromkeys(pools, 0)
    for account, ((pool, prompt), output) in enumerate(zip(requests, outputs, strict=True), 1):
        ids = [*prompt, *output.outputs[0].token_ids[:-1]]  # the last one is not routed
        shares = []
        for index, (moe, logits) in enumerate(
            zip(moes, router_logits(reference, ids, pool), strict=True)
        ):
            probabilities = router_probabilities(logits, moe)
            masses[pool][index] += probabilities.double().sum(0)
            standard = range(moe.num_experts - moe.num_shared_experts)
            inside = [e for e in golden_pools()[pool][index] if e in standard]
            shares.append(probabilities[:, inside].sum(-1))
        mass, tokens = found[account]
        assert tokens == len(ids)
        assert mass == pytest.approx(float(torch.stack(shares).mean(0).sum()), abs=1e-4 * tokens)
        routed[pool] += tokens
    for slot, pool in enumerate(pools):
        (mass,) = compiled.call("emo_read_mass", slot)
        assert mass["tokens"] == routed[pool]
        for layer, expected in zip(mass["layers"], masses[pool], strict=True):
            assert layer == pytest.approx(expected.tolist(), abs=1e-4 * routed[pool])
        (emptied,) = compiled.call("emo_read_mass", slot)
        assert emptied["tokens"] == 0 and not any(map(any, emptied["layers"]))
    for pool in pools:
        (usage,) = compiled.call("emo_usage", golden_pools()[pool], 1.0)
        assert usage["tokens"] - before[pool]["tokens"] == routed[pool]
        for moe, kept, old, new in zip(
            moes, golden_pools()[pool], before[pool]["counts"], usage["counts"], strict=True
        ):
            taken = [b - a for a, b in zip(old, new, strict=True)]
            choices = routed[pool] * min(moe.top_k, len(kept))
            assert sum(taken) == pytest.approx(choices, abs=moe.num_experts)  # rounded, each
            assert all(taken[e] == routed[pool] for e in moe.implied)
            assert {e for e, count in enumerate(taken) if count} <= set(kept)
