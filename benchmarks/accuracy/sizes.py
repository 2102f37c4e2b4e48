"""Loss and accuracy against memory at every size, by name, on ONE running server.

A pool with scores is a pool of any size: `math@4`, `math@8`, ... (docs/pools.md, "Sizes"). So the
curve needs one server and no other pool files: each domain's held-out texts and questions
(`accuracy/texts.py`) are scored in its own pool at size after size (`accuracy/scoring.py`). GiB is
the trunk, as the server reports it, and what a size takes by `/v1/pools/NAME?experts=K`.

`--by-mass` adds, at each size K, a pool with as many experts in all that chooses each layer's
number by the scores (`by_mass.py`); it is registered with the same server.

    python -m benchmarks.accuracy.sizes --by-mass        # the shipped model and pools
    python -m benchmarks.accuracy.sizes --keep 2,8,32 --domains math,c --limit 8
    python -m benchmarks.accuracy.sizes --report         # print the latest results' table

One line goes to results/sizes.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.by_mass import share_out
from benchmarks.accuracy.memory_accuracy import figures_of, means, read_domains
from benchmarks.accuracy.report import PAPER
from benchmarks.accuracy.scoring import Endpoint, Score, score_domain, standard_error
from benchmarks.accuracy.servers import GIB, pools_served, serve
from benchmarks.accuracy.texts import Domain
from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import RESULTS, append_result
from emo_serve import demo
from emo_serve.names import sized_name
from emo_serve.pools.document import read_pool

_SIZES = [2, 3, 4, 6, 8, 12, 16, 24, 32]
_CPU_FLAGS = "--enforce-eager --max-num-seqs 64 --kv-cache-memory-bytes 536870912"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return every figure."""
    domains = read_domains(args.model, args)
    flags = [*shlex.split(args.serve_flags), "--dtype", args.dtype, "--pools", str(args.pools)]
    started = time.monotonic()
    with serve(args.model, flags) as (endpoint, memory):
        loaded = time.monotonic()
        rows = [
            measure_size(endpoint, memory["trunk_gib"], domains, k)
            for k in steps(args.keep, "sizes")
        ]
        by_mass = [
            measure_by_mass(endpoint, args.pools, domains, row)
            for row in steps(rows if args.by_mass else [], "sizes by mass")
        ]
        seconds = time.monotonic() - loaded
    return {
        "model": args.model.name,
        "dtype": args.dtype,
        "domains": [domain.name for domain in domains],
        "measured_texts": sum(len(domain.measured) for domain in domains),
        "measured_tokens": sum(len(t.ids) - 1 for d in domains for t in d.measured),
        "questions": sum(len(domain.questions) for domain in domains),
        "start_seconds": loaded - started,
        "seconds": seconds,
        "rows": with_differences(rows),
        "by_mass": by_mass,
    }


def measure_size(
    endpoint: Endpoint, trunk_gib: float, domains: Sequence[Domain], k: int
) -> dict[str, Any]:
    """Return the figures of one size; each domain is scored in its own pool."""
    scores: dict[str, Score] = {}
    sizes: list[float] = []
    for domain in steps(domains, "domains"):
        name = sized_name(domain.name, k)
        sizes.append(endpoint.ask("GET", f"/v1/pools/{domain.name}?experts={k}")["bytes"] / GIB)
        scores[domain.name] = score_domain(endpoint, name, domain)
    figures = {name: figures_of(score) for name, score in scores.items()}
    row = {"k": k, "gib": trunk_gib + max(sizes), **means(figures.values()), "domains": figures}
    say(f"{k} experts per layer: {row['gib']:.4f} GiB, loss {row['loss']:.3f}")
    return {**row, "losses": [loss for score in scores.values() for loss in score.losses]}


