"""A result line says how it was made, and nothing of where files lay on that machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.harness.results import ROOT, append_result


def test_a_line_names_no_directory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = ROOT / "benchmarks" / "results"
    words = ["--model", "/data/models/large", f"--out={inside}", "--rounds=3"]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    arguments = {"model": Path("/data/models/large"), "out": inside, "rounds": 3}
    line = json.loads(append_result("bench", arguments, {}, directory=tmp_path).read_text())
    assert line["command"].endswith("--model large --out=benchmarks/results --rounds=3")
    assert line["arguments"] == {"model": "large", "out": "benchmarks/results", "rounds": 3}
