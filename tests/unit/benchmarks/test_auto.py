"""The figures of the benchmark of `auto`; its measuring needs a server."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.accuracy.auto import Asked, added_ms, rows_of, written_row
from benchmarks.accuracy.auto_report import against, interval, report
from benchmarks.accuracy.prompts import PROMPTS, read_prompts
from emo_serve import demo

LOSSES = {"base-model": [1.0, 2.0, 3.0], "math": [1.5, 4.0, 5.0], "c": [3.0, 2.5, 3.5]}
LABELS = ["math", "c", "c"]
FOUND = [
    Asked(2, "base-model", 0.020, 0.010),
    Asked(0, "math", 0.011, 0.010),
    Asked(1, "math", 0.012, 0.010),
]


def test_a_choice_is_right_when_it_is_the_texts_own_pool() -> None:
    row = rows_of(FOUND, LABELS, LOSSES)
    assert row["right"] == pytest.approx(1 / 3)
    assert row["to_base"] == pytest.approx(1 / 3)
    assert row["loss"] == pytest.approx((3.0 + 1.5 + 4.0) / 3)
    assert row["own_loss"] == pytest.approx((3.5 + 1.5 + 2.5) / 3)
    assert row["base_loss"] == pytest.approx(2.0)
    assert row["above_own"] == pytest.approx(1 / 3)
    assert row["above_own_by_text"] == [0.0, 1.5, -0.5]  # in the order of the texts


def test_times_are_compared_prompt_by_prompt() -> None:
    added = added_ms(FOUND)
    assert added["added_ms_p50"] == pytest.approx(2.0)
    assert added["added_ms_p90"] >= 10
    assert added["named_ms_p50"] == pytest.approx(10.0)


def test_the_prompts_by_hand_are_fifty_of_each_domain() -> None:
    prompts = read_prompts(PROMPTS)
    counts = Counter(domain for domain, _ in prompts)
    assert set(counts) == set(demo.domains()) and set(counts.values()) == {50}
    assert len(set(prompts)) == len(prompts)


def test_the_report_has_the_latest_line_of_each_model(tmp_path: Path) -> None:
    assert report(tmp_path) == []
    row = {"method": "router", "base": "resident", "tokens": 16, **rows_of(FOUND, LABELS, LOSSES)}
    lines = []
    for model, right in (("a", 0.1), ("b", 0.2), ("a", 0.9)):
        result = {"model": model, "experts": 8, "domains": 2, "texts": 3, "follow": 128}
        result["rows"] = [{**row, "right": right, "tokens": length} for length in (64, 16)]
        by_domain = {"math": 0.5, "c": right}
        of_prompts: dict[str, object] = {
            "base": "resident",
            "method": "vote",
            "right": right,
            "to_base": 0.0,
        }
        misses = {"math": {}, "c": {"base-model": 1, "math": 3}}
        of_misses = {
            "following_of_misses": {"math": [], "c": [-2.0, -1.0, 0.5, 0.5]},
            "of_prompt_of_misses": {"math": [], "c": [0.25] * 4},
        }
        of_prompts |= {"by_domain": by_domain, "misses": misses} | of_misses
        result["written"] = [of_prompts]
        lines.append({"result": result, "device": ["a CPU"], "date": "2026-11-23T10:00:00"})
    lines.append({"result": {"domains": 2, "margins": []}})  # of another table
    (tmp_path / "auto.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = "\n".join(report(tmp_path))
    assert text.count("| resident |") == 8
    assert "| resident | vote | 0.900 | 0.000 |  |  | math 0.50 |" in text
    assert "| resident | c | 0.90 | math 3, base-model 1 | -0.50 | 2 of 4 | +0.25 |" in text
    assert text.index("| resident | 16 |") < text.index("| resident | 64 |")
    assert "| router | 0.900 | 0.333 |" in text
    assert "0.100" not in text


def test_prompts_by_hand_have_a_loss_of_their_own_and_of_what_follows() -> None:
    following = {name: [2 * loss for loss in some] for name, some in LOSSES.items()}
    row = written_row(["math", "math", "base-model"], LABELS, LOSSES, following)
    assert row["right"] == pytest.approx(1 / 3) and row["to_base"] == pytest.approx(1 / 3)
    assert row["by_domain"] == {"c": 0, "math": 1}
    assert row["of_prompt_above_own_by_text"] == [0.0, 1.5, -0.5]
    assert row["following_above_own_by_text"] == [0.0, 3.0, -1.0]


def test_the_vote_is_compared_prompt_by_prompt() -> None:
    rows = {
        (False, 8, "vote"): {"base": "resident", "tokens": 8, "above_own_by_text": [0.0, 0.5, 0.5]},
        (False, 8, "router"): {"above_own_by_text": [0.0, 1.0, 0.25]},
        (False, 16, "vote"): {"base": "resident", "tokens": 16, "above_own_by_text": [0.0]},
        (False, 16, "tfidf"): {"right": 0.9},  # of an older line
    }
    (line,) = against(rows, "")
    assert line.startswith("| resident | 8 | router | -0.083 | -0.500 to +0.250 |")
    assert line.endswith("| 1 | 1 |")
    low, high = interval([1.0] * 9)
    assert low == high == 1.0
