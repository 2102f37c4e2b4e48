"""What a build says of its text: little, mixed, or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from emo_serve import demo
from emo_serve.demo.training.evaluate import encode_texts
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.calibration.advice import MIXED_BOUND, PASSAGE_TOKENS, notes, passages
from emo_serve.pools.calibration.build import calibrate
from emo_serve.pools.calibration.findings import Calibration, LayerFindings


def findings(coverage: float, own: float) -> LayerFindings:
    return LayerFindings((0.0,) * 32, tuple(range(8)), coverage, own)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(demo.model_dir())


def found(**changes: object) -> Calibration:
    good = Calibration(
        method="layerwise",
        seed=0,
        k=8,
        documents=4,
        tokens=1000,
        layers=(findings(0.6, 0.62), None, findings(0.5, 0.52)),
        experts_read=(8, 0, 0),
        bytes_read=1,
    )
    return replace(good, **changes)  # type: ignore[arg-type]


def test_passages_tile_the_documents_and_are_alike() -> None:
    spans = [slice(0, 3), slice(3, 3 + 2 * PASSAGE_TOKENS), slice(515, 515 + PASSAGE_TOKENS + 1)]
    cut = list(passages(spans))
    assert [part.stop - part.start for part in cut] == [3, 256, 256, 128, 129]
    assert cut[0].start == 0
    assert all(one.stop == other.start for one, other in zip(cut, cut[1:], strict=False))


def test_coverage_is_the_mean_over_moe_layers() -> None:
    assert found().coverage == pytest.approx(0.55)
    assert found().own_coverage == pytest.approx(0.57)
    assert found(layers=(None,)).coverage is None


def test_enough_text_of_one_domain_is_not_commented(checkpoint: Checkpoint) -> None:
    assert notes(found(), checkpoint.config) == []


def test_little_text_is_told_with_the_bound(checkpoint: Checkpoint) -> None:
    (note,) = notes(found(tokens=255), checkpoint.config)
    assert note.startswith("255 tokens are little text: with fewer than 256")
    assert notes(found(tokens=256), checkpoint.config) == []
    assert notes(found(tokens=0, documents=0, method="random"), checkpoint.config) == []


def test_mixed_text_is_told_with_the_bound(checkpoint: Checkpoint) -> None:
    mixed = found(layers=(findings(0.5, 0.7),))
    (note,) = notes(mixed, checkpoint.config)
    assert "mix domains: this pool covers 0.71 of" in note
    assert str(MIXED_BOUND) in note
    assert notes(replace(mixed, method="random"), checkpoint.config) == [], (
        "that is no text's fault"
    )
    assert notes(replace(mixed, documents=32), checkpoint.config) == [], "too short to tell"
    at_bound = found(layers=(findings(MIXED_BOUND, 1.0),))
    assert notes(at_bound, checkpoint.config) == []


def test_a_pool_smaller_than_a_tokens_experts_is_told(checkpoint: Checkpoint) -> None:
    assert notes(found(k=3), checkpoint.config) == [
        "the pool keeps 3 experts per layer, fewer than the 4 that a token takes"
    ]
    assert notes(found(k=4), checkpoint.config) == []


def test_domains_of_the_shipped_model_are_told_apart(checkpoint: Checkpoint) -> None:
    """The bound where it was measured; benchmarks/accuracy/calibration.py has the whole table."""
    texts = {
        domain: [
            ids_T[:PASSAGE_TOKENS]
            for ids_T in encode_texts(demo.model_dir(), demo.heldout(domain)[-4:])
        ]
        for domain in ("arithmetic", "math", "python", "spanish")
    }
    for documents in texts.values():
        assert not any(
            "mix" in note for note in notes(calibrate(checkpoint, documents, 4), checkpoint.config)
        )
    mixed = [documents[0] for documents in texts.values()]
    (note,) = notes(calibrate(checkpoint, mixed, 4), checkpoint.config)
    assert "mix domains" in note
    joined = [torch.cat(mixed)]  # passages of one document count as well
    assert any("mix" in note for note in notes(calibrate(checkpoint, joined, 4), checkpoint.config))