def measure_by_mass(
    endpoint: Endpoint, pools: Path, domains: Sequence[Domain], uniform: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures of pools that share out as many experts between layers by score mass."""
    k = uniform["k"]
    shared = [share_out(read_pool(pools / f"{domain.name}.json"), k) for domain in domains]
    with pools_served(endpoint, shared):
        scores = [
            score_domain(endpoint, pool.name, domain)
            for pool, domain in zip(shared, domains, strict=True)
        ]
    figures = means([figures_of(score) for score in scores])
    losses = [loss for score in scores for loss in score.losses]
    sizes = [len(layer) for pool in shared for layer in pool.expert_ids if layer]
    row = {"k": k, **figures, "fewest": min(sizes), "most": max(sizes)}
    row["loss_difference"] = row["loss"] - uniform["loss"]
    row["standard_error"] = standard_error(losses, uniform["losses"])
    say(f"{k} per layer on average, by mass: {row['loss_difference']:+.3f}")
    return row


def with_differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with each one's difference to the largest size, and its standard error."""
    full = max(rows, key=lambda row: row["k"])
    return [
        {
            **{key: value for key, value in row.items() if key != "losses"},
            "loss_difference": row["loss"] - full["loss"],
            "standard_error": standard_error(row["losses"], full["losses"]),
        }
        for row in rows
    ]


def print_report(result: dict[str, Any]) -> None:
    """Print one result as Markdown, the paper's Table 3 beside it."""
    rows = sorted(result["rows"], key=lambda row: -row["k"])
    largest = rows[0]["k"]
    print(
        "\n| experts kept | GiB | loss | next token | questions | *paper: of 128* | *EMO MMLU* |"
        "\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        loss = f"{row['loss']:.3f}" if row["k"] == largest else _compared(row)
        paper = PAPER.get(100 * row["k"] / largest, ("", "", ""))
        cells = [
            *(row["k"], f"{row['gib']:.4f}", loss, *_right(row)),
            *(f"*{cell}*" if cell else "" for cell in (paper[0], paper[2])),
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
    if by_mass := result.get("by_mass"):
        print_by_mass(by_mass)
    print(
        f"\n{result['model']}: {result['measured_texts']} texts, {result['measured_tokens']} tokens"
        f" and {result['questions']} questions of {len(result['domains'])} domains; one server,"
        f" started in {result['start_seconds']:.0f} s and asked for {result['seconds']:.0f} s"
    )


def print_by_mass(rows: Sequence[dict[str, Any]]) -> None:
    """Print what sharing out by score mass changes."""
    print(
        "\n| experts per layer, on average | a layer's, fewest and most | loss, against uniform"
        " | next token | questions |\n|---|---|---|---|---|"
    )
    for row in sorted(rows, key=lambda row: -row["k"]):
        cells = [row["k"], f"{row['fewest']}, {row['most']}", _compared(row), *_right(row)]
        print("| " + " | ".join(map(str, cells)) + " |")


def _compared(row: dict[str, Any]) -> str:
    """Return the loss, and what it is more than what the row is compared with."""
    return f"{row['loss']:.3f} ({row['loss_difference']:+.3f} +-{row['standard_error']:.3f})"


def _right(row: dict[str, Any]) -> tuple[str, str]:
    """Return how many next tokens and, if there are any, questions are right."""
    choices = f"{100 * row['choices']:.1f} %" if "choices" in row else ""
    return f"{100 * row['accuracy']:.1f} %", choices


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    texts = Path(demo.__file__).parent / "heldout"
    add("--model", type=Path, default=demo.model_dir(), help="[the shipped EMO model]")
    add("--pools", type=Path, default=demo.pools_dir(), help="a pool per domain, with scores")
    add("--texts", type=Path, default=texts, help="directory of DOMAIN.jsonl [shipped]")
    add("--questions", type=Path, help="directory of DOMAIN.jsonl [made of the measured texts]")
    add("--domains", type=lambda text: text.split(","), help="[all of --texts]")
    add(
        "--keep",
        type=lambda text: [int(part) for part in text.split(",")],
        default=_SIZES,
        help=f"experts per layer {_SIZES}",
    )
    add("--by-mass", action="store_true", help="measure each layer's number by score mass, too")
    add("--limit", type=int, help="measured texts per domain [every second document's]")
    add("--tokens", type=int, default=384, help="of a measured text [384]")
    add("--dtype", default="bfloat16")
    add("--serve-flags", default=_CPU_FLAGS, help=f"[{_CPU_FLAGS}]")
    add("--results", type=Path, default=RESULTS, help="[benchmarks/results]")
    add("--report", action="store_true", help="print the latest results' table, measure nothing")
    return parser.parse_args()


def main() -> None:
    """Measure and print, or only print."""
    args = parse()
    if args.report:
        *_, last = (args.results / "sizes.jsonl").read_text(encoding="utf-8").splitlines()
        print_report(json.loads(last)["result"])
        return
    result = measure(args)
    arguments = {
        key: value for key, value in vars(args).items() if key not in ("report", "results")
    }
    path = append_result("sizes", arguments, result, args.results)
    print_report(result)
    print(f"\nappended to {path}")


if __name__ == "__main__":
    main()
