"""Draw what the benchmarks recorded: reads `results/*.jsonl` and nothing else.

Each figure takes the latest recorded line that has what it shows; a figure whose results are not
there is left out with a message. SVG files go to `results/plots/`.

    python -m benchmarks.plot
    python -m benchmarks.plot released_serving
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.accuracy.report import headline, of_seeds
from benchmarks.released.figure import Pair, memory, name_of, of_one_size, speeds

RESULTS = Path(__file__).resolve().parent / "results"
PLOTS = RESULTS / "plots"
Row = dict[str, Any]


def lines(benchmark: str) -> list[Row]:
    """Return a benchmark's recorded lines, the latest first."""
    path = RESULTS / f"{benchmark}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in reversed(path.read_text().splitlines())]


# -- residency --

_PANELS: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
    ("light", "requests that find their pool resident, %", lambda row: 100 * row["hit_rate"]),
    ("light", "MiB copied per request", lambda row: 2**10 * row["gib_copied"] / row["requests"]),
    ("busy", "p99 wait, s", lambda row: row["wait_p99"]),
)
_STYLES = {"lru": "k-", "pinned-first": "C3-", "belady": "k--"}


def residency() -> Iterator[tuple[str, Figure]]:
    """Draw hit rate, bytes and p99 wait against slots, by policy; means over the traces."""
    latest: dict[tuple[str, str], list[Row]] = {}
    for line in lines("residency"):
        found: dict[tuple[str, str], list[Row]] = {}
        for row in line["result"]["rows"]:
            found.setdefault((row["pools"], row["load"]), []).append(row)
        for key, rows in found.items():
            latest.setdefault(key, rows)
    for pools in dict.fromkeys(pools for pools, _ in latest):
        figure, axes = plt.subplots(1, len(_PANELS), figsize=(13, 4), layout="constrained")
        for axis, (load, title, value) in zip(axes, _PANELS, strict=True):
            _draw_policies(axis, latest.get((pools, load), []), value)
            axis.set(title=f"{pools} pools, {load} load", xlabel="slots per layer", ylabel=title)
            axis.set_ylim(bottom=0)
        axes[0].legend(fontsize="small")
        yield f"residency-{pools}", figure


