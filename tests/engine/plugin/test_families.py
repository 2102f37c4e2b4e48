"""Models of other families on real engines: fewer slots than experts, three pools mixed.

The oracle is transformers with the experts sliced away (`benchmarks.families.oracle`).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import ModelRegistry
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from benchmarks.families.models import MODELS, write_checkpoint
from benchmarks.families.oracle import Pool, expected_logprobs, pools_of, prompts
from emo_serve.families.opening import open_checkpoint
from tests.support import golden_run
from tests.support.golden import checkpoints as golden_checkpoints
from tests.support.golden.checkpoints import RENAMED
from tests.support.offline_engine import PooledEngine, pooled_engine, started_engine

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4  # nats per token in float32, as asked
MOE = [family for family, model in MODELS.items() if model.experts]


def asked(pools: dict[str, Pool]) -> list[tuple[str, list[int]]]:
    return [(pool, ids) for ids in prompts() for pool in pools]


@dataclass(frozen=True)
class Made:
    """A checkpoint, and what each pool must answer to each prompt."""

    directory: Path
    expected: dict[str, list[list[float]]]

    def worst_difference(self, got: list[list[float]]) -> float:
        """Compare answers in the order of `asked`."""
        if len(self.expected) > 1:  # it matters which pool: the check bites
            apart = [torch.tensor(pool[0]) for pool in self.expected.values()]
            assert min((a - b).abs().max() for a, b in zip(apart, apart[1:], strict=False)) > 0.5
        theirs = [pool[row] for row in range(len(prompts())) for pool in self.expected.values()]
        return max(
            abs(a - b)
            for mine, want in zip(got, theirs, strict=True)
            for a, b in zip(mine, want, strict=True)
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every family's; all before the first engine, which changes transformers' FlexOlmo."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for family in MODELS:
        directory = write_checkpoint(family, root / family)
        expected = expected_logprobs(family, directory, pools_of(family), prompts())
        found[family] = Made(directory, expected)
    return found


def used_and_described(engine: PooledEngine, family: str) -> None:
    """Check that the router was recorded and the slots are as many as asked for."""
    model = MODELS[family]
    (described,) = engine.call("emo_describe")
    assert described["num_slots"] == (model.slots,) * (3 - len(model.dense_layers))
    for pool, kept in pools_of(family).items():
        (usage,) = engine.call("emo_usage", kept, 1.0)
        assert usage["tokens"] == sum(map(len, prompts()))
        for layer, counts in zip(kept, usage["counts"], strict=True):
            assert {e for e, count in enumerate(counts) if count} <= set(layer), pool


@pytest.mark.parametrize("family", MODELS)
def test_pools_answer_as_the_model_without_the_other_experts(
    family: str, made: dict[str, Made]
) -> None:
    pools = pools_of(family)
    slots = MODELS[family].slots or None
    with pooled_engine(made[family].directory, pools, num_slots=slots) as engine:
        got = engine.prompt_logprobs(asked(pools))
        if slots:
            used_and_described(engine, family)
    assert made[family].worst_difference(got) < TOLERANCE
    assert not op_registry_oot


def test_emo_from_before_its_rename(tmp_path: Path) -> None:
    directory = golden_checkpoints.write_checkpoint("shared1", tmp_path, **RENAMED)
    with pooled_engine(directory, golden_run.golden_pools()) as engine:
        assert golden_run.worst_difference(engine) < golden_run.TOLERANCE


def test_plain_vllm_keeps_its_own_classes(made: dict[str, Made]) -> None:
    """With emo-serve installed, and after one of our models was built in this process."""
    directory = made["mixtral"].directory
    ours = {open_checkpoint(directory).facts.architecture}
    assert ours <= set(ModelRegistry.get_supported_archs())
    with started_engine(directory) as llm:
        found = llm.apply_model(_classes)
    (classes,) = found
    assert classes == {
        "model": ["vllm.model_executor.models.mixtral.MixtralForCausalLM"],
        "runners": [f"{MoERunner.__module__}.MoERunner"] * 3,
        "experts": [f"{RoutedExperts.__module__}.RoutedExperts"] * 3,
    }


def _classes(model: torch.nn.Module) -> dict[str, list[str]]:
    def named(kind: type | None) -> list[str]:
        found = [m for m in model.modules() if kind is None or isinstance(m, kind)]
        return [f"{type(m).__module__}.{type(m).__qualname__}" for m in found]

    return {
        "model": named(None)[:1],
        "runners": named(MoERunner),
        "experts": named(RoutedExperts),
    }


@pytest.mark.parametrize("family", ["flex-olmo"])
def test_opting_out_of_an_expert_is_strict(
    family: str, made: dict[str, Made], tmp_path: Path
) -> None:
    """An expert of nan in every layer: pools without it answer as before, and read none of it."""
    pools = pools_of(family)
    out = _in_no_pool(family)
    answers, read = [], []
    for name, is_spoilt in (("whole", False), ("spoilt", True)):
        directory = shutil.copytree(made[family].directory, tmp_path / name)
        if is_spoilt:
            spoil(directory, out)
        checkpoint = open_checkpoint(directory)
        with pooled_engine(directory, pools, num_slots=MODELS[family].slots) as engine:
            answers.append(engine.prompt_logprobs(asked(pools)))
            (described,) = engine.call("emo_describe")
        read.append(described["bytes_read"])
        experts = sum(len(set().union(*layers)) for layers in zip(*pools.values(), strict=True))
        trunk = sum(checkpoint.tensor(n).nbytes for n in checkpoint.trunk_names())
        assert described["bytes_read"] == trunk + experts * checkpoint.expert_bytes
    assert answers[0] == answers[1]
    assert read[0] == read[1]


def _in_no_pool(family: str) -> list[set[int]]:
    """Return per layer the experts that no pool keeps."""
    every = set(range(MODELS[family].num_experts))
    return [every - set().union(*layers) for layers in zip(*pools_of(family).values(), strict=True)]


def spoil(directory: Path, experts: list[set[int]]) -> None:
    """Fill all weights of these experts with nan."""
    names = open_checkpoint(directory).facts.names
    path = directory / "model.safetensors"
    tensors = load_file(path)
    spoilt = 0
    for name, tensor in tensors.items():
        place = names.parse(name)
        if place is not None and place[1] in experts[place[0]]:
            tensor.fill_(float("nan"))
            spoilt += 1
    assert spoilt == 3 * sum(map(len, experts)) > 0
    save_file(tensors, path, metadata={"format": "pt"})
