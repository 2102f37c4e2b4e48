"""Which tile sizes a call gets: tables by architecture, looked up by the shape of the call.

A table is a JSON file, a row for each (tokens, slots) that was tuned, with its provenance. Lookup
takes the nearest row in octaves, so no shape is without an answer. `slots` is how many slots the
batch's pools hold together, as far as the caller knows: with the tokens it tells how many rows an
expert gets, which is what decides the tile.

Architectures without a table of their own use sm80's, whose kernels fit 99 KiB of shared memory.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["Config", "Row", "Table", "Tile", "choose", "load_table", "table_path"]


@dataclass(frozen=True)
class Tile:
    """How one GEMM is cut and compiled.

    `block_n` weight rows (of gate and of up each) and `block_k` of the dimension summed over; the
    rows are Config's. `programs_per_sm` 0 gives every tile its own program, else that many
    programs take tiles in turn. `group_m` tiles of rows share weights in L2.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 1
    programs_per_sm: int = 0
    use_tma: bool = False
    warp_specialize: bool = False


@dataclass(frozen=True)
class Config:
    """Tiles of both GEMMs; they share a schedule, so `block_m` routed rows a tile."""

    block_m: int
    gate_up: Tile
    down: Tile


@dataclass(frozen=True)
class Row:
    """One line of a table. `weights` is 16bit or fp8; `provenance`: device, date and command."""

    tokens: int
    slots: int
    weights: str
    config: Config
    provenance: str


@dataclass(frozen=True)
class Table:
    """The rows of one architecture; at least one of 16bit weights."""

    rows: tuple[Row, ...]

    def nearest(self, tokens: int, slots: int, weights: str) -> Row:
        """Return the row whose shape is nearest in octaves, of these weights if there is any."""
        rows = [row for row in self.rows if row.weights == weights] or self.rows

        def distance(row: Row) -> float:
            return math.hypot(
                math.log2(row.tokens / max(1, tokens)), math.log2(row.slots / max(1, slots))
            )

        return min(rows, key=distance)

    def save(self, path: Path) -> None:
        """Write the table, a row a line, in the order of weights, tokens and slots."""
        rows = sorted(self.rows, key=lambda row: (row.weights, row.tokens, row.slots))
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        path.write_text(f"[\n{lines}\n]\n")


@lru_cache(maxsize=4096)  # a lookup goes through the whole table, and a step has many
def choose(
    device: torch.device, tokens: int, slots: int, weights: torch.dtype, tokens_dtype: torch.dtype
) -> Config:
    """Return the tiles for a call on this device.

    Tables are tuned with 2-byte tokens; wider ones halve `block_k`, so that shared memory suffices.
    """
    table = load_table(table_path(_capability(device)))
    config = table.nearest(tokens, slots, "fp8" if weights.itemsize == 1 else "16bit").config
    if tokens_dtype.itemsize <= 2:
        return config
    gate_up, down = (
        replace(tile, block_k=max(16, tile.block_k // 2)) for tile in (config.gate_up, config.down)
    )
    return Config(config.block_m, gate_up, down)


def table_path(capability: tuple[int, int]) -> Path:
    """Return the table of a compute capability: sm90, sm100 (and 103), or sm80 for all others."""
    name = {9: "sm90", 10: "sm100"}.get(capability[0], "sm80")
    return Path(__file__).parent / "tuned" / f"{name}.json"


@cache
def load_table(path: Path) -> Table:
    """Read a table; raises ValueError naming the file when it is not one."""
    try:
        rows = tuple(_row(fields) for fields in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a tuning table: {error}") from error
    if not any(row.weights == "16bit" for row in rows):
        raise ValueError(f"{path} has no row of 16bit weights")
    return Table(rows)


def _row(fields: dict[str, Any]) -> Row:
    config = fields.pop("config")
    tiles = Config(config["block_m"], Tile(**config["gate_up"]), Tile(**config["down"]))
    return Row(config=tiles, **fields)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    # Under Triton's interpreter tensors are on the CPU; sm80's table is plain enough for it.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
