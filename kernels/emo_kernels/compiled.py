"""What every kernel compiles to on each architecture, without a GPU.

    python -m emo_kernels.compiled [--arch sm80,sm90,sm100] [--table FILE] [--json FILE]

Compiles every tile of the tables, in each dtype that a row serves, and the other kernels at the
released models' shape, and judges them by CONDITIONS. Warp specialisation, which no row asks for
yet, is tried once and reported, not judged. Prints a table; exits 1 where a condition is broken, 2
when it cannot work. It says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton import knobs

from emo_kernels.chips import CHIPS, Compiled, DoesNotCompile, pretend
from emo_kernels.dispatch import dispatch
from emo_kernels.grouped_gemm import down, gate_up
from emo_kernels.moe_mlp import combine
from emo_kernels.routing import route
from emo_kernels.tables import PoolTables, Router, Schedule
from emo_kernels.tuning import Table, Tile, load_table

__all__ = ["CONDITIONS", "Report", "Variant", "main", "report", "variants"]

CONDITIONS = {
    "compiles": "Triton and ptxas accept it",
    "spills": "no register is spilled, nothing lies on a stack",
    "shared_memory": "fits the chip's shared memory, and tensor memory where there is some",
    "tensor_cores": "GEMMs multiply with the chip's own tensor-core instruction and no other",
    "tma": "weights come by TMA where the tile says so",
    "pipelined": "shared memory holds num_stages - 1 stages of weights and tokens",
    "asynchronous": "ptxas does not serialize wgmma",
    "specialized": "warps are specialised where the tile says so",
}

_TENSOR_MEMORY_COLUMNS = 512
_EMO = Router(num_experts=128, top_k=8, num_shared=1)
_POOLS = 4


@dataclass(frozen=True)
class Variant:
    """One call of a public launcher, with a tile if it is a GEMM's.

    `tokens` and `weights` name dtypes. What is only `tried` is reported, not judged.
    """

    op: str
    tokens: str
    weights: str = ""
    block_m: int = 16
    tile: Tile | None = None
    d: int = 2048
    f: int = 1024
    num_tokens: int = 64
    num_slots: int = 16
    tried: bool = False

    def __str__(self) -> str:
        text = f"{self.op} {self.tokens}"
        if self.tile:
            tile = self.tile
            text += (
                f" x {self.weights}, rows {self.block_m}, N {tile.block_n}, k {tile.block_k},"
                f" {tile.num_warps} warps, {tile.num_stages} stages, D {self.d}, F {self.f}"
                f"{', specialised' if tile.warp_specialize else ''}"
            )
        return text


@dataclass(frozen=True)
class Report:
    """What one kernel of a variant became, and which conditions it breaks, with the figures."""

    chip: str
    kernel: str
    variant: Variant
    registers: int = 0
    spill_bytes: int = 0  # or of stack, if that is more
    shared_bytes: int = 0
    tensor_memory_columns: int = 0
    instructions: tuple[str, ...] = ()
    tma: bool = False
    serialized: bool = False
    specialized: bool = False
    error: str = ""

    @property
    def problems(self) -> dict[str, str]:
        """Return the conditions it breaks, in words."""
        chip, tile = CHIPS[self.chip], self.variant.tile
        if self.error:
            return {"compiles": self.error}
        broken = {
            "spills": self.spill_bytes > 0 and f"{self.spill_bytes} bytes",
            "shared_memory": (
                self.shared_bytes > chip.shared_limit
                and f"{self.shared_bytes} bytes of {chip.shared_limit}"
            )
            or (
                self.tensor_memory_columns > _TENSOR_MEMORY_COLUMNS
                and f"{self.tensor_memory_columns} columns of tensor memory"
            ),
            "asynchronous": self.serialized and "wgmma instructions are serialized",
        }
        if tile:
            kept = (tile.num_stages - 1) * _stage_bytes(self.variant, tile)
            broken |= {
                "tensor_cores": self.instructions != (chip.instruction,)
                and f"{', '.join(self.instructions) or 'none'}, not {chip.instruction}",
                "tma": tile.use_tma and not self.tma and "asked for, none",
                "pipelined": self.shared_bytes < kept
                and f"{self.shared_bytes} bytes of shared memory, {kept} wanted",
                "specialized": tile.warp_specialize and not self.specialized and "asked for, none",
            }
        return {condition: words for condition, words in broken.items() if words}


def _stage_bytes(variant: Variant, tile: Tile) -> int:
    matrices = 2 if variant.op == "gate_up" else 1
    weights = matrices * tile.block_n * _dtype(variant.weights).itemsize
    return tile.block_k * (weights + variant.block_m * _dtype(variant.tokens).itemsize)


# -- what to compile --


def variants(table: Table) -> list[Variant]:
    """Return every variant that a chip with this table launches, and those only tried."""
    found = []
    for weights in ("16bit", "fp8"):
        rows = [row for row in table.rows if row.weights == weights] or table.rows
        for tokens in ("bfloat16", "float16"):
            dtype = "float8_e4m3fn" if weights == "fp8" else tokens
            for config in (row.config for row in rows):
                for op, tile in (("gate_up", config.gate_up), ("down", config.down)):
                    # How many programs there are is no part of a kernel.
                    tile = replace(tile, programs_per_sm=0)
                    found.append(Variant(op, tokens, dtype, config.block_m, tile))
    found += [replace(found[i], d=48, f=80) for i in (0, 1)]  # no multiple of any block
    for op in ("route", "combine"):
        found += [Variant(op, tokens) for tokens in ("bfloat16", "float16")]
    found += [
        Variant("dispatch", "int32", block_m=block_m, num_tokens=num_tokens, num_slots=128)
        for num_tokens, block_m in ((1, 16), (64, 16), (512, 64), (16384, 128))
    ]
    if any(variant.tile and variant.tile.use_tma for variant in found):
        tile = Tile(128, 64, 8, 3, 8, use_tma=True, warp_specialize=True)
        found.append(Variant("down", "bfloat16", "bfloat16", 128, tile, tried=True))
    return list(dict.fromkeys(found))


def _call(variant: Variant) -> None:
    """Call the variant's launcher, with tensors that have shapes and no data."""
    num_tokens, k = variant.num_tokens, _EMO.top_k
    tokens = _dtype(variant.tokens)
    slots_TK = _empty(num_tokens, k, dtype=torch.int32)
    if variant.op == "route":
        tables = PoolTables(
            _empty(_POOLS, _EMO.num_experts, dtype=torch.bool),
            _empty(_POOLS, dtype=torch.float32),
            _empty(_EMO.num_experts, dtype=torch.int32),
        )
        logits_TE = _empty(num_tokens, _EMO.num_experts, dtype=tokens)
        route(logits_TE, _empty(num_tokens, dtype=torch.int32), tables, _EMO)
    elif variant.op == "dispatch":
        dispatch(slots_TK, variant.num_slots, variant.block_m)
    elif variant.op == "combine":
        combine(_empty(num_tokens * k, variant.d, dtype=tokens), slots_TK)
    else:
        _call_gemm(variant, tokens, _dtype(variant.weights))


