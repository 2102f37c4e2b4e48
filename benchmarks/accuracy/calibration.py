"""How good the pools of `emo-serve pools build` are: by method, by text, by mixture of domains.

Reads nothing but what ships in emo_serve/demo. Pools are found on the last 32 of the 48 held-out
texts of a domain and measured on the first ones (`--texts`), in the plain reference model, fp32.
Three tables, each a mean over the ten domains:

- loss: held-out nats per token in the right domain's pool, by method, examples and size;
- amount: the same from less and less text, layerwise: the first tokens of one example, or several;
- mixture: coverage when 10 examples of 256 tokens come from 1, 2, 3, 5 or all 10 domains, beside
  the coverage that each would have in a pool of its own, and how often `pools build` notices. The
  bounds of emo_serve/pools/calibration/advice.py come from the last two.

    python -m benchmarks.accuracy.calibration
    python -m benchmarks.accuracy.calibration --tables mixture --model standard-moe-demo
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from torch import Tensor

from benchmarks.harness.progress import steps
from benchmarks.harness.results import append_result
from emo_serve import demo
from emo_serve.demo.training.evaluate import encode_texts, heldout_loss
from emo_serve.emo.checkpoint import Checkpoint, load_model
from emo_serve.pools.calibration.advice import MIXED_BOUND, PASSAGE_TOKENS
from emo_serve.pools.calibration.build import calibrate
from emo_serve.pools.pool import ExpertPool

TABLES = ("loss", "amount", "mixture")
CALIBRATION_TEXTS = 32
EXAMPLES = (CALIBRATION_TEXTS, 20, 1)
SIZES = (8, 4)
RANDOM_SEEDS = (0, 1, 2)
TOKENS = (16, 32, 64, 128, 256, 384, 1536, 7680)
MIXED_DOMAINS = (1, 2, 3, 5, 10)
MIXED_SIZES = (4, 8, 16)
MIXED_EXAMPLES = 10
MIXTURES = 10  # of each number of domains


class Bench:
    """One shipped model with the two halves of its held-out texts."""

    def __init__(self, name: str, texts: int) -> None:
        directory = demo.model_dir(name)
        self.checkpoint, self.model = Checkpoint.open(directory), load_model(directory)
        self.measured: dict[str, Tensor] = {}
        self.examples: dict[str, list[Tensor]] = {}
        for domain in demo.domains():
            ids = encode_texts(directory, demo.heldout(domain))
            self.examples[domain] = list(ids[-CALIBRATION_TEXTS:])
            self.measured[domain] = ids[: min(texts, len(ids) - CALIBRATION_TEXTS)]

    def loss(self, domain: str, pool: ExpertPool) -> float:
        """Return the held-out loss of a domain's text inside a pool."""
        return heldout_loss(self.model, self.measured[domain], pool)


def loss_table(bench: Bench) -> dict[str, dict[str, float]]:
    """Return {method and examples: {size: loss}}."""
    table: dict[str, dict[str, list[float]]] = {}
    moe_layers = bench.checkpoint.config.moe_layers
    for domain, examples in steps(bench.examples.items(), "loss by domain"):
        for count in EXAMPLES:
            for method in ("layerwise", "router", "easy-ep"):
                row = table.setdefault(f"{method}, {_examples(count)}", {})
                for k in SIZES:  # layerwise finds each size anew, the others are cut
                    if method == "layerwise" or k == SIZES[0]:
                        found = calibrate(bench.checkpoint, examples[:count], k, method)
                    pool = found.pool(domain).cut(k, moe_layers)
                    row.setdefault(str(k), []).append(bench.loss(domain, pool))
        row = table.setdefault("layerwise, 32 examples, found at 8 and cut", {})
        found = calibrate(bench.checkpoint, examples, SIZES[0])
        for k in SIZES:
            pool = found.pool(domain).cut(k, moe_layers)
            row.setdefault(str(k), []).append(bench.loss(domain, pool))
        for seed in RANDOM_SEEDS:
            for k in SIZES:
                pool = calibrate(bench.checkpoint, [], k, "random", seed).pool(domain)
                row = table.setdefault(f"random, {len(RANDOM_SEEDS)} draws", {})
                row.setdefault(str(k), []).append(bench.loss(domain, pool))
        row = table.setdefault("no pool: all experts", {})
        everything = bench.loss(domain, ExpertPool.base(moe_layers))
        for k in SIZES:
            row.setdefault(str(k), []).append(everything)
    return {
        name: {k: statistics.mean(values) for k, values in row.items()}
        for name, row in table.items()
    }


