"""The training rule, the batches, and whole runs of a model of toy size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from emo_serve.demo.training.release import release_model
from emo_serve.demo.training.tokenizer import train_tokenizer
from emo_serve.demo.training.train import Batches, EmoPools, Recipe, demo_config, initialise, train
from emo_serve.emo.checkpoint import Checkpoint, load_model
from emo_serve.emo.config import EmoConfig
from emo_serve.emo.model import EmoForCausalLM, EmoMoe
from emo_serve.pools.document import read_pool

TINY_RECIPE = Recipe(emo=True, stages=((16, 6), (32, 4)), documents_per_step=2, warmup_steps=2)


def _tiny_config() -> EmoConfig:
    return EmoConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=8,
        num_shared_experts=1,
        num_experts_per_tok=3,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Two domains of disjoint ids, three documents each, ids counting up."""
    arrays = {}
    for domain, first in (("letters", 2), ("numbers", 32)):
        arrays[f"{domain}.ids"] = (first + np.arange(1500) % 30).astype(np.uint16)
        arrays[f"{domain}.ends"] = np.array([400, 800, 1500])
    np.savez(tmp_path / "tokens.npz", **arrays)
    return tmp_path / "tokens.npz"


# -- EMO's rule --


def test_pools_hold_the_documents_own_best_experts() -> None:
    pools = EmoPools(smallest=3, num_shared=1, generator=torch.Generator().manual_seed(0))
    logits_BTE = torch.randn(64, 12, 9, generator=torch.Generator().manual_seed(1))
    pool_BE = pools(logits_BTE)
    assert pool_BE[:, -1].all(), "the shared expert belongs to every pool"
    sizes = pool_BE[:, :-1].sum(-1)
    assert sizes.min() >= 3
    assert sizes.max() <= 8
    assert len(sizes.unique()) > 3, "sizes differ from document to document"
    mass_BS = logits_BTE[..., :8].softmax(-1).sum(1)
    for pool_E, mass_S in zip(pool_BE[:, :-1], mass_BS, strict=True):
        outside = mass_S[~pool_E]
        assert not len(outside) or mass_S[pool_E].min() >= outside.max()


def test_training_keeps_every_token_inside_its_documents_pool() -> None:
    model = EmoForCausalLM(_tiny_config())
    initialise(model)
    model.train()
    chosen: list[torch.Tensor] = []
    rule = EmoPools(smallest=2, num_shared=1, generator=torch.Generator().manual_seed(0))

    def choose(logits_BTE: torch.Tensor) -> torch.Tensor:
        chosen.append(rule(logits_BTE))
        return chosen[-1]

    for moe in (m for m in model.modules() if isinstance(m, EmoMoe)):
        moe.choose_pool = choose
    record: list = []
    model(torch.randint(2, 64, (4, 20)), record=record)
    assert len(chosen) == len(record) == 2
    for pool_BE, router in zip(chosen, record, strict=True):
        taken_BK = router.experts_NK.view(4, -1)
        assert pool_BE.gather(1, taken_BK).all()


# -- batches --


def test_batches_stay_inside_documents_and_take_domains_in_turn(tokens: Path) -> None:
    batches = Batches(tokens, documents_per_step=2, seed=0)
    assert batches.domains == ["letters", "numbers"]
    for batch_BT in batches.draw(32, 20):
        assert batch_BT.shape == (2, 33)
        assert (batch_BT[:, 0] == 0).all()
        assert sorted((batch_BT[:, 1:] >= 32).float().mean(1).tolist()) == [0.0, 1.0]
        steps = batch_BT[:, 2:] - batch_BT[:, 1:-1]
        assert ((steps == 1) | (steps == -29)).all(), "a window crossed from document to document"


# -- whole runs --


def test_learning_rate_warms_up_holds_and_falls(tokens: Path, tmp_path: Path) -> None:
    from emo_serve.demo.training.train import _Trainer

    trainer = _Trainer(EmoForCausalLM(_tiny_config()), TINY_RECIPE)
    rates = []
    for step in range(TINY_RECIPE.total_steps):
        trainer.steps_done = step
        rates.append(trainer.learning_rate() / TINY_RECIPE.learning_rate)
    assert rates[0] == pytest.approx(0.5)
    assert rates[1:7] == pytest.approx([1.0] * 6)
    assert rates[7:] == sorted(rates[7:], reverse=True)
    assert rates[-1] < 0.3


def test_training_learns_and_repeats_itself(tokens: Path, tmp_path: Path) -> None:
    fast = {"learning_rate": 1e-2, "warmup_steps": 5}
    long = Recipe(emo=True, stages=((16, 60),), documents_per_step=4, **fast)
    first = train(long, _tiny_config(), tokens, tmp_path / "first")
    second = train(long, _tiny_config(), tokens, tmp_path / "second")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    ids_BT = next(Batches(tokens, 2, seed=9).draw(32, 1))
    with torch.no_grad():
        logits_BTV = first(ids_BT[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())
    assert loss < 3.0  # ln 64 = 4.16 at the start


def test_the_twin_differs_by_the_rule_alone(tokens: Path, tmp_path: Path) -> None:
    twin = Recipe(**{**vars(TINY_RECIPE), "emo": False})
    made: list[int] = []
    emo_model = train(TINY_RECIPE, _tiny_config(), tokens, tmp_path / "emo", advance=made.append)
    assert sum(made) == TINY_RECIPE.total_steps
    twin_model = train(twin, _tiny_config(), tokens, tmp_path / "twin")
    rules = [m.choose_pool for m in emo_model.modules() if isinstance(m, EmoMoe)]
    assert all(isinstance(rule, EmoPools) for rule in rules)
    assert not any(m.choose_pool for m in twin_model.modules() if isinstance(m, EmoMoe))


def test_a_release_has_all_that_ships(tokens: Path, tmp_path: Path) -> None:
    tokenizer: Tokenizer = train_tokenizer(["some text to learn from, 123"] * 5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout/letters.jsonl").write_text('{"document": "a", "text": "abc"}\n')
    config = _tiny_config()
    config.num_experts_per_tok = 3
    model = EmoForCausalLM(config)
    initialise(model)
    release_model("tiny", model.eval(), tmp_path, tmp_path / "out", pool_size=4)
    checkpoint = Checkpoint.open(tmp_path / "out/models/tiny")
    assert load_model(tmp_path / "out/models/tiny").config.num_experts == 8
    for domain in ("letters", "numbers"):
        pool = read_pool(tmp_path / f"out/pools/tiny/{domain}.json")
        pool.check_fits(config.moe_layers, checkpoint.fingerprint(), domain)
        assert [len(experts) for experts in pool.expert_ids] == [4, 4]
        assert all(layer is not None and len(layer.scores or ()) == 8 for layer in pool.layers)
    assert (tmp_path / "out/heldout/letters.jsonl").exists()


def test_the_demos_config_is_the_released_layout() -> None:
    config = demo_config()
    (moe,) = set(config.moe_layers)
    assert moe is not None
    assert (moe.num_experts, moe.num_shared_experts, moe.top_k) == (32, 1, 4)
