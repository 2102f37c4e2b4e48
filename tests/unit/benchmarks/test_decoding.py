"""The stages that decode: their model is EMO, their checks can fail, loads are told apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import emo_kernels
from benchmarks.decoding import loads, stage
from benchmarks.decoding.cases import CheckFailed, Setting
from benchmarks.decoding.loads import _Bench, percentile, print_result
from benchmarks.decoding.model import DecodeModel, Geometry, Sequences, random_pools
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.run import Run
from benchmarks.kernels.timing import Deadline
from emo_kernels import reference
from emo_serve.emo.config import EmoConfig
from emo_serve.emo.model import EmoForCausalLM, EmoMoe
from tests.support.fake_cuda import pretend_streams

TINY = Geometry(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    num_experts=8,
    expert_size=16,
    top_k=3,
    num_shared=1,
    vocab_size=50,
)
SIZES = (8, 4, 2)  # of pool rows 0, 1, 2; the last is smaller than top-k
CASES = ["all 16", "pool of 8", "pool of 4", "4 pools of 4"]


@pytest.fixture(scope="module")
def model() -> DecodeModel:
    pools = random_pools(TINY, SIZES, seed=3)
    return DecodeModel(TINY, pools, torch.float32, torch.Generator().manual_seed(3))


@torch.no_grad()
def emo_of(model: DecodeModel) -> EmoForCausalLM:
    """Return the reference EMO model with the same weights."""
    config = EmoConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.expert_size,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_heads,
        num_experts=TINY.num_experts,
        num_experts_per_tok=TINY.top_k,
        num_shared_experts=TINY.num_shared,
        eos_token_id=0,
        pad_token_id=1,
    )
    emo = EmoForCausalLM(config).eval()
    emo.model.embed_tokens.weight.copy_(model.embed)
    emo.model.norm.weight.copy_(model.norm_D)
    emo.lm_head.weight.copy_(model.lm_head)
    for theirs, ours in zip(emo.model.layers, model.layers, strict=True):
        attention, slots_E = theirs.self_attn, ours.tables.slot_of_expert_E.long()
        for linear, weight in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), ours.qkv.chunk(3), strict=True
        ):
            linear.weight.copy_(weight)
        attention.o_proj.weight.copy_(ours.o_proj)
        theirs.pre_attention_layernorm.weight.copy_(ours.attention_norm_D)
        theirs.pre_feedforward_layernorm.weight.copy_(ours.moe_norm_D)
        assert isinstance(theirs.mlp, EmoMoe)
        theirs.mlp.gate.weight.copy_(ours.gate)
        theirs.mlp.w13.copy_(ours.w13[slots_E])
        theirs.mlp.w2.copy_(ours.w2[slots_E])
    return emo


@torch.no_grad()
def test_steps_of_mixed_pools_are_the_reference_models(model: DecodeModel) -> None:
    """Decode from an empty past, with a context one longer at each step, and follow greedily."""
    emo, rows_T = emo_of(model), torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    pool = [layer.tables.members_PE[rows_T] for layer in model.layers]
    ids_TN = torch.tensor([[3], [17], [29], [41]])
    batch = Sequences.random(TINY, 4, 1, torch.float32, torch.Generator().manual_seed(0))
    for length in range(1, 7):
        longer = Sequences.random(TINY, 4, length, torch.float32, torch.Generator())
        for cache, past in zip(longer.cache, batch.cache, strict=True):
            cache[:, :, :, : length - 1] = past[:, :, :, : length - 1]
        batch = longer
        batch.set_rows(rows_T.tolist())
        batch.set_next(ids_TN[:, -1], torch.tensor([length - 1]))
        logits_TV = model.step(batch, reference.pooled_moe)
        torch.testing.assert_close(logits_TV, emo(ids_TN, pool)[:, -1], atol=2e-4, rtol=2e-4)
        assert torch.equal(batch.tokens_T, logits_TV.argmax(-1))
        ids_TN = torch.cat([ids_TN, batch.tokens_T[:, None]], -1)
    assert (ids_TN[:, 1:] != ids_TN[:, :1]).any()


@torch.no_grad()
def test_a_step_replaces_the_oldest_position_alone(model: DecodeModel) -> None:
    batch = Sequences.random(TINY, 2, 5, torch.float32, torch.Generator().manual_seed(0))
    batch.set_next(torch.tensor([1, 2]), torch.tensor([13]))
    before = [cache.clone() for cache in batch.cache]
    model.step(batch, reference.pooled_moe)
    assert batch.position.item() == 14
    for old, new in zip(before, batch.cache, strict=True):
        is_changed_N = (old != new).any(-1).flatten(0, 2).any(0)
        assert is_changed_N.tolist() == [False, False, False, True, False]


def test_bytes_are_those_of_the_tensors(model: DecodeModel) -> None:
    experts = sum(layer.w13.nbytes + layer.w2.nbytes for layer in model.layers)
    num_experts = TINY.num_layers * TINY.num_experts
    assert num_experts * TINY.expert_bytes(torch.float32) == experts
    batch = Sequences.random(TINY, 3, 7, torch.float32, torch.Generator())
    assert 3 * TINY.kv_bytes(7, torch.float32) == sum(cache.nbytes for cache in batch.cache)
    width, vocab = TINY.hidden_size, TINY.vocab_size
    per_layer = 4 * width**2 + 2 * width + TINY.num_experts * width
    trunk = 2 * vocab * width + width + TINY.num_layers * per_layer
    assert model.trunk_bytes == 4 * trunk


def test_pools_have_their_sizes_and_the_shared_expert() -> None:
    geometry = Geometry()
    full, small = random_pools(geometry, (128, 16), seed=0)
    assert all(layer == frozenset(range(128)) for layer in full)
    assert all(len(layer) == 16 and 127 in layer for layer in small)
    assert len(set(small)) == geometry.num_layers


# -- measuring, with a stand-in for the graph --


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute experts by the twin in place of the kernels."""
    monkeypatch.setattr(emo_kernels, "pooled_moe", reference.pooled_moe)
    monkeypatch.setattr(emo_kernels, "route", reference.route)


