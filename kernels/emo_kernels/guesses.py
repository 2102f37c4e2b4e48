"""First guesses for tiles where nothing has been tuned, and what a tuner should try instead.

    python -m emo_kernels.guesses DIRECTORY     # writes sm80.json, sm90.json, sm100.json

The rule is arithmetic, not measurement. A slot that a batch hits gets about T * K / S rows when
tokens spread evenly over S slots. Below some 200 rows a slot's weights take longer to read than to
multiply (790 TFLOP/s over 4.3 TB/s), so what counts is bytes in flight: tiles of few rows, deep
pipelines, a program a tile. Above it the tensor cores count: large tiles, persistent programs,
groups of tiles that share weights in L2.

Tiles of few rows get room for four times the even share: a batch of one pool meets a part of the
slots, every token the shared experts, and each further tile of a slot reads its weights again, from
L2. Room that stays empty costs little there: the tensor cores wait for weights anyway.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from emo_kernels.tuning import Config, Row, Table, Tile

__all__ = ["PROVENANCE", "candidates", "guess", "guessed_table"]

_TOP_K = 8  # of the released models, for which tables are made
_TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_SLOTS = (8, 16, 32, 64, 128)
PROVENANCE = "guessed by rule (emo_kernels.guesses), not tuned"
"""Of the rows that `guessed_table` makes."""

_FEW_ROWS = {
    # Weights in flight: stages x 2 x 64 x 128 values of gate and up. On sm_100 ptxas spills with a
    # fourth stage (Triton 3.9, 64 rows).
    "sm80": (Tile(32, 128, 4, 3), Tile(64, 128, 4, 3)),
    "sm90": (Tile(64, 128, 4, 4, use_tma=True), Tile(64, 128, 4, 4, use_tma=True)),
    "sm100": (Tile(64, 128, 4, 3, use_tma=True), Tile(64, 128, 4, 4, use_tma=True)),
}
_MANY_ROWS = {
    "sm80": (Tile(64, 64, 8, 3, 8), Tile(128, 64, 8, 3, 8)),
    "sm90": (Tile(128, 64, 8, 4, 8, 1, True), Tile(256, 64, 8, 4, 8, 1, True)),
    "sm100": (Tile(128, 64, 8, 4, 8, 1, True), Tile(128, 64, 8, 4, 8, 1, True)),
}


# Widening takes registers: with 256 rows of weights ptxas spills.
_MANY_ROWS_FP8 = _MANY_ROWS | {
    "sm90": (Tile(128, 64, 8, 4, 8, 1, True), Tile(128, 64, 8, 4, 8, 1, True)),
}


def guess(name: str, tokens: int, slots: int, weights: str = "16bit") -> Config:
    """Return the rule's tiles for the table called `name`."""
    even_share = tokens * _TOP_K / slots
    if even_share >= 48:
        return Config(128, *(_MANY_ROWS_FP8 if weights == "fp8" else _MANY_ROWS)[name])
    room = 1 << (math.ceil(4 * even_share) - 1).bit_length()
    return Config(min(64, max(16, room)), *_FEW_ROWS[name])


def candidates(name: str, tokens: int, slots: int, weights: str = "16bit") -> Iterator[Config]:
    """Yield what is worth timing for a shape, the guess first, warp specialisation last.

    Each differs from a guess in one thing, so a tuner may go on from the best of them.
    """
    first = guess(name, tokens, slots, weights)
    seen: list[Config] = []

    def new(config: Config) -> Iterator[Config]:
        if config not in seen:
            seen.append(config)
            yield config

    yield from new(first)
    for block_m in (16, 32, 64, 128, 256):
        for few in (True, False):
            if first.block_m / 4 <= block_m <= first.block_m * 4:
                yield from new(Config(block_m, *(_FEW_ROWS if few else _MANY_ROWS)[name]))
    changes: tuple[dict[str, Any], ...] = (
        {"block_k": 64},
        {"block_k": 128},
        {"block_k": 256},
        {"block_n": 32},
        {"block_n": 64},
        {"block_n": 128},
        {"block_n": 256},
        {"num_stages": 2},
        {"num_stages": 3},
        {"num_stages": 5},
        {"num_stages": 6},
        {"num_warps": 4},
        {"num_warps": 8},
        {"group_m": 1},
        {"group_m": 4},
        {"group_m": 16},
        {"programs_per_sm": 0},
        {"programs_per_sm": 1},
        {"programs_per_sm": 2},
        *([{"use_tma": False}] if first.down.use_tma else []),
        *([{"warp_specialize": True}] if name == "sm100" else []),
    )
    for change in changes:
        yield from new(replace(first, gate_up=replace(first.gate_up, **change)))
        yield from new(replace(first, down=replace(first.down, **change)))


def guessed_table(name: str) -> Table:
    """Return the rule as a table, for 16-bit and fp8 weights alike."""
    return Table(
        tuple(
            Row(tokens, slots, weights, guess(name, tokens, slots, weights), PROVENANCE)
            for weights in ("16bit", "fp8")
            for slots in _SLOTS
            for tokens in _TOKENS
        )
    )


if __name__ == "__main__":
    for table in _FEW_ROWS:
        guessed_table(table).save(Path(sys.argv[1]) / f"{table}.json")
