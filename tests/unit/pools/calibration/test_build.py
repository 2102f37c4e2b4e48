"""Each method against the same thing written plainly: every golden case and the shipped model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emo_serve import demo
from emo_serve.checkpoints.checkpoint import ExpertWeights
from emo_serve.checkpoints.tensor_file import TensorFile
from emo_serve.emo.checkpoint import Checkpoint, load_model
from emo_serve.emo.model import EmoForCausalLM
from emo_serve.errors import CheckpointError, ConfigError
from emo_serve.pools.calibration import METHODS
from emo_serve.pools.calibration.build import calibrate, num_steps
from emo_serve.pools.calibration.findings import Calibration
from emo_serve.pools.pool import PoolCalibration, PoolModel
from tests.support import naive_calibration as naive
from tests.support.golden.checkpoints import CASES, prompts_of, write_checkpoint

K = 6


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("golden")
    return {case: write_checkpoint(case, root / case) for case in CASES}


@cache
def _model(directory: Path) -> EmoForCausalLM:
    return load_model(directory)


def _documents(case: str) -> list[Tensor]:
    """Return three documents of different lengths."""
    return [torch.tensor(ids[:n]) for ids, n in zip(prompts_of(case), (40, 17, 5), strict=True)]


def _shipped_documents(count: int) -> list[Tensor]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo.model_dir() / "tokenizer.json"))
    return [torch.tensor(tokenizer.encode(t).ids[:96]) for t in demo.heldout("math")[:count]]


def assert_scores(found: Calibration, expected: naive.Scores, tolerance: float = 1e-5) -> None:
    assert len(found.layers) == len(expected)
    for layer, scores in zip(found.layers, expected, strict=True):
        assert (layer is None) == (scores is None)
        if layer is not None:
            assert layer.scores == pytest.approx(scores, rel=tolerance, abs=tolerance * 0.1)


def kept(found: Calibration) -> list[list[int]]:
    return [[] if layer is None else list(layer.experts) for layer in found.layers]


# -- the methods --


@pytest.mark.parametrize("case", CASES)
def test_router_is_the_mean_softmax_of_the_full_model(
    directories: dict[str, Path], case: str
) -> None:
    documents, directory = _documents(case), directories[case]
    found = calibrate(Checkpoint.open(directory), documents, K, "router")
    assert_scores(found, naive.router_scores(_model(directory), documents))
    for layer, ids, moe in zip(
        found.layers, kept(found), _model(directory).config.moe_layers, strict=True
    ):
        if layer is not None and moe is not None:
            assert ids == naive.best(layer.scores, K, moe)


@pytest.mark.parametrize("case", CASES)
def test_layerwise_is_restrict_and_run_all(directories: dict[str, Path], case: str) -> None:
    documents, directory = _documents(case), directories[case]
    found = calibrate(Checkpoint.open(directory), documents, K)
    scores, experts = naive.layerwise(_model(directory), documents, K)
    assert found.method == "layerwise"
    assert_scores(found, scores)
    assert kept(found) == experts


@pytest.mark.parametrize("case", CASES)
def test_easy_ep_is_a_loop_over_tokens(directories: dict[str, Path], case: str) -> None:
    documents, directory = _documents(case), directories[case]
    found = calibrate(Checkpoint.open(directory), documents, K, "easy-ep")
    assert_scores(found, naive.easy_ep_scores(_model(directory), documents), tolerance=1e-3)


def test_the_shipped_model(tmp_path: Path) -> None:
    documents = _shipped_documents(3)
    checkpoint, model = Checkpoint.open(demo.model_dir()), _model(demo.model_dir())
    found = calibrate(checkpoint, documents, 8)
    scores, experts = naive.layerwise(model, documents, 8)
    assert_scores(found, scores)
    assert kept(found) == experts
    router = calibrate(checkpoint, documents, 8, "router")
    assert_scores(router, naive.router_scores(model, documents))
    easy = calibrate(checkpoint, documents, 8, "easy-ep")
    assert_scores(easy, naive.easy_ep_scores(model, documents), tolerance=1e-3)
    # the restriction shows, so that the two comparisons above are not one
    assert [layer and layer.scores for layer in router.layers] != [
        layer and layer.scores for layer in found.layers
    ]


def test_random_is_drawn_from_its_seed_and_needs_no_text(directories: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(directories["shared1"])
    first = calibrate(checkpoint, [], K, "random", seed=3)
    again = calibrate(checkpoint, _documents("shared1"), K, "random", seed=3)
    other = calibrate(checkpoint, [], K, "random", seed=4)
    assert kept(first) == kept(again) != kept(other)
    assert first.coverage is None
    assert first.bytes_read == 0
    assert again.coverage is not None
    pool = first.pool("random")
    assert pool.cut(3, checkpoint.config.moe_layers).expert_ids != pool.expert_ids


@pytest.mark.parametrize("method", METHODS)
def test_the_same_run_gives_the_same_pool(directories: dict[str, Path], method: str) -> None:
    checkpoint, documents = Checkpoint.open(directories["shared1"]), _documents("shared1")
    first = calibrate(checkpoint, documents, K, method, seed=1)
    assert calibrate(checkpoint, documents, K, method, seed=1) == first


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["shared2-gqa", "always-active", "dense-first", "norm-topk"])
def test_implied_experts_are_kept_and_sizes_are_right(
    directories: dict[str, Path], case: str, method: str
) -> None:
    checkpoint = Checkpoint.open(directories[case])
    found = calibrate(checkpoint, _documents(case), K, method)
    for layer, moe in zip(found.layers, checkpoint.config.moe_layers, strict=True):
        assert (layer is None) == (moe is None)
        if layer is not None and moe is not None:
            assert moe.implied <= set(layer.experts)
            assert len(layer.experts) == K
            assert len(layer.scores) == moe.num_experts
    found.pool("p").check_fits(checkpoint.config.moe_layers, None, "p")


def test_one_short_document_is_enough(directories: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(directories["shared1"])
    found = calibrate(checkpoint, [torch.tensor([5])], K)
    assert [len(ids) for ids in kept(found)] == [K] * 3
    assert (found.documents, found.tokens) == (1, 1)


def test_a_layer_smaller_than_the_pool_keeps_all(directories: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(directories["dense-first"])
    found = calibrate(checkpoint, _documents("dense-first"), 20)
    assert [len(ids) for ids in kept(found)] == [0, 20, 12]


def test_documents_do_not_see_each_other(directories: dict[str, Path]) -> None:
    checkpoint, documents = Checkpoint.open(directories["shared1"]), _documents("shared1")
    forth, back = (calibrate(checkpoint, order, K) for order in (documents, documents[::-1]))
    for one, other in zip(forth.layers, back.layers, strict=True):
        assert one is not None
        assert other is not None
        assert one.scores == pytest.approx(other.scores, rel=1e-5)


# -- what is read --


class Reads:
    """Every expert read through the checkpoint, and every byte of one read through the files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.experts: list[tuple[int, int]] = []
        self.tensors: set[str] = set()
        whole, tensor = Checkpoint.expert, TensorFile.read

        def expert(checkpoint: Checkpoint, layer: int, expert: int) -> ExpertWeights:
            self.experts.append((layer, expert))
            return whole(checkpoint, layer, expert)

        def read(file: TensorFile, name: str) -> Tensor:
            self.tensors.add(name)
            return tensor(file, name)

        monkeypatch.setattr(Checkpoint, "expert", expert)
        monkeypatch.setattr(TensorFile, "read", read)

    def of_layer(self, layer: int) -> set[int]:
        """Return the experts of a layer of which any tensor was read."""
        prefix = f"model.layers.{layer}.mlp.experts."
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {int(name.removeprefix(prefix).partition(".")[0]) for name in names}