def setting_of() -> Setting:
    generator = torch.Generator().manual_seed(0)
    return Setting(replace(TINY, num_experts=16), (8, 4), 4, 6, torch.float32, generator)


@torch.no_grad()
def measured(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> dict[str, Any]:
    def times(call: Callable[[], object], *_: object) -> list[float]:
        position = setting.sequences.position.clone()
        call()
        is_step = not torch.equal(position, setting.sequences.position)
        base = 1.0 if setting.sequences.pool_rows_T.eq(0).all() else 0.5  # ms; a pool halves it
        return [base, 2 * base, 3 * base] if is_step else [base, base]

    monkeypatch.setattr(stage, "repeated", times)
    return stage.measure(setting, 4, Deadline(0.01), copy_rate=2.0**30)


def test_rows_hold_rates_ratios_and_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(monkeypatch, setting_of())
    assert [row["case"] for row in found["rows"]] == CASES
    full, *pools = found["rows"]
    assert full["tokens_per_second"] == pytest.approx(2000)
    assert full["moe_share"] == pytest.approx(0.5)
    assert full["ratio_to_full"] == 1
    for row in pools:
        assert row["tokens_per_second"] == pytest.approx(4000)
        assert row["ratio_to_full"] == pytest.approx(2)
    by_case = {row["case"]: row for row in found["rows"]}
    one_slot = 2 * 3 * 32 * 16 * 4  # of both layers
    difference = by_case["pool of 8"]["device_gib"] - by_case["pool of 4"]["device_gib"]
    assert difference * 2**30 == pytest.approx(4 * one_slot)
    assert 4 < by_case["4 pools of 4"]["slots"] <= 13  # their union
    assert all(check["is_identical"] for check in found["checks"])
    stage.print_tables([{**found, "batch": 4}])
    assert "| 4 | 2,000 (1.00) | 4,000 (2.00) |" in capsys.readouterr().out


def test_a_graph_that_ignores_pools_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of()

    def capture(call: Callable[[], Any], _: torch.device) -> tuple[Callable[[], object], Any]:
        def replay_base_pool() -> object:
            setting.sequences.pool_rows_T.zero_()
            return returned.copy_(call())

        returned = call()
        return replay_base_pool, returned

    monkeypatch.setattr(stage, "capture", capture)
    with pytest.raises(CheckFailed, match=r"pool of 8, batch 4: step_error"):
        measured(monkeypatch, setting)


def test_kernels_that_ignore_pools_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def base_pool(x: Any, logits: Any, rows_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        return reference.pooled_moe(x, logits, torch.zeros_like(rows_T), *rest)

    monkeypatch.setattr(emo_kernels, "pooled_moe", base_pool)
    with pytest.raises(CheckFailed, match=r"pool of 8, batch 4: change_from_full is 0"):
        measured(monkeypatch, setting_of())


def test_kernels_unlike_their_twin_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_little_more(*args: Any) -> torch.Tensor:
        return right(*args) * 1.02

    right = reference.pooled_moe
    monkeypatch.setattr(emo_kernels, "pooled_moe", a_little_more)
    with pytest.raises(CheckFailed, match=r"all 16, batch 4: step_error is 0\.0"):
        measured(monkeypatch, setting_of())


# -- loads --


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loads take their way to a CUDA device, without one."""
    pretend_streams(monkeypatch)
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda _: None)
    monkeypatch.setattr(Run, "is_cuda", property(lambda _: True, lambda *_: None), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@torch.no_grad()
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = ["--device", "cpu", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    args = gpu._arguments()
    return _Bench(Run(args), 3).measure(Deadline(0.01))


def test_loads_change_no_answer_and_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = loaded(monkeypatch, tmp_path)
    assert len(found["answers"]) == 5
    assert all(answer["is_identical"] for answer in found["answers"].values())
    assert len(found["idle_seconds"]) == 3 and found["beside_seconds"]["loads"] >= 4
    for window in ("quiet", "loading"):
        gaps = found[window]
        assert 0 < gaps["median_ms"] <= gaps["p999_ms"] <= gaps["longest_ms"]
    print_result(found)
    printed = capsys.readouterr().out
    assert printed.startswith("calls stand in for: graph, pinned memory, side stream")
    assert "reached" not in printed and "DIFFER" not in printed


def test_loads_take_the_way_to_a_device(
    fake_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = loaded(monkeypatch, tmp_path)
    assert found["stand_ins"] == []
    assert all(answer["is_identical"] for answer in found["answers"].values())
    print_result(found)
    assert "- load_to_floor at most 2.0: " in capsys.readouterr().out


def test_a_load_into_slots_in_use_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = loads.CpuMover.move

    def into_another_slot(mover: Any, copy: tuple[int, int, int]) -> Any:
        layer, expert, slot = copy
        return right(mover, (layer, expert, (slot + 1) % 16))

    monkeypatch.setattr(loads.CpuMover, "move", into_another_slot)
    found = loaded(monkeypatch, tmp_path)
    assert not found["answers"]["of the loaded pool"]["is_identical"]
    print_result(found)
    assert "answers of the loaded pool: DIFFER" in capsys.readouterr().out


def test_a_percentile_is_a_value_that_was_met() -> None:
    values = [float(n) for n in range(1000, 0, -1)]
    assert percentile(values, 0.999) == 999.0
    assert percentile([3.0], 0.999) == 3.0