def _call_gemm(variant: Variant, tokens: torch.dtype, weights: torch.dtype) -> None:
    num_tokens, num_slots, d, f = variant.num_tokens, variant.num_slots, variant.d, variant.f
    k, tile = _EMO.top_k, variant.tile
    num_rows = num_tokens * k
    any_R = _empty(num_rows, dtype=torch.int32)
    offsets_S1 = _empty(num_slots + 1, dtype=torch.int32)
    schedule = Schedule(any_R, offsets_S1, any_R, any_R, any_R, variant.block_m)
    shape = (num_slots, 2 * f, d) if variant.op == "gate_up" else (num_slots, d, f)
    slab = _empty(*shape, dtype=weights)
    scales = _empty(*shape[:2], dtype=torch.float32) if weights.itemsize == 1 else None
    if variant.op == "gate_up":
        gate_up(_empty(num_tokens, d, dtype=tokens), slab, schedule, k, scales, tile)
    else:
        h_RF = _empty(num_rows, f, dtype=tokens)
        weights_TK = _empty(num_tokens, k, dtype=torch.float32)
        down(h_RF, slab, weights_TK, schedule, scales, tile)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def report(name: str, wanted: Iterable[Variant], cache: Path) -> list[Report]:
    """Compile `wanted` for the chip called `name`, in a process that does nothing else after.

    `cache` is an empty directory, to be thrown away.
    """
    reports = []
    with pretend(CHIPS[name], cache) as kernels:
        for variant in wanted:
            first = len(kernels)
            try:
                _call(variant)
            except DoesNotCompile as error:
                reports.append(Report(name, variant.op, variant, error=str(error)))
            reports += [_inspect(name, variant, kernel) for kernel in kernels[first:]]
    return reports


