"""Tile tables: every shape gets an answer, and the committed ones say where they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emo_kernels.guesses import PROVENANCE, candidates, guess, guessed_table
from emo_kernels.tuning import Config, Row, Table, Tile, choose, load_table, table_path

NAMES = ("sm80", "sm90", "sm100")
TILE = Tile(64, 64, 4, 3)
CPU = torch.device("cpu")


def row(tokens: int, slots: int, weights: str = "16bit", block_m: int = 16) -> Row:
    return Row(tokens, slots, weights, Config(block_m, TILE, TILE), "a test")


def test_nearest_counts_in_octaves() -> None:
    table = Table((row(1, 16), row(64, 16), row(64, 128), row(4096, 16)))
    assert table.nearest(1, 16, "16bit") == row(1, 16)
    assert table.nearest(7, 16, "16bit") == row(1, 16)
    assert table.nearest(9, 16, "16bit") == row(64, 16)
    assert table.nearest(100, 100, "16bit") == row(64, 128)
    assert table.nearest(10**9, 3, "16bit") == row(4096, 16)


def test_fp8_takes_its_own_rows_where_there_are_any() -> None:
    both = Table((row(1, 16), row(4096, 16, "fp8", 64)))
    assert both.nearest(1, 16, "fp8").config.block_m == 64
    assert both.nearest(4096, 16, "16bit").config.block_m == 16
    assert Table((row(1, 16),)).nearest(1, 16, "fp8") == row(1, 16)


@given(st.integers(0, 10**7), st.integers(0, 5000), st.sampled_from(NAMES))
def test_no_shape_is_without_an_answer(tokens: int, slots: int, name: str) -> None:
    path = Path(table_path((8, 0))).with_stem(name)
    assert load_table(path).nearest(tokens, slots, "16bit").config.block_m >= 16


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        *(((8, minor), "sm80") for minor in (0, 6, 9)),
        ((9, 0), "sm90"),
        ((10, 0), "sm100"),
        ((10, 3), "sm100"),
        ((12, 0), "sm80"),  # 99 KiB of shared memory, and no tcgen05
    ],
)
def test_table_of_a_capability(capability: tuple[int, int], name: str) -> None:
    assert table_path(capability).stem == name


def test_wide_tokens_halve_what_is_held() -> None:
    narrow = choose(CPU, 64, 16, torch.float16, torch.float16)
    wide = choose(CPU, 64, 16, torch.float32, torch.float32)
    assert wide.block_m == narrow.block_m
    assert wide.down == replace(narrow.down, block_k=narrow.down.block_k // 2)
    assert choose(CPU, 64, 16, torch.float8_e4m3fn, torch.bfloat16).block_m >= 16


def test_a_table_survives_saving(tmp_path: Path) -> None:
    table = Table((row(64, 16), row(1, 16), row(1, 16, "fp8")))
    table.save(tmp_path / "sm90.json")
    assert set(load_table(tmp_path / "sm90.json").rows) == set(table.rows)
    assert load_table(tmp_path / "sm90.json").rows[0] == row(1, 16)


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"tokens": 1}]', '[{"config": 3}]'])
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match="odd.json"):
        load_table(tmp_path / "odd.json")


@pytest.mark.parametrize("name", NAMES)
def test_committed_rows_tell_their_origin(name: str) -> None:
    """A row is the rule's, and says so, or was tuned, and names a device."""
    guessed = {(r.tokens, r.slots, r.weights): r for r in guessed_table(name).rows}
    for found in load_table(table_path((int(name[2:-1]), 0))).rows:
        if found.provenance == PROVENANCE:
            assert found == guessed[found.tokens, found.slots, found.weights]
        else:
            assert "benchmarks.gpu" in found.provenance and "20" in found.provenance


@pytest.mark.parametrize("name", NAMES)
def test_candidates_begin_with_the_guess_and_end_with_the_risky(name: str) -> None:
    found = list(candidates(name, 64, 16))
    assert found[0] == guess(name, 64, 16)
    assert len(found) == len(set(found)) > 20
    risky = [c.gate_up.warp_specialize or c.down.warp_specialize for c in found]
    assert risky == sorted(risky) and any(risky) == (name == "sm100")
