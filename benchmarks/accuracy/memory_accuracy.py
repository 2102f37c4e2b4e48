"""What keeping fewer experts costs: loss and accuracy against device memory, through HTTP.

An EMO model and its standard-MoE twin are served by `emo-serve serve`, one server each, and pools
are registered with it as they are found. For every domain (`accuracy/texts.py`), pools of K experts
per layer are found by each method on all, 20 or 1 of its examples (`accuracy/pools.py`). Measured
are held-out loss in nats per token, how often the next token is the model's first choice, and how
often it answers a multiple-choice question right (`accuracy/scoring.py`). Memory is what a server
started with just K slots per layer reports. The trunk-only point keeps the shared experts alone.

    python -m benchmarks.accuracy.memory_accuracy  # both shipped models, all domains
    python -m benchmarks.accuracy.memory_accuracy --domains math,c --keep 32,8
    python -m benchmarks.accuracy.memory_accuracy --temperatures 0.5,0.7,1.4,2  # the router's
    python -m benchmarks.accuracy.memory_accuracy --concurrency 1,2,4,8,16,32,64  # speed instead
    python -m benchmarks.accuracy.memory_accuracy --lm-eval arc_easy --domains math  # besides

    emo-serve demo train WORK --seed 1                           # both models anew, then
    python -m benchmarks.accuracy.memory_accuracy --model WORK/out-1/models/emo-demo \\
        --baseline WORK/out-1/models/standard-moe-demo \\
        --texts WORK/out-1/heldout --training-seed 1

One line per model goes to results/memory_accuracy.jsonl. `--report` prints the tables of the latest
results, with models of one name and several training seeds put together.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.accuracy.lm_eval import check_installed, run_lm_eval
from benchmarks.accuracy.pools import FULL, Case, build_pools, cases_of
from benchmarks.accuracy.report import ROLES, print_report
from benchmarks.accuracy.scoring import Score, score_domain, standard_error
from benchmarks.accuracy.servers import pools_served, serve, small_server
from benchmarks.accuracy.texts import Domain, read_domain
from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import RESULTS, append_result
from emo_serve import demo
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.names import BASE_POOL

_SHIPPED_TEXTS = Path(demo.__file__).parent / "heldout"
_CPU_FLAGS = "--enforce-eager --max-num-seqs 64 --kv-cache-memory-bytes 536870912"
Scores = dict[Case, dict[str, Score]]


def measure(role: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return every figure of one model."""
    checkpoint = Checkpoint.open(model)
    domains = read_domains(model, args)
    cases = cases_of(
        checkpoint,
        args.keep,
        args.methods,
        args.examples,
        args.seeds,
        args.temperatures,
        min(len(domain.examples) for domain in domains),
    )
    flags = [*shlex.split(args.serve_flags), "--dtype", args.dtype]

    def build(domain: Domain) -> Any:
        return build_pools(checkpoint, domain.name, [t.ids for t in domain.examples], cases)

    with ThreadPoolExecutor(1) as ahead:  # finds the next domain's pools meanwhile
        found = ahead.map(build, domains)
        memory, scores, tasks = measure_served(model, flags, cases, domains, found, args)
    return {
        "role": role,
        "model": model.name,
        "training_seed": args.training_seed,
        "dtype": args.dtype,
        "measured_tokens": sum(len(t.ids) - 1 for d in domains for t in d.measured),
        "measured_texts": sum(len(domain.measured) for domain in domains),
        "questions": sum(len(domain.questions) for domain in domains),
        "examples_a_domain": [len(domain.examples) for domain in domains],
        "memory": memory,
        "rows": rows_of(scores),
        "lm_eval": tasks,
    }


def read_domains(model: Path, args: argparse.Namespace) -> list[Domain]:
    """Read every domain asked for, in the model's tokens."""
    encode = ModelTokenizer(model).encode
    names = args.domains or sorted(path.stem for path in args.texts.glob("*.jsonl"))
    return [
        read_domain(
            args.texts / f"{name}.jsonl",
            encode,
            args.tokens,
            args.limit,
            args.questions and args.questions / f"{name}.jsonl",
        )
        for name in names
    ]


def measure_served(
    model: Path,
    flags: Sequence[str],
    cases: Sequence[Case],
    domains: Sequence[Domain],
    found: Any,
    args: argparse.Namespace,
) -> tuple[list[dict[str, float]], Scores, list[dict[str, Any]]]:
    """Serve the first domain's first pool of each size from a small server, all from a large one.

    `loss_difference` of a memory row is the small server's loss minus the large one's.
    """
    first_of_size = {case.k: case for case in reversed(cases) if case.temperature == 1}
    found = iter(found)
    first_pools = next(found)
    memory = []
    for k, case in steps(first_of_size.items(), "sizes"):
        if case.method != FULL:  # its memory is the large server's
            figures = small_server(model, flags, k, first_pools[case], domains[0])
            memory.append({"k": k, **figures})
            say(f"{model.name}: {k} slots per layer, {figures['gib']:.4f} GiB")
    scores: Scores = {case: {} for case in cases}
    tasks: list[dict[str, Any]] = []
    with serve(model, [*flags, "--pin", BASE_POOL]) as (endpoint, figures):  # a load copies nothing
        say(f"{model.name}: serving, {figures['gib']:.4f} GiB")
        memory.append({"k": cases[0].k, **figures})
        of_domains = zip(domains, chain([first_pools], found), strict=True)
        for domain, pools in steps(of_domains, "domains", total=len(domains)):
            started = time.monotonic()
            with pools_served(endpoint, list(pools.values())):
                for case, pool in pools.items():
                    scores[case][domain.name] = score_domain(endpoint, pool.name, domain)
                for case in first_of_size.values() if args.lm_eval else ():
                    extra, name = shlex.split(args.lm_eval_flags), pools[case].name
                    results = run_lm_eval(endpoint.url, name, model, args.lm_eval, extra)
                    tasks.append({"domain": domain.name, "k": case.k, "results": results})
            losses = ", ".join(
                f"{case.k} {scores[case][domain.name].loss:.3f}" for case in first_of_size.values()
            )
            seconds = time.monotonic() - started
            say(f"{model.name} {domain.name}: loss {losses} ({seconds:.0f} s)")
    for row in memory:
        if "first_domain_loss" in row:
            served = scores[first_of_size[row["k"]]][domains[0].name].loss
            row["loss_difference"] = row.pop("first_domain_loss") - served
    return memory, scores, tasks


