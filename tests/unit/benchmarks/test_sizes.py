"""The benchmark of sizes: its table; tests/engine has its measures against a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.by_mass import share_out
from benchmarks.accuracy.scoring import Endpoint, Token
from benchmarks.accuracy.sizes import (
    measure_by_mass,
    measure_size,
    print_report,
    with_differences,
)
from benchmarks.accuracy.texts import Domain, Question, Text
from emo_serve.pools.document import write_pool
from emo_serve.pools.pool import ExpertPool, LayerExperts, PoolModel

GIB = 2**30
SCORED = ExpertPool(
    "law",
    (
        LayerExperts((0, 3), (0.9, 0.05, 0.03, 0.02)),
        None,
        LayerExperts((1, 2), (0.5, 0.5, 0.6, 0.4)),
    ),
    model=PoolModel(implied=((3,), (), ())),
)


class Server(Endpoint):
    """A server that knows every size, and is surer the larger it is."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, method: str, path: str, **options: Any) -> Any:
        self.asked.append(f"{method} {path}")
        if method != "GET":
            return {}
        return {"bytes": int(path.rpartition("=")[2]) * GIB}

    def score(self, model: str, prompts: Any) -> list[list[Token]]:
        size = int(model.replace("-by-mass-", "@").rpartition("@")[2])
        self.asked.append(model)
        return [[Token(-1 / size - 0.01 * len(ids), 1) for _ in ids[1:]] for ids in prompts]


def test_every_domain_is_asked_for_by_the_name_of_the_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = (Text("a", (1, 2, 3)), Text("b", (1, 2, 3, 4)))
    question = Question(((1, 2), (1, 3, 4)), (1, 1), 0)
    domains = [Domain(name, (), texts, (question,)) for name in ("law", "math")]
    server = Server()
    rows = with_differences([measure_size(server, 0.5, domains, k) for k in (2, 8)])
    assert server.asked[:3] == ["GET /v1/pools/law?experts=2", "law@2", "law@2"]
    small, large = rows
    assert (small["gib"], large["gib"]) == (2.5, 8.5)
    assert small["loss"] == pytest.approx(0.5 + 0.035)
    assert small["loss_difference"] == pytest.approx(0.5 - 0.125)
    assert (small["standard_error"], large["loss_difference"]) == (pytest.approx(0.0), 0.0)
    assert small["choices"] == 1.0
    assert "losses" not in small
    result = {
        **{"model": "emo", "measured_texts": 4, "measured_tokens": 10, "questions": 2},
        **{"domains": ["law", "math"], "start_seconds": 30.0, "seconds": 2.0, "rows": rows},
    }
    print_report(result)
    lines = capsys.readouterr().out.splitlines()
    assert "| 8 | 8.5000 | 0.160 | 100.0 % | 100.0 % | *128* | *42.8* |" in lines
    assert "| 2 | 2.5000 | 0.535 (+0.375 +-0.000) | 100.0 % | 100.0 % | *32* | *41.4* |" in lines


def test_layers_share_experts_out_by_score_mass() -> None:
    assert share_out(SCORED, 2).expert_ids == ((0, 3), (), (0, 2))
    assert share_out(SCORED, 3).expert_ids == ((0, 3), (), (0, 1, 2, 3))
    assert share_out(SCORED, 1).expert_ids == ((3,), (), (2,))
    assert share_out(SCORED, 4).expert_ids == ((0, 1, 2, 3), (), (0, 1, 2, 3))


def test_pools_by_mass_are_compared_with_the_uniform_ones_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pool(SCORED, tmp_path / "law.json")
    domains = [Domain("law", (), (Text("a", (1, 2, 3)), Text("b", (1, 2))), ())]
    server = Server()
    uniform = measure_size(server, 0.5, domains, 3)
    server.asked.clear()
    row = measure_by_mass(server, tmp_path, domains, uniform)
    assert server.asked[0] == "POST /v1/pools"
    assert server.asked[-1] == "DELETE /v1/pools/law-by-mass-3"
    assert set(server.asked[1:-1]) == {"law-by-mass-3"}
    assert (row["fewest"], row["most"], row["loss_difference"]) == (2, 4, pytest.approx(0))
    result = {
        **{"model": "emo", "measured_texts": 2, "measured_tokens": 3, "questions": 0},
        **{"domains": ["law"], "start_seconds": 30.0, "seconds": 2.0},
        **{"rows": with_differences([uniform]), "by_mass": [row]},
    }
    print_report(result)
    assert "| 3 | 2, 4 | 0.358 (+0.000 +-0.000) | 100.0 % |  |" in capsys.readouterr().out