@pytest.mark.parametrize("method", ["layerwise", "random"])
@pytest.mark.parametrize("case", CASES)
def test_no_more_than_the_kept_experts_are_ever_read(
    directories: dict[str, Path], case: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(directories[case])
    reads = Reads(monkeypatch)
    found = calibrate(checkpoint, _documents(case), K, method)
    assert len(reads.experts) == len(set(reads.experts)), "an expert was read twice"
    for index, ids in enumerate(kept(found)):
        assert reads.of_layer(index) <= set(ids)
        assert len(reads.of_layer(index)) == found.experts_read[index] <= K
    assert reads.of_layer(1), "the walk did read experts"
    assert found.bytes_read == sum(found.experts_read) * checkpoint.expert_bytes


def test_a_token_with_fewer_experts_than_places_reads_no_other(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)  # the places left over carry id 0 and weight 0
    found = calibrate(Checkpoint.open(directories["shared1"]), _documents("shared1"), 2)
    for index, ids in enumerate(kept(found)):
        assert reads.of_layer(index) <= set(ids)


def test_one_expert_is_held_at_a_time(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    whole = Checkpoint.expert

    def expert(checkpoint: Checkpoint, layer: int, expert: int) -> ExpertWeights:
        nonlocal most
        weights = whole(checkpoint, layer, expert)
        alive.append(weakref.ref(weights.gate_FD))
        most = max(most, sum(ref() is not None for ref in alive))
        return weights

    monkeypatch.setattr(Checkpoint, "expert", expert)
    calibrate(Checkpoint.open(directories["shared1"]), _documents("shared1"), K, "easy-ep")
    assert len(alive) > 3 * K
    assert most <= 2, "the one before may still have its name when the next is read"


@pytest.mark.parametrize("method", METHODS)
def test_progress_never_passes_what_was_announced(
    directories: dict[str, Path], method: str
) -> None:
    checkpoint, documents = Checkpoint.open(directories["dense-first"]), _documents("dense-first")
    steps: list[int] = []
    calibrate(checkpoint, documents, K, method, advance=steps.append)
    assert 0 < sum(steps) <= num_steps(checkpoint.facts, method, K, len(documents))


# -- coverage --


def test_coverage_is_the_routers_mass_in_the_pool_along_the_restricted_path(
    directories: dict[str, Path],
) -> None:
    documents, directory = _documents("shared1"), directories["shared1"]
    found = calibrate(Checkpoint.open(directory), documents, K)
    scores, experts = naive.layerwise(_model(directory), documents, K)
    shares = [
        sum((layer or [])[e] for e in ids if e != 31)
        for layer, ids in zip(scores, experts, strict=True)
    ]
    assert found.coverage == pytest.approx(sum(shares) / 3, rel=1e-5)


def test_all_experts_cover_everything(directories: dict[str, Path]) -> None:
    for case, experts in (("shared1", 32), ("always-active", 16), ("dense-first", 24)):
        found = calibrate(Checkpoint.open(directories[case]), _documents(case), experts)
        assert found.coverage == pytest.approx(1.0)
        assert found.own_coverage == pytest.approx(1.0)


def test_one_document_has_the_coverage_of_its_own_pool(directories: dict[str, Path]) -> None:
    checkpoint, documents = Checkpoint.open(directories["shared1"]), _documents("shared1")
    alone = calibrate(checkpoint, documents[:1], K)
    assert alone.coverage == pytest.approx(alone.own_coverage)
    together = calibrate(checkpoint, documents, K)
    assert together.coverage is not None
    assert together.own_coverage is not None
    assert together.coverage < together.own_coverage


# -- the pool, and refusals --


def test_the_pool_says_how_it_was_found_and_keeps_every_score(
    directories: dict[str, Path],
) -> None:
    checkpoint = Checkpoint.open(directories["shared1"])
    found = calibrate(checkpoint, _documents("shared1"), K, seed=2)
    made_for = PoolModel("m", "f", ((31,),) * 3)
    pool = found.pool("math", made_for, "of math")
    assert pool.calibration == PoolCalibration("layerwise", 3, 62, 2, K)
    assert (pool.model, pool.description) == (made_for, "of math")
    assert all(layer is not None and len(layer.scores or ()) == 32 for layer in pool.layers)
    assert pool.cut(K, checkpoint.config.moe_layers) == pool
    assert pool.cut(K) == pool, "the file alone is enough"
    assert [len(ids) for ids in pool.cut(3).expert_ids] == [3] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((K, "greedy"), "unknown method 'greedy'; give one of layerwise, router, easy-ep, random"),
        ((33, "router"), "a pool of 33 experts per layer is more than the model has: 32 at most"),
        ((0, "router"), "a pool of 0 experts per layer is too small: layer 0 needs at least 1"),
        ((K, "random", -1), "seed is -1"),
    ],
)
def test_what_the_model_cannot_have_is_refused(
    directories: dict[str, Path], arguments: Sequence[object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        calibrate(Checkpoint.open(directories["shared1"]), _documents("shared1"), *arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_fewer_than_the_implied_experts_are_refused(directories: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(directories["dense-first"])
    with pytest.raises(ConfigError, match="layer 1 needs at least 2"):
        calibrate(checkpoint, _documents("dense-first"), 1)


@pytest.mark.parametrize("documents", [[], [torch.tensor([], dtype=torch.int64)]])
def test_no_text_is_refused(directories: dict[str, Path], documents: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        calibrate(Checkpoint.open(directories["shared1"]), documents, K)


def test_a_trunk_that_does_not_fit_the_config_is_refused(tmp_path: Path) -> None:
    import json

    directory = write_checkpoint("shared1", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))
    with pytest.raises(
        CheckpointError, match=r"k_proj.weight has shape \(128, 128\), the config says \(64, 128\)"
    ):
        calibrate(Checkpoint.open(directory), _documents("shared1"), K)
