"""What the memory-accuracy benchmark measures through HTTP is the reference model's loss."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
import torch.nn.functional as F

from benchmarks.accuracy.pools import Case, build_pools
from benchmarks.accuracy.scoring import Endpoint, score_domain
from benchmarks.accuracy.servers import memory_of, pools_served
from benchmarks.accuracy.texts import Domain, Question, Text
from emo_serve.demo.training.evaluate import pool_masks
from emo_serve.emo.checkpoint import Checkpoint, load_model
from tests.support.golden.checkpoints import prompts_of
from tests.support.server_process import RunningServer

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-3  # nats per token


def test_loss_and_accuracy_are_the_reference_models(
    http: httpx.Client, golden_checkpoint: Path, golden_pools: Path
) -> None:
    checkpoint, model = Checkpoint.open(golden_checkpoint), load_model(golden_checkpoint)
    config = checkpoint.config
    texts = [Text(str(number), tuple(ids)) for number, ids in enumerate(prompts_of("shared1"))]
    cases = [Case("full", 99), Case("router", 4), Case("layerwise", 3, 1, seed=2, temperature=2.0)]
    pools = build_pools(checkpoint, "d", [text.ids for text in texts], cases)
    endpoint = Endpoint(http)
    with pools_served(endpoint, list(pools.values())):
        for case, pool in pools.items():
            logits = [
                model(
                    torch.tensor([text.ids]),
                    pool=pool_masks(pool, config),
                    temperature=case.temperature,
                )[0].log_softmax(-1)
                for text in texts
            ]
            # The first choice of each text's last token, against the least likely one.
            ends = [logits_TV[-1] for logits_TV in logits]
            questions = tuple(
                Question(
                    tuple(
                        (*text.ids, int(end.argmax() if place == n % 2 else end.argmin()))
                        for place in range(2)
                    ),
                    (len(text.ids),) * 2,
                    n % 2,
                )
                for n, (text, end) in enumerate(zip(texts, ends, strict=True))
            )
            domain = Domain("d", (), tuple(texts), questions)
            served = score_domain(endpoint, pool.name, domain)
            targets = [torch.tensor(text.ids[1:]) for text in texts]
            pairs = list(zip(logits, targets, strict=True))
            losses = [F.nll_loss(logits_TV[:-1], target_T).item() for logits_TV, target_T in pairs]
            assert served.losses == pytest.approx(losses, abs=TOLERANCE), case
            hits = torch.cat([lo[:-1].argmax(-1) == target_T for lo, target_T in pairs])
            assert served.accuracy == pytest.approx(hits.float().mean().item(), abs=0.01), case
            assert served.choices == 1, case
    for pool in pools.values():
        assert http.get(f"/v1/pools/{pool.name}").status_code == 404
        assert not (golden_pools / f"{pool.name}.json").exists()


def test_memory_is_what_the_server_reports(server: RunningServer, http: httpx.Client) -> None:
    found = memory_of(server.summary, http.get("/v1/pools").json())
    lines = dict(
        line.split()
        for line in http.get("/metrics").text.splitlines()
        if line[:1] not in "#\n" and line.startswith("emo_serve_slab_bytes ")
    )
    assert found["slab_gib"] * 2**30 == float(lines["emo_serve_slab_bytes"])
    assert 0 < found["trunk_gib"] < 0.1
    assert found["gib"] == found["trunk_gib"] + found["slab_gib"]