def _draw_policies(axis: Any, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    slots = sorted({row["slots"] for row in rows})
    for policy in dict.fromkeys(row["policy"] for row in rows):
        means = [
            mean(value(r) for r in rows if (r["policy"], r["slots"]) == (policy, n)) for n in slots
        ]
        axis.plot(slots, means, _STYLES.get(policy, "-"), marker=".", label=policy)


# -- loading --


def loading() -> Iterator[tuple[str, Figure]]:
    """Draw each window's longest gap between tokens, without loads and with them, by run."""
    latest: dict[str, Row] = {}
    for line in lines("loading"):
        arguments = line["arguments"]
        name = arguments["model"] + (", from host memory" if arguments["host_memory"] else "")
        latest.setdefault(name, line["result"])
    if not latest:
        return
    figure, axis = plt.subplots(figsize=(1.5 + 2.2 * len(latest), 4), layout="constrained")
    for place, (_, result) in enumerate(sorted(latest.items())):
        for offset, kind, color in ((-0.2, "quiet", "C0"), (0.2, "loading", "C1")):
            gaps = result[kind]["longest_gaps_ms"]
            x = [place + offset] * len(gaps)
            axis.plot(x, gaps, ".", color=color, label=kind if place == 0 else None)
            axis.hlines(result[kind]["longest_gap_ms"], x[0] - 0.15, x[0] + 0.15, color=color)
        ratio = result["ratio_of_medians"]
        axis.annotate(f"x {ratio:.2f}", (place, 0), ha="center", va="bottom")
    axis.set_xticks(range(len(latest)), sorted(latest))
    axis.set_ylim(bottom=0)
    axis.set(title="Do loads stall other streams?", ylabel="longest gap of a window, ms")
    axis.legend()
    yield "loading", figure


# -- decode --


def gpu(stage: str) -> Iterator[tuple[Row, Row]]:
    """Yield the lines of a stage of `benchmarks.gpu`, the latest first, and what each found."""
    for line in lines("gpu"):
        found = line["result"]
        if found["stage"] == stage and "broke" not in found and not found["interpreter"]:
            yield line, found


def decode() -> Iterator[tuple[str, Figure]]:
    """Draw tokens per second and the ratio to the full model against the batch, by case."""
    measured: dict[int, Row] = {}
    for line, found in gpu("decode"):
        measured.setdefault(found["batch"], line)
    if not measured:
        return
    latest = next(iter(measured.values()))
    rows = [row for batch in sorted(measured) for row in measured[batch]["result"]["rows"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = (("tokens_per_second", "tokens/s"), ("ratio_to_full", "times the full model"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for case in dict.fromkeys(row["case"] for row in rows):
            points = [(row["batch"], row[key]) for row in rows if row["case"] == case]
            axis.plot(*zip(*points, strict=True), marker=".", label=case)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="sequences at once", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize="small")
    context = latest["result"]["context"]
    figure.suptitle(f"Decoding, random weights, context {context}; {latest['device'][-1]}")
    yield "decode", figure


# -- kernels --


def kernels() -> Iterator[tuple[str, Figure]]:
    """Draw each device's layers under its roof: the rate against FLOPs per byte, by pool."""
    measured: dict[str, dict[tuple[str, str, int], Row]] = {}
    machines: dict[str, Row] = {}
    for _, result in gpu("measure"):
        machines.setdefault(result["on"], result["machine"])
        rows = measured.setdefault(result["on"], {})
        for row in result["rows"]:
            rows.setdefault((row["weights"], row["pool"], row["tokens"]), row)
    for device, rows in measured.items():
        figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
        for axis, weights in zip(axes, ("16bit", "fp8"), strict=True):
            mine = [rows[key] for key in sorted(rows) if key[0] == weights]
            _draw_roofline(axis, mine, machines[device])
            axis.set(title=f"{weights} weights", xlabel="FLOPs per byte")
        axes[0].set_ylabel("TFLOP/s of a layer")
        axes[0].legend(fontsize="small")
        figure.suptitle(f"A layer of the released geometry on {device}, T from 1 to 4096")
        yield f"kernels-{device.replace(' ', '-')}", figure


def _draw_roofline(axis: Any, rows: Sequence[Row], machine: Row) -> None:
    copy, dense = machine["copy_tb_per_s"], machine["dense_tflop_per_s"]
    intensities = [row["work"]["flops"] / row["work"]["bytes"] for row in rows] or [1.0]
    ends = (min(intensities) / 2, max(*intensities, 2 * dense / copy))
    axis.plot([ends[0], dense / copy, ends[1]], [ends[0] * copy, dense, dense], "k-")
    for pool in dict.fromkeys(row["pool"] for row in rows):
        mine = [(row["work"], row["layer"]) for row in rows if row["pool"] == pool]
        points = [
            (work["flops"] / work["bytes"], 1e-6 * work["flops"] / layer["median_us"])
            for work, layer in mine
        ]
        axis.plot(*zip(*points, strict=True), marker=".", label=f"pool {pool}")
    axis.set(xscale="log", yscale="log")


# -- memory and accuracy --

_ACCURACY_PANELS = (
    ("loss", "held-out loss, nats per token", 1.0),
    ("accuracy", "next token right, %", 100.0),
    ("choices", "questions right, %", 100.0),
)
_ROLES = (("EMO", "C0"), ("standard MoE", "C3"))


def memory_accuracy() -> Iterator[tuple[str, Figure]]:
    """Draw loss and accuracy against GiB: each model's best pools, random ones, the trunk alone.

    Faint lines are models of other training seeds.
    """
    models = of_seeds(RESULTS)
    if not models:
        return
    figure, axes = plt.subplots(1, len(_ACCURACY_PANELS), figsize=(14, 4.5), layout="constrained")
    for axis, (key, label, scale) in zip(axes, _ACCURACY_PANELS, strict=True):
        for role, color in _ROLES:
            first, *others = models.get(role, {}).values() or [None]
            if first is not None:
                _draw_memory(axis, first, key, scale, role, color)
            for other in others:
                _draw_best(axis, other, key, scale, color=color, alpha=0.3, markersize=3)
        axis.set(xlabel="trunk and slab, GiB", ylabel=label)
    axes[0].legend(fontsize="small")
    names = [next(iter(models[role].values()))["model"] for role, _ in _ROLES if role in models]
    figure.suptitle(", ".join(names))
    yield "memory-accuracy", figure


def _draw_best(axis: Any, result: Row, key: str, scale: float, **style: Any) -> None:
    """Draw the run's first method and examples of each size."""
    gib = {row["k"]: row["gib"] for row in result["memory"]}
    points = sorted(
        (k, gib[k], scale * row[key])
        for k, row in headline(result).items()
        if key in row and row["method"] not in ("trunk", "random")
    )
    if not points:
        return
    _, x, y = zip(*points, strict=True)
    axis.plot(x, y, marker="o", **style)
    for k, *place in points if "label" in style else ():
        axis.annotate(f"{k}", place, xytext=(3, 4), textcoords="offset points")


def _draw_memory(axis: Any, result: Row, key: str, scale: float, role: str, color: str) -> None:
    _draw_best(axis, result, key, scale, color=color, label=role)
    gib = {row["k"]: row["gib"] for row in result["memory"]}
    lots: dict[int, list[float]] = {}
    for row in result["rows"]:
        if row["temperature"] != 1 or key not in row:
            continue
        if row["method"] == "trunk":
            label = f"{role}, trunk only"
            axis.plot(gib[row["k"]], scale * row[key], "X", color=color, label=label)
        elif row["method"] == "random":
            lots.setdefault(row["k"], []).append(scale * row[key])
    if lots:
        x, y = [gib[k] for k in sorted(lots)], [mean(lots[k]) for k in sorted(lots)]
        axis.plot(x, y, ":", marker=".", color=color, label=f"{role}, at random")


# -- the released size --

_COLORS = {"stock": "0.6", "pruned": "C1"}
_OURS, _OTHERS = "C0", "C2"


def released() -> Iterator[tuple[str, Figure]]:
    """Draw tokens/s of pools beside stock vLLM and others, a panel per load, and their GiB."""
    recorded = ("released_serving", "released_pruned", "released_llama_cpp")
    sizes = of_one_size(*map(lines, recorded))
    if not sizes[0]:
        return
    panels, gib = speeds(*sizes), memory(*sizes)
    rows = (len(panels) + 3) // 3
    longest = max(map(len, panels.values()), default=0)
    size = (14, rows * (1 + 0.5 * longest))
    figure, axes = plt.subplots(rows, 3, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, pairs) in zip(axes.flat, panels.items(), strict=False):
        _draw_pairs(axis, pairs)
        axis.set(title=title, xlabel="tokens/s")
    _draw_bars(axes.flat[len(panels)], [(place, *item) for place, item in enumerate(gib.items())])
    axes.flat[len(panels)].set(title="memory", xlabel="GiB")
    latest = sizes[0][0]
    layers = latest["arguments"]["layers"]
    figure.suptitle(f"Released sizes, {layers} layers, random weights; {latest['device'][-1]}")
    yield "released", figure


def _draw_pairs(axis: Any, pairs: Sequence[Pair]) -> None:
    bars = []
    for place, pair in enumerate(pairs):
        bars += [(place - 0.2, pair.peer, pair.peer_rate), (place + 0.2, pair.ours, pair.our_rate)]
    _draw_bars(axis, bars, 0.4)
    for place, pair in enumerate(pairs):
        end = max(pair.peer_rate, pair.our_rate)
        axis.annotate(f" x {pair.ratio:.2f}", (end, place), va="center")
    axis.margins(x=0.15)


def _draw_bars(axis: Any, bars: Sequence[tuple[float, str, float]], height: float = 0.8) -> None:
    """Draw a bar per place, kind of server and value, the first on top."""
    axis.set_axis_on()
    places, kinds, values = zip(*bars, strict=True)
    axis.barh(places, values, height, color=[_color(kind) for kind in kinds])
    axis.set_yticks(places, [name_of(kind) for kind in kinds], fontsize="small")
    axis.invert_yaxis()


def _color(kind: str) -> str:
    if kind.startswith("llama.cpp"):
        return _OTHERS
    return _COLORS.get(kind.removesuffix("-spare"), _OURS)


FIGURES = {
    "residency": residency,
    "loading": loading,
    "decode": decode,
    "kernels": kernels,
    "memory_accuracy": memory_accuracy,
    "released_serving": released,
}
"""Results file -> what draws it; a later benchmark adds a line here."""


def main() -> None:
    """Draw the figures named, or all, as far as they have results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("benchmarks", nargs="*", choices=list(FIGURES), help="[all]")
    chosen = parser.parse_args().benchmarks or list(FIGURES)
    PLOTS.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "emo-serve"  # equal results, equal files
    for benchmark in chosen:
        drawn = False
        for name, figure in FIGURES[benchmark]():
            path = PLOTS / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
            print(f"drew {path.relative_to(RESULTS.parent.parent)}")
            drawn = True
        if not drawn:
            print(f"no results of {benchmark} yet")


if __name__ == "__main__":
    main()
