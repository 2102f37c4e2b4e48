"""What the tuned kernels compile to for sm_80, sm_90 and sm_100, asserted without a GPU.

Triton decides once, at import, whether it interprets; so whatever compiles runs in a process of its
own, with a cache of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import triton

from emo_kernels.chips import CHIPS
from emo_kernels.compiled import CONDITIONS, Report, Variant, main, variants
from emo_kernels.tuning import Config, Row, Table, Tile, load_table

NAMES = ("sm80", "sm90", "sm100")

# Triton 3.6 cannot specialise the warps of these kernels; 3.9 can. Not known of those between.
CAN_SPECIALIZE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python without Triton's interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("compiled") / "reports.json"
    result = run("-m", "emo_kernels.compiled", "--arch", ",".join(NAMES), "--json", str(path))
    assert path.exists(), result.stderr
    found: list[dict[str, Any]] = json.loads(path.read_text())
    broken = any(report["problems"] and not report["variant"]["tried"] for report in found)
    assert result.returncode == broken, result.stderr
    return found


def describe(report: dict[str, Any]) -> str:
    fields = dict(report["variant"])
    tile = fields.pop("tile")
    return str(Variant(**fields, tile=tile and Tile(**tile)))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_tuned_variant_meets(
    condition: str, name: str, reports: list[dict[str, Any]]
) -> None:
    judged = [r for r in reports if r["chip"] == name and not r["variant"]["tried"]]
    assert judged
    assert [
        f"{describe(report)}: {report['problems'][condition]}"
        for report in judged
        if condition in report["problems"]
    ] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_tile_of_the_table_is_compiled_in_every_dtype(
    name: str, reports: list[dict[str, Any]]
) -> None:
    wanted = [
        (op, tokens, "float8_e4m3fn" if row.weights == "fp8" else tokens, row.config.block_m)
        + (asdict(replace(tile, programs_per_sm=0)),)
        for row in load_table(CHIPS[name].table).rows
        for op, tile in (("gate_up", row.config.gate_up), ("down", row.config.down))
        for tokens in ("bfloat16", "float16")
    ]
    compiled = [
        (v["op"], v["tokens"], v["weights"], v["block_m"], v["tile"])
        for v in (report["variant"] for report in reports if report["chip"] == name)
        if v["d"] == 2048 and v["f"] == 1024
    ]
    assert [variant for variant in wanted if variant not in compiled] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_compiled(name: str, reports: list[dict[str, Any]]) -> None:
    gemms = {"gate_up", "down"}
    others = {"route", "dispatch", "count", "sum", "place", "combine"}
    assert {report["kernel"] for report in reports if report["chip"] == name} == gemms | others


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_no_block_divides_are_compiled(name: str, reports: list[dict[str, Any]]) -> None:
    odd = {r["kernel"] for r in reports if r["chip"] == name and r["variant"]["d"] == 48}
    assert odd == {"gate_up", "down"}


@pytest.mark.skipif(not CAN_SPECIALIZE, reason="Triton before 3.9 fails to specialise warps")
def test_warps_specialise_on_sm100(reports: list[dict[str, Any]]) -> None:
    (tried,) = (r for r in reports if r["chip"] == "sm100" and r["variant"]["tried"])
    assert tried["specialized"]
    assert tried["problems"] == {}


# -- the checker can fail --

TILE = Tile(128, 64, 8, 3, 8, use_tma=True)
DOWN = Variant("down", "bfloat16", "bfloat16", 128, TILE)
GOOD = Report(
    "sm90", "down", DOWN, registers=90, shared_bytes=98304, instructions=("wgmma",), tma=True
)
SPECIALIZED = replace(DOWN, tile=replace(TILE, warp_specialize=True))


def test_a_report_without_fault_breaks_nothing() -> None:
    assert GOOD.problems == {}
    assert replace(GOOD, variant=SPECIALIZED, specialized=True).problems == {}


@pytest.mark.parametrize(
    ("condition", "report"),
    [
        ("compiles", replace(GOOD, error="PassManager::run failed")),
        ("spills", replace(GOOD, spill_bytes=4)),
        ("shared_memory", replace(GOOD, shared_bytes=227 * 1024 + 1)),
        (
            "shared_memory",
            replace(GOOD, chip="sm80", shared_bytes=101377, instructions=("mma.sync",)),
        ),
        ("shared_memory", replace(GOOD, tensor_memory_columns=513)),
        ("tensor_cores", replace(GOOD, instructions=())),
        ("tensor_cores", replace(GOOD, instructions=("mma.sync",))),
        ("tensor_cores", replace(GOOD, instructions=("mma.sync", "wgmma"))),
        ("tma", replace(GOOD, tma=False)),
        ("pipelined", replace(GOOD, shared_bytes=65535)),
        ("asynchronous", replace(GOOD, serialized=True)),
        ("specialized", replace(GOOD, variant=SPECIALIZED)),
    ],
)
def test_each_fault_breaks_its_condition(condition: str, report: Report) -> None:
    assert list(report.problems) == [condition]


COMPILE = """
import json, sys
from pathlib import Path
from emo_kernels.compiled import Tile, Variant, report
fields = json.loads(sys.argv[2])
variant = Variant(**fields | {"tile": Tile(**fields["tile"])})
print(json.dumps([row.problems for row in report(sys.argv[1], [variant], Path(sys.argv[3]))]))
"""


@pytest.mark.parametrize(
    ("condition", "name", "variant"),
    [
        ("spills", "sm100", replace(DOWN, tile=replace(TILE, block_n=256))),
        ("shared_memory", "sm80", replace(DOWN, tile=Tile(128, 64, 8, 5))),
        ("tensor_cores", "sm90", replace(DOWN, tile=replace(TILE, block_n=32))),
        ("specialized", "sm90", SPECIALIZED),
    ],
)
def test_a_bad_tile_is_found_out(
    condition: str, name: str, variant: Variant, tmp_path: Path
) -> None:
    result = run("-c", COMPILE, name, json.dumps(asdict(variant)), str(tmp_path))
    assert result.returncode == 0, result.stderr
    (problems,) = json.loads(result.stdout)
    assert list(problems) == [condition]


def test_the_command_fails_where_a_table_does(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    config = Config(16, Tile(32, 64, 4, 2), Tile(256, 64, 8, 6))
    Table((Row(8, 8, "16bit", config, "for this test"),)).save(path)
    result = run("-m", "emo_kernels.compiled", "--arch", "sm80", "--table", str(path))
    assert result.returncode == 1, result.stderr
    assert "BROKEN: sm80 down bfloat16 x bfloat16, rows 16, N 256, k 64" in result.stdout
    assert "shared_memory" in result.stdout


def test_weights_in_fp8_without_rows_of_their_own_get_the_others() -> None:
    tile = Tile(32, 64, 4, 2)
    table = Table((Row(8, 8, "16bit", Config(16, tile, tile), "for this test"),))
    fp8 = [v for v in variants(table) if v.weights == "float8_e4m3fn"]
    assert [(v.op, v.tokens) for v in fp8] == [
        (op, tokens) for tokens in ("bfloat16", "float16") for op in ("gate_up", "down")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda path: ["--arch", "sm70"], "sm70 is not one of"),
        (lambda path: ["--table", str(path)], "is not a tuning table"),
        (lambda path: [], "TRITON_INTERPRET is set"),
    ],
)
def test_it_refuses_what_cannot_work(
    arguments: Callable[[Path], list[str]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0" if arguments(tmp_path) else "1")
    with pytest.raises(SystemExit) as refusal:
        main(arguments(tmp_path / "none.json"))
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