def rows_of(scores: Scores) -> list[dict[str, Any]]:
    """Return a row per case: means over the domains, each domain's figures, a standard error."""
    full = next(by_domain for case, by_domain in scores.items() if case.method == FULL)
    rows = []
    for case, by_domain in scores.items():
        losses = [loss for score in by_domain.values() for loss in score.losses]
        baseline = [loss for name in by_domain for loss in full[name].losses]
        figures = {name: figures_of(score) for name, score in by_domain.items()}
        rows.append(
            {
                **vars(case),
                **means(figures.values()),
                "loss_difference_standard_error": standard_error(losses, baseline),
                "domains": figures,
            }
        )
    return rows


def figures_of(score: Score) -> dict[str, float]:
    """Return the figures that a domain has."""
    found = {"loss": score.loss, "accuracy": score.accuracy, "choices": score.choices}
    return {key: round(value, 5) for key, value in found.items() if value is not None}


def means(figures: Any) -> dict[str, float]:
    """Return the mean of each figure, all domains weighted equally."""
    listed: list[Mapping[str, float]] = list(figures)
    keys = [key for key in listed[0] if all(key in row for row in listed)]
    return {key: mean(row[key] for row in listed) for key in keys}


def parse() -> argparse.Namespace:
    """Return the arguments."""

    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=demo.model_dir(), help="the EMO model [the shipped one]")
    add("--baseline", type=Path, help="its standard-MoE twin [the shipped one's, or none]")
    add("--training-seed", type=int, default=0, help="of both; `--report` puts seeds together [0]")
    add("--texts", type=Path, default=_SHIPPED_TEXTS, help="directory of DOMAIN.jsonl [shipped]")
    add("--questions", type=Path, help="directory of DOMAIN.jsonl [made of the measured texts]")
    add("--domains", type=numbers(str), help="[all of --texts]")
    add("--keep", type=numbers(int), default=[32, 16, 8, 4], help="experts per layer [32,16,8,4]")
    add("--methods", type=numbers(str), default=["layerwise", "router", "easy-ep", "random"])
    add(
        "--examples",
        type=lambda text: [0 if part == "all" else int(part) for part in text.split(",")],
        default=[0, 20, 1],
        help="[all,20,1]",
    )
    add("--seeds", type=numbers(int), default=[0, 1, 2], help="of draws [0,1,2]")
    add("--temperatures", type=numbers(float), default=[], help="the router's, besides 1")
    add("--limit", type=int, help="measured texts per domain [every second document's]")
    add("--tokens", type=int, default=384, help="of a measured text [384]")
    add("--dtype", default="bfloat16")
    add("--serve-flags", default=_CPU_FLAGS, help=f"[{_CPU_FLAGS}]")
    add("--threads", type=int, default=1, help="that find pools [1]")
    add("--lm-eval", metavar="TASKS", help="run lm_eval too, on the first pool of each size")
    add("--lm-eval-flags", default="", help="more flags of lm_eval, such as '--limit 100'")
    add("--concurrency", type=numbers(int), help="measure speed at so many clients instead")
    add("--rounds", type=int, default=5, help="of the speeds, after one that warms up [5]")
    add("--pool-size", type=int, default=8, help="experts per layer of the speeds' pools [8]")
    add("--results", type=Path, default=RESULTS, help="[benchmarks/results]")
    add("--roles", type=numbers(str), default=list(ROLES), help=f"whom to measure {list(ROLES)}")
    add("--report", action="store_true", help="print the latest results' tables, measure nothing")
    args = parser.parse_args()
    if args.training_seed and args.model == demo.model_dir():
        parser.error("--training-seed is that of --model and --baseline; what ships is of seed 0")
    if args.baseline is None and args.model == demo.model_dir():
        args.baseline = demo.model_dir(demo.TWIN_MODEL)
    return args


def main() -> None:
    """Measure both models, or the speeds of one."""
    args = parse()
    torch.set_num_threads(args.threads)
    arguments = {
        key: value for key, value in vars(args).items() if key not in ("report", "results")
    }
    if args.lm_eval:
        check_installed()
    if args.report:
        print_report(args.results)
        return
    if args.concurrency:
        from benchmarks.accuracy.sweep import sweep

        flags = [*shlex.split(args.serve_flags), "--dtype", args.dtype]
        result = sweep(read_domains(args.model, args), flags, args)
        path = append_result("memory_accuracy", arguments, result, args.results)
    else:
        for role, model in zip(ROLES, (args.model, args.baseline), strict=True):
            if model is not None and role in args.roles:
                result = measure(role, model, args)
                path = append_result("memory_accuracy", arguments, result, args.results)
    print_report(args.results)
    print(f"\nappended to {path}")


if __name__ == "__main__":
    main()
