"""The released size: which programs run, and what the figure shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.released import __main__ as released
from benchmarks.released import figure
from benchmarks.released.figure import Pair

# -- all programs --


def test_a_program_gets_the_options_that_it_has() -> None:
    options = {"rounds": 2, "model": Path("m"), "directory": None, "cold": True, "layers": 4}
    words = ["-m", "benchmarks.released.serving", "--cold", "--model", "m", "--rounds", "2"]
    assert released.command("serving", options)[1:] == words
    words = ["-m", "benchmarks.released.expert_op", "--rounds", "2"]
    assert released.command("expert_op", options)[1:] == words


def test_programs_keep_their_order_and_llama_cpp_needs_its_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(released, "find_spec", lambda name: None)
    assert released.programs(["pruned", "llama_cpp", "serving", "figure"]) == ["serving", "pruned"]
    assert "llama_cpp left out" in capsys.readouterr().out
    monkeypatch.setattr(released, "find_spec", lambda name: name)
    assert released.programs(["llama_cpp"]) == ["llama_cpp"]


# -- the figure --


def line(result: dict[str, Any], layers: int = 4, **more: Any) -> dict[str, Any]:
    """Return a recorded line."""
    arguments = {"layers": layers, **more}
    return {"device": ["CPU x"], "arguments": arguments, "result": result}


def row(a: str, b: str, rates: list[float], **more: Any) -> dict[str, Any]:
    """Return a row of a pair."""
    ratio = {"median": 2.5, "min": 2.0, "max": 3.0}
    shown = {"load": "decode", "clients": 8, "tokens_per_second": rates, "ratio": ratio}
    return {"a": a, "b": b, **shown, **more}


SERVING = [
    line({"rows": [row("stock", "one", [10, 24])], "servers": {"one": {"own_gib": 4.0}}}),
    line(
        {
            "rows": [row("stock", "one", [1, 1]), row("stock", "four", [10, 15], clients=1)],
            "servers": {"one": {"own_gib": 9.0}, "stock": {"own_gib": 8.0}, "old": {}},
        }
    ),
]
PRUNED = [
    line(
        {
            "rows": [
                {"traffic": "even", "clients": [2, 2, 2, 2]}
                | {"tokens_per_second": [9, 18], "ratio": {"median": 2.0}}
            ],
            "gib": {"pruned": 12.0, "pools": 6.0},
        }
    )
]
LLAMA_CPP = [
    line(
        {
            "rows": [row("llama.cpp-1", "one", [5, 25]), row("llama.cpp-1", "llama.cpp-2", [5, 9])],
            "servers": {"llama.cpp": {"own_gib": 7.5}},
        }
    )
]


def test_a_panel_has_the_latest_row_of_each_pair() -> None:
    assert figure.speeds(SERVING, PRUNED, LLAMA_CPP) == {
        "decode, 8 clients": [
            Pair("stock", "one", 10, 24, 2.5),
            Pair("llama.cpp-1", "one", 5, 25, 2.5),
        ],
        "decode, 1 client": [Pair("stock", "four", 10, 15, 2.5)],
        "decode, 8 clients, even over four domains": [Pair("pruned", "four", 9, 18, 2.0)],
    }


def test_memory_is_the_latest_of_each_kind() -> None:
    gib = {"one": 4.0, "stock": 8.0, "llama.cpp": 7.5, "pruned": 12.0}
    found = figure.memory(SERVING, PRUNED, LLAMA_CPP)
    assert found == gib
    assert list(found) == ["stock", "one", "pruned", "llama.cpp"]


def test_only_lines_of_one_machine_and_size_are_shown_together() -> None:
    other, compiled = line({}, layers=16), line({}, compiled=True)
    found = figure.of_one_size([compiled, SERVING[0], other, SERVING[1]], [other, PRUNED[0]], [])
    assert found == [SERVING, PRUNED, []]
    assert figure.of_one_size([], PRUNED) == [[], []]


def test_kinds_have_names() -> None:
    assert figure.name_of("one-spare") == "one pool, a core spared"
    assert figure.name_of("llama.cpp-1") == "llama.cpp, 1 thread"
    assert figure.name_of("llama.cpp-2") == "llama.cpp, 2 threads"
    assert figure.name_of("llama.cpp") == "llama.cpp"


def test_the_figure_is_drawn_from_the_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    assert list(plot.released()) == []
    for name, recorded in (("serving", SERVING), ("pruned", PRUNED), ("llama_cpp", LLAMA_CPP)):
        text = "".join(json.dumps(each) + "\n" for each in reversed(recorded))
        (tmp_path / f"released_{name}.jsonl").write_text(text)
    ((name, drawn),) = plot.released()
    titles = [axis.get_title() for axis in drawn.axes if axis.axison]
    assert name == "released"
    assert titles == [*figure.speeds(SERVING, PRUNED, LLAMA_CPP), "memory"]
    plot.plt.close(drawn)