def _inspect(chip: str, variant: Variant, kernel: Compiled) -> Report:
    instructions = re.findall(r"\b(mma\.sync|wgmma|tcgen05\.mma)\b", kernel.ptx)
    return Report(
        chip,
        kernel.name,
        variant,
        registers=max(map(int, re.findall(r"Used (\d+) registers", kernel.log))),
        spill_bytes=max(map(int, re.findall(r"(\d+) bytes (?:stack|spill)", kernel.log))),
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        instructions=tuple(sorted(set(instructions))),
        tma="cp.async.bulk.tensor" in kernel.ptx,
        serialized="instructions are serialized" in kernel.log,
        specialized="setmaxnreg" in kernel.ptx and "ttg.warp_specialize(" in kernel.ttgir,
    )


# -- the command --


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m emo_kernels.compiled",
        description="Compile every tuned variant for chips that need not be here, and judge it.",
    )
    parser.add_argument("--arch", default="sm80,sm90,sm100", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--table", type=Path, help="judge this table; not the chips' own")
    parser.add_argument("--json", type=Path, help="write the reports here as well")
    options = parser.parse_args(arguments)
    names = options.arch.split(",")
    if unknown := sorted(set(names) - set(CHIPS)):
        parser.error(f"--arch: {', '.join(unknown)} is not one of {', '.join(CHIPS)}")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    try:
        tables = [load_table(options.table or CHIPS[name].table) for name in names]
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    reports = _report_all(names, tables)
    sys.stdout.write(_table(reports))
    broken = [row for row in reports if row.problems and not row.variant.tried]
    for row in reports:
        word = "tried" if row.variant.tried else "BROKEN"
        for condition, words in row.problems.items():
            sys.stdout.write(f"{word}: {row.chip} {row.variant}: {condition}: {words}\n")
    sys.stdout.write(
        f"{len(reports)} kernels, {len(broken)} broken; Triton {triton.__version__}, ptxas"
        f" {', '.join(CHIPS[name].ptxas_version for name in names)};"
        f" {time.perf_counter() - start:.0f} s\n"
    )
    if options.json:
        lines = [json.dumps(asdict(row) | {"problems": row.problems}) for row in reports]
        options.json.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return 1 if broken else 0


def _report_all(names: list[str], tables: list[Table]) -> list[Report]:
    workers = min(len(names), os.cpu_count() or 1)
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool,
    ):
        caches = [Path(cache, name) for name in names]
        found = pool.map(report, names, map(variants, tables), caches)
        return [row for rows in found for row in rows]


def _table(reports: list[Report]) -> str:
    header = (
        "chip   kernel    rows    N    k warps stages tokens   weights        registers spill"
        "  shared limit KiB instruction  loads specialised\n"
    )
    return header + "".join(map(_line, reports))


def _line(row: Report) -> str:
    variant, tile, limit = row.variant, row.variant.tile, CHIPS[row.chip].shared_limit // 1024
    cut: tuple[int | str, ...] = (variant.block_m if variant.op == "dispatch" else "", *[""] * 4)
    if tile:
        cut = (variant.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)
    figures = (
        f"{row.registers:9} {row.spill_bytes:5} {row.shared_bytes / 1024:7.1f} {limit:9}"
        f" {','.join(row.instructions) or '-':12} {'TMA' if row.tma else '-':5}"
        f" {'yes' if row.specialized else '-'}"
    )
    return (
        f"{row.chip:6} {row.kernel:9} {{:>4}} {{:>4}} {{:>4}} {{:>5}} {{:>6}}".format(*cut)
        + f" {variant.tokens:8} {variant.weights:14}"
        + f" {'does not compile' if row.error else figures}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
