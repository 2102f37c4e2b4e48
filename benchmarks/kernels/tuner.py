"""The tune stage: time candidates for each key of the table and keep the best.

A key is (tokens, slots, kind of weights). A server looks tiles up by all its slots, while its batch
may use a single pool. So a key of many slots is timed on tokens spread over them and on tokens of
one pool of 16, and the geometric mean of both counts. The two GEMMs share block_m and are otherwise
independent, so each is timed alone, over slabs of several layers in turn, and the best sum over
block_m decides. A second round combines the changes that helped most. Whatever is timed has passed
the sandbox before, and is compared with the twin once more at the key's own shapes.

The table is written after every key, so that a hang or the end of time costs one key at most. Keys
come in an order that spans the range early. A key that already has a row for this device and these
kernels is skipped, which is how a later run continues.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

import emo_kernels
from benchmarks.harness.progress import say, steps
from benchmarks.kernels.cases import Case, Geometry, Slabs
from benchmarks.kernels.timing import Deadline, measure
from benchmarks.kernels.trials import Bench, Sandbox, Trial
from emo_kernels.guesses import candidates
from emo_kernels.tuning import Config, Row, Table, Tile, load_table

__all__ = ["Key", "keys", "sources_digest", "tune", "with_row"]

_GEMMS = ("gate_up", "down")
_ONE_POOL = 16  # experts of the pool that a whole batch may be of
_JOINED = 3  # so many changes that helped are combined, in pairs and all together
_SECONDS = (25.0, 120.0)  # per key, least and most; nearly all of it compiling
_KERNELS = ("dispatch.py", "grouped_gemm.py", "moe_mlp.py", "routing.py")


@dataclass(frozen=True)
class Key:
    """What a table is looked up by."""

    tokens: int
    slots: int
    weights: str


@dataclass
class Tuned:
    """What tuning a key found: the winner, and what became of every trial."""

    key: Key
    config: Config
    provenance: str
    times_us: dict[Trial, float] = field(default_factory=dict)
    problems: dict[Trial, str] = field(default_factory=dict)

    def as_result(self) -> dict[str, Any]:
        """Return what the results file keeps: the winner, the five next, and all failures."""
        best = sorted(self.times_us.items(), key=lambda item: item[1])
        return {
            "stage": "tune",
            **asdict(self.key),
            "config": asdict(self.config),
            "tried": len(self.times_us) + len(self.problems),
            "times_us": {
                gemm: [
                    {"block_m": t.block_m, "us": round(us, 3), **asdict(t.tile)}
                    for t, us in best
                    if t.gemm == gemm
                ][:6]
                for gemm in _GEMMS
            },
            "failed": [{**asdict(t), "problem": why} for t, why in self.problems.items()],
        }


def keys(tokens: Sequence[int], slots: Sequence[int]) -> list[Key]:
    """Return all keys, beginning with the far ends and those that the targets name."""
    first = (64, 8, 4096, 1, 16384, 256)
    wanted_tokens = sorted(tokens, key=lambda t: (first.index(t) if t in first else 99, t))
    wanted_slots = sorted(slots, key=lambda s: (s != 16, s != 128, s))
    found = [Key(t, s, "16bit") for s in wanted_slots[:1] for t in wanted_tokens]
    found += [Key(t, s, "16bit") for s in wanted_slots[1:2] for t in wanted_tokens]
    found += [Key(t, s, "fp8") for s in wanted_slots[:1] for t in wanted_tokens]
    for weights in ("16bit", "fp8"):
        found += [Key(t, s, weights) for s in wanted_slots for t in wanted_tokens]
    return list(dict.fromkeys(found))


def sources_digest() -> str:
    """Identify these kernels by a digest of their sources, since git may be missing."""
    digest = hashlib.sha256()
    for name in _KERNELS:
        digest.update((Path(emo_kernels.__file__).parent / name).read_bytes())
    return digest.hexdigest()[:10]


def with_row(table: Table, row: Row) -> Table:
    """Return the table with a row added, or replacing the row of its key.

    Lookup prefers rows of the right weights however far away, so the first fp8 row adds copies of
    the 16bit rows as stand-ins.
    """
    rows = list(table.rows)
    if not any(other.weights == row.weights for other in rows):
        rows += [
            replace(other, weights=row.weights, provenance=f"as 16bit; {other.provenance}")
            for other in rows
        ]
    place = (row.tokens, row.slots, row.weights)
    return Table((*(r for r in rows if (r.tokens, r.slots, r.weights) != place), row))


def tune(
    wanted: Sequence[Key],
    path: Path,
    geometry: Geometry,
    slabs: dict[str, Slabs],
    sandbox: Sandbox,
    device: torch.device,
    dtype: torch.dtype,
    deadline: Deadline,
    provenance: str,
    record: Callable[[dict[str, Any]], object],
    again: bool = False,
    limit: int | None = None,
) -> list[Tuned]:
    """Tune keys until the deadline, writing the table at `path` and a record after each.

    `limit` bounds the candidates per key, for a run that only shows that everything works.
    """
    found: list[Tuned] = []
    rows = _read(path).rows
    todo = [k for k in wanted if again or not any(_is_done(row, k, provenance) for row in rows)]
    for place, key in enumerate(steps(todo, "tune")):
        if deadline.seconds_left <= 0:
            break
        table = _read(path)
        # What is compiled for one key serves the others too, so the first take longest.
        seconds = 2 * deadline.seconds_left / (len(todo) - place)
        seconds = min(deadline.seconds_left, _SECONDS[1], max(_SECONDS[0], seconds))
        benches = [
            Bench(
                Case(key.tokens, 1, size, key.weights), geometry, slabs[key.weights], device, dtype
            )
            for size in sorted({key.slots, min(key.slots, _ONE_POOL)}, reverse=True)
        ]
        tuned = _tune_key(key, path.stem, benches, sandbox, device, Deadline(seconds / 60), limit)
        if tuned is None:
            say(f"  {key}: nothing was timed in {seconds:.0f} s")
            continue
        tuned.provenance = f"{provenance}, {datetime.now(UTC).date().isoformat()}"
        row = Row(key.tokens, key.slots, key.weights, tuned.config, tuned.provenance)
        whole = path.with_suffix(".new")
        with_row(table, row).save(whole)
        whole.replace(path)  # a run that is cut off here must not leave half a table
        record(tuned.as_result())
        say(_line(tuned))
        found.append(tuned)
    return found


def _read(path: Path) -> Table:
    load_table.cache_clear()  # this process writes the file that it reads
    return load_table(path)


def _is_done(row: Row, key: Key, provenance: str) -> bool:
    same = (row.tokens, row.slots, row.weights) == (key.tokens, key.slots, key.weights)
    return same and row.provenance.startswith(provenance)


def _tune_key(
    key: Key,
    table_name: str,
    benches: Sequence[Bench],
    sandbox: Sandbox,
    device: torch.device,
    end: Deadline,
    limit: int | None,
) -> Tuned | None:
    """Time both rounds; None when not even one configuration was timed."""
    configs = list(candidates(table_name, key.tokens, key.slots, key.weights))[:limit]
    tuned = Tuned(key, configs[0], "")
    first = [trial for config in configs for trial in _trials(config, key.weights)]
    _time(first, tuned, benches, sandbox, device, end)
    config = _best(tuned)
    if config is None:
        return None
    for gemm in _GEMMS:
        base: Tile = getattr(config, gemm)
        joined = list(_joined(base, _ranked(tuned, gemm, config.block_m)))[:limit]
        second = [Trial(gemm, config.block_m, tile, key.weights) for tile in joined]
        _time(second, tuned, benches, sandbox, device, end)
    tuned.config = _best(tuned) or config
    return tuned


def _trials(config: Config, weights: str) -> Iterator[Trial]:
    for gemm in _GEMMS:
        yield Trial(gemm, config.block_m, getattr(config, gemm), weights)


def _time(
    trials: Iterable[Trial],
    tuned: Tuned,
    benches: Sequence[Bench],
    sandbox: Sandbox,
    device: torch.device,
    deadline: Deadline,
) -> None:
    """Time what the sandbox lets through, warp specialisation last: it is the likeliest to hang."""
    new = [t for t in dict.fromkeys(trials) if t not in tuned.times_us and t not in tuned.problems]
    new.sort(key=lambda trial: trial.tile.warp_specialize)
    # Trials that are cut off leave time for those that passed.
    for trial, problem in sandbox.verdicts(new, deadline.share(0.7)).items():
        if deadline.seconds_left <= 0:
            return
        problem = problem or next(filter(None, (b.problem(trial) for b in benches)), None)
        if problem is not None:
            tuned.problems[trial] = problem
            continue
        tuned.times_us[trial] = geometric_mean(_median_us(trial, b, device) for b in benches)


def _median_us(trial: Trial, bench: Bench, device: torch.device) -> float:
    plans = [bench.schedule(call, trial.block_m) for call in range(len(bench.batches))]
    calls = [
        lambda call=call, plan=plan: bench.run(trial, call, plan) for call, plan in enumerate(plans)
    ]
    return measure(calls, device, seconds=0.03, min_repeats=8).median_us


def _ranked(tuned: Tuned, gemm: str, block_m: int) -> list[Tile]:
    mine = [(us, t) for t, us in tuned.times_us.items() if (t.gemm, t.block_m) == (gemm, block_m)]
    return [trial.tile for _, trial in sorted(mine, key=lambda pair: pair[0])]


def _best(tuned: Tuned) -> Config | None:
    """Return the configuration of the least sum; both GEMMs must have been timed at its block_m."""
    sums: dict[int, float] = {}
    for block_m in {trial.block_m for trial in tuned.times_us}:
        if all(_ranked(tuned, gemm, block_m) for gemm in _GEMMS):
            best = [_ranked(tuned, gemm, block_m)[0] for gemm in _GEMMS]
            sums[block_m] = sum(
                tuned.times_us[Trial(gemm, block_m, tile, tuned.key.weights)]
                for gemm, tile in zip(_GEMMS, best, strict=True)
            )
    if not sums:
        return None
    block_m = min(sums, key=lambda m: sums[m])
    return Config(block_m, *(_ranked(tuned, gemm, block_m)[0] for gemm in _GEMMS))


def _joined(best: Tile, ranked: Sequence[Tile]) -> Iterator[Tile]:
    """Yield the best tile with the changes of the next ones, in pairs and all together."""
    changes = [
        {
            f.name: getattr(tile, f.name)
            for f in fields(Tile)
            if getattr(tile, f.name) != getattr(best, f.name)
        }
        for tile in ranked[1 : 1 + _JOINED]
    ]
    for count in (1, 2, 3):
        for chosen in combinations(changes, count):
            merged = {name: value for change in reversed(chosen) for name, value in change.items()}
            yield replace(best, **merged)


def _line(tuned: Tuned) -> str:
    config, key = tuned.config, tuned.key
    sums = sum(
        tuned.times_us[Trial(g, config.block_m, getattr(config, g), key.weights)] for g in _GEMMS
    )
    return (
        f"  T={key.tokens} slots={key.slots} {key.weights}: {sums:.1f} us, block_m"
        f" {config.block_m}; {len(tuned.times_us)} timed, {len(tuned.problems)} failed"
    )
