"""Suggestions for misspelt words."""

from __future__ import annotations

import pytest

from emo_serve.spelling import closest, did_you_mean, meant_flags

FLAGS = ("-h", "--expert-slots", "--expert-memory", "--max-model-len")


@pytest.mark.parametrize(
    ("word", "meant"), [("mth", "math"), ("maths", "math"), ("spansh", "spanish"), ("xyz", None)]
)
def test_the_closest_word(word: str, meant: str | None) -> None:
    assert closest(word, ["code", "math", "spanish"]) == meant


def test_a_question_ends_the_sentence_where_there_is_one_to_ask() -> None:
    assert did_you_mean("mth", ["math"]) == " (did you mean 'math'?)"
    assert did_you_mean("mth", []) == ""


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        (["--expert-slot", "8"], " (did you mean --expert-slots?)"),
        (["--expert_slotz=8"], " (did you mean --expert-slots?)"),
        (
            ["--max-model-length", "--exprt-slots"],
            " (did you mean --max-model-len --expert-slots?)",
        ),
        (["-expert-slots"], " (did you mean --expert-slots?)"),
        (["stray", "--nothing-like-it"], ""),
    ],
)
def test_flags_are_meant_with_dashes_and_without_their_values(
    unknown: list[str], meant: str
) -> None:
    assert meant_flags(unknown, FLAGS) == meant