def amount_table(bench: Bench) -> dict[str, dict[str, float]]:
    """Return {tokens: {size: loss}}; beyond one example's tokens, several whole examples."""
    table: dict[str, dict[str, float]] = {}
    for tokens in steps(TOKENS, "amounts of text"):
        row = table.setdefault(str(tokens), {})
        for k in SIZES:
            losses = []
            for domain, examples in bench.examples.items():
                whole, rest = divmod(tokens, len(examples[0]))
                documents = examples[:whole] or [examples[0][:rest]]
                pool = calibrate(bench.checkpoint, documents, k).pool(domain)
                losses.append(bench.loss(domain, pool))
            row[str(k)] = statistics.mean(losses)
    return table


def mixture_table(bench: Bench) -> dict[str, dict[str, dict[str, float]]]:
    """Return {domains mixed: {size: coverage, and its share of the passages' own coverage}}."""
    draw = random.Random(0)
    names = list(bench.examples)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for count in steps(MIXED_DOMAINS, "mixtures"):
        mixtures = [[name] for name in names]
        if count > 1:
            mixtures = [draw.sample(names, count) for _ in range(MIXTURES)]
        for k in MIXED_SIZES:
            coverages, shares = [], []
            for mixture in mixtures:
                documents = [
                    bench.examples[mixture[place % count]][place][:PASSAGE_TOKENS]
                    for place in range(MIXED_EXAMPLES)
                ]
                found = calibrate(bench.checkpoint, documents, k)
                assert found.coverage is not None and found.own_coverage is not None
                coverages.append(found.coverage)
                shares.append(found.coverage / found.own_coverage)
            table.setdefault(str(count), {})[str(k)] = {
                "coverage": statistics.median(coverages),
                "lowest_coverage": min(coverages),
                "highest_coverage": max(coverages),
                "lowest": min(shares),
                "median": statistics.median(shares),
                "highest": max(shares),
                "told": sum(share < MIXED_BOUND for share in shares) / len(shares),
            }
    return table


def _examples(count: int) -> str:
    return f"{count} example{'s' if count > 1 else ''}"


def print_losses(title: str, table: dict[str, dict[str, float]]) -> None:
    """Print one table of losses as Markdown."""
    print(f"\n| {title} | " + " | ".join(f"{k} kept" for k in SIZES) + " |\n|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[str(k)]:.3f}" for k in SIZES) + " |")


def print_mixtures(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the table of mixtures as Markdown."""
    print("\n| domains mixed | kept | coverage: median (range) | of the passages' own | told |")
    print("|---|---|---|---|---|")
    for count, row in table.items():
        for k, cell in row.items():
            coverage = "{coverage:.2f} ({lowest_coverage:.2f}-{highest_coverage:.2f})"
            share = "{median:.3f} ({lowest:.3f}-{highest:.3f}) | {told:.0%}"
            print(f"| {count} | {k} | " + f"{coverage} | {share} |".format(**cell))


def main() -> None:
    """Make the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=demo.MODELS, default=demo.DEMO_MODEL)
    parser.add_argument(
        "--texts", type=int, default=8, help="held-out texts per domain, 16 at most"
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    bench = Bench(arguments.model, arguments.texts)
    result: dict[str, object] = {}
    if "loss" in arguments.tables:
        result["loss"] = losses = loss_table(bench)
        print_losses(f"{arguments.model}: method, examples", losses)
    if "amount" in arguments.tables:
        result["amount"] = losses = amount_table(bench)
        print_losses(f"{arguments.model}: layerwise, tokens of text", losses)
    if "mixture" in arguments.tables:
        result["mixture"] = mixtures = mixture_table(bench)
        print_mixtures(mixtures)
    path = append_result("calibration", vars(arguments), result)
    print(f"\n{time.monotonic() - started:.0f} s; appended to {path}")


if __name__ == "__main__":
    main()
