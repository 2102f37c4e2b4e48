"""The benchmark of sizes: its table; tests/engine has its measures against a server."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy.scoring import Endpoint, Token
from benchmarks.accuracy.sizes import measure_size, print_report, with_differences
from benchmarks.accuracy.texts import Domain, Question, Text

GIB = 2**30


class Server(Endpoint):
    """A server that knows every size, and is surer the larger it is."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, method: str, path: str, **options: Any) -> Any:
        self.asked.append(f"{method} {path}")
        return {"bytes": int(path.rpartition("=")[2]) * GIB}

    def score(self, model: str, prompts: Any) -> list[list[Token]]:
        size = int(model.rpartition("@")[2])
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
