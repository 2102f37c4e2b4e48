"""The plugin in real vLLM engines: each request computes inside its own pool, however it is run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from emo_serve.emo.checkpoint import Checkpoint, load_model
from emo_serve.emo.model import EmoForCausalLM
from emo_serve.emo.routing import router_probabilities
from emo_serve.vllm_plugin.contract import ACCOUNT_ARG, MASS_SLOT_ARG
from tests.support.golden.checkpoints import CASES, golden, pools_of, prompts_of, write_checkpoint
from tests.support.golden_run import golden_pools, worst_difference
from tests.support.offline_engine import SMALL, PooledEngine, chosen_logprobs, pooled_engine
from tests.unit.emo.test_model import logprobs, masks

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-3  # nats per token in float32, as asked; a few 1e-6 are met


@pytest.fixture(scope="module")
def shared1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("shared1"))


@pytest.fixture(scope="module")
def reference(shared1: Path) -> EmoForCausalLM:
    return load_model(shared1)


@pytest.fixture(scope="module")
def compiled(shared1: Path) -> Iterator[PooledEngine]:
    """An engine with vLLM's default compilation."""
    with pooled_engine(shared1, golden_pools(), enforce_eager=False) as engine:
        yield engine
    gc.collect()


@pytest.fixture(scope="module")
def tight(shared1: Path) -> Iterator[PooledEngine]:
    """An engine that must chunk prompts, reuse prefixes and preempt: few tokens, few blocks."""
    with pooled_engine(
        shared1,
        golden_pools(),
        max_num_batched_tokens=24,
        block_size=32,
        num_gpu_blocks_override=14,
        max_model_len=256,
        enable_prefix_caching=True,
        disable_log_stats=False,
    ) as engine:
        yield engine
    gc.collect()


def assert_greedy(
    model: EmoForCausalLM, pool: str, prompt: list[int], tokens: Sequence[int]
) -> list[float]:
    """Assert that the reference would have chosen each of these tokens; return their logprobs.

    A tie within the tolerance counts: two implementations may break it differently.
    """
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = model(ids, pool=masks(golden_pools()[pool], "shared1"))
    scores = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert (scores.max(-1).values - chosen).max() < TOLERANCE, (pool, list(tokens))
    return chosen.tolist()  # type: ignore[no-any-return]


def metric(engine: PooledEngine, name: str) -> float:
    return sum(m.value for m in engine.llm.get_metrics() if m.name == name)


# -- golden values --


def test_golden_values_compiled(compiled: PooledEngine) -> None:
    assert worst_difference(compiled) < TOLERANCE


def test_golden_values_chunked(tight: PooledEngine) -> None:
    assert worst_difference(tight) < TOLERANCE  # 40-token prompts, 24 tokens a step


def test_golden_values_in_plain_vllm(shared1: Path) -> None:
    llm = LLM(str(shared1), **SMALL)
    try:
        engine = PooledEngine(llm, {"full": golden_pools()["full"]})
        assert worst_difference(engine) < TOLERANCE
        for row in (1, 99, -1, -2, 2**40, "math", None, [0]):  # a client may send anything
            engine.rows["full"] = row  # type: ignore[assignment]
            assert worst_difference(engine, prompts=[0]) < TOLERANCE, row
    finally:
        llm.llm_engine.engine_core.shutdown()


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


def test_preempted_requests_keep_their_pools(
    tight: PooledEngine, reference: EmoForCausalLM
) -> None:
    before = metric(tight, "vllm:num_preemptions")
    requests = [(pool, ids) for ids in golden().prompts for pool in tight.rows]
    params = [tight.params(pool, max_tokens=40, ignore_eos=True) for pool, _ in requests]
    prompts = [{"prompt_token_ids": ids, "cache_salt": pool} for pool, ids in requests]
    outputs = tight.llm.generate(prompts, params, use_tqdm=False)
    assert metric(tight, "vllm:num_preemptions") > before, "the test no longer preempts"
    for (pool, ids), output in zip(requests, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == 40
        assert_greedy(reference, pool, ids, output.outputs[0].token_ids)


def test_prefixes_are_reused_within_a_salt_only(
    tight: PooledEngine, reference: EmoForCausalLM
) -> None:
    prompt = (golden().prompts[0] + golden().prompts[1])[:64]

    def run(pool: str) -> int:
        request = {"prompt_token_ids": prompt, "cache_salt": pool}
        params = tight.params(pool, max_tokens=4)
        (output,) = tight.llm.generate(request, params, use_tqdm=False)
        assert_greedy(reference, pool, prompt, output.outputs[0].token_ids)
        return int(output.num_cached_tokens)

    tight.llm.reset_prefix_cache()
    assert [run("math"), run("math"), run("code"), run("math")] == [0, 32, 0, 32]


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


def test_only_wanted_experts_are_read(shared1: Path) -> None:
    pools = {name: golden().pools[name] for name in ("math", "code")}
    wanted = [len({e for pool in pools.values() for e in pool[layer]}) for layer in range(3)]
    with pooled_engine(shared1, pools) as engine:
        (described,) = engine.call("emo_describe")
        requests = [(pool, ids) for pool in pools for ids in golden().prompts]
        got = engine.prompt_logprobs(requests)
    assert described["num_slots"] == [max(wanted)] * 3 and max(wanted) < 32
    expert_bytes = 3 * 64 * 128 * 2
    checkpoint = Checkpoint.open(shared1)
    trunk = sum(checkpoint.tensor(name).nbytes for name in checkpoint.trunk_names())
    assert described["bytes_read"] == trunk + sum(wanted) * expert_bytes
    assert (described["disk_reads"], described["host_hits"]) == (sum(wanted), 0)
    for (pool, ids), mine in zip(requests, got, strict=True):
        row = golden().prompts.index(ids)
        assert mine == pytest.approx(golden().prompt_logprobs[pool][row], abs=TOLERANCE)


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
