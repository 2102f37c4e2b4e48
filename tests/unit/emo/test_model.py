"""The reference model against the released implementation and against an independent third one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emo_serve.emo.checkpoint import load_model, save_checkpoint
from emo_serve.emo.model import EmoForCausalLM, _GroupedExperts
from tests.support.golden.checkpoints import (
    CASES,
    config_of,
    experts_of,
    golden,
    pools_of,
    prompts_of,
    write_checkpoint,
)
from tests.support.naive_emo import NaiveEmo

NAIVE_CASES = [case for case in CASES if case not in ("yarn", "llama3")]  # naive knows no yarn


def masks(pool: list[list[int]], case: str) -> list[torch.Tensor]:
    experts, _ = experts_of(config_of(case))
    return [
        torch.isin(torch.arange(n), torch.tensor(p)) for n, p in zip(experts, pool, strict=True)
    ]


@torch.no_grad()
def logprobs(model: EmoForCausalLM, prompts: list[list[int]], **kwargs: object) -> torch.Tensor:
    ids = torch.tensor(prompts)
    everything = model(ids, **kwargs).log_softmax(-1)[:, :-1]
    return everything.gather(-1, ids[:, 1:, None])[..., 0]


@pytest.fixture(scope="module")
def shared1(tmp_path_factory: pytest.TempPathFactory) -> EmoForCausalLM:
    return load_model(write_checkpoint("shared1", tmp_path_factory.mktemp("shared1")))


@pytest.mark.parametrize("name", ["full", "math", "code", "law"])
def test_released_reference_log_probabilities(shared1: EmoForCausalLM, name: str) -> None:
    pool = None if name == "full" else masks(golden().pools[name], "shared1")
    ours = logprobs(shared1, golden().prompts, pool=pool)
    torch.testing.assert_close(
        ours, torch.tensor(golden().prompt_logprobs[name]), atol=1e-4, rtol=0
    )


def test_a_wrong_pool_is_far_from_the_golden_values(shared1: EmoForCausalLM) -> None:
    wrong = logprobs(shared1, golden().prompts, pool=masks(golden().pools["code"], "shared1"))
    distance = (wrong - torch.tensor(golden().prompt_logprobs["math"])).abs().mean()
    assert distance > 0.1


@pytest.mark.parametrize("case", NAIVE_CASES)
def test_corners_of_the_config_space(case: str, tmp_path: Path) -> None:
    model, naive = load_model(write_checkpoint(case, tmp_path)), NaiveEmo(case)
    prompt = prompts_of(case)[0][:12]
    for name, pool in {"base": None, **pools_of(case)}.items():
        ours = logprobs(model, [prompt], pool=None if pool is None else masks(pool, case))[0]
        theirs = torch.tensor(naive.prompt_logprobs(prompt, pool), dtype=torch.float32)
        torch.testing.assert_close(
            ours, theirs, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_router_temperature(shared1: EmoForCausalLM) -> None:
    prompt = golden().prompts[0][:12]
    ours = logprobs(shared1, [prompt], temperature=2.5)[0]
    theirs = torch.tensor(NaiveEmo("shared1").prompt_logprobs(prompt, temperature=2.5))
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)
    assert (ours - logprobs(shared1, [prompt])[0]).abs().max() > 0.01


def test_a_pool_a_document(shared1: EmoForCausalLM) -> None:
    pools = [masks(golden().pools[name], "shared1") for name in ("math", "code", "law")]
    mixed = [torch.stack(layer) for layer in zip(*pools, strict=True)]
    together = logprobs(shared1, golden().prompts, pool=mixed)
    for row, name in enumerate(("math", "code", "law")):
        expected = torch.tensor(golden().prompt_logprobs[name][row])
        torch.testing.assert_close(together[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["shared1", "dense-first"])
def test_save_and_load_round_trip(case: str, tmp_path: Path) -> None:
    model = load_model(write_checkpoint(case, tmp_path / "a"))
    save_checkpoint(model, tmp_path / "b")
    again = load_model(tmp_path / "b")
    prompts = prompts_of(case)
    assert torch.equal(logprobs(model, prompts), logprobs(again, prompts))


def test_grouped_experts_gradients() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True)

    inputs = draw(7, 8), draw(3, 10, 8), draw(3, 8, 5)
    assert torch.autograd.gradcheck(lambda *a: _GroupedExperts.apply(*a, [3, 0, 4]), inputs)


def test_training_pool_is_imposed_a_document(shared1: EmoForCausalLM) -> None:
    allowed = torch.zeros(3, 32, dtype=torch.bool)
    allowed[0, :5], allowed[1, 5:9], allowed[2, 9:] = True, True, True
    record: list = []
    layers = [layer.mlp for layer in shared1.model.layers]
    shared1.train()
    try:
        for layer in layers:
            layer.choose_pool = lambda logits: allowed
        shared1(torch.tensor(golden().prompts), record=record)
    finally:
        for layer in layers:
            layer.choose_pool = None
        shared1.eval()
    assert [r.layer for r in record] == [0, 1, 2]
    taken = record[0].experts_NK.view(3, 40, 4)[..., :3]
    assert taken[0].max() < 5
    assert taken[1].min() >= 5 and taken[1].max() < 9
    assert taken[2].min() >= 9
