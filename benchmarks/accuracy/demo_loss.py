"""Held-out loss of both shipped demo models when only K of 32 experts per layer are kept.

Reads nothing but what ships in emo_serve/demo, runs the plain reference model in fp32, prints two
tables and appends one line to results/demo_loss.jsonl.

    python -m benchmarks.accuracy.demo_loss  # all held-out texts: some minutes on one core
    python -m benchmarks.accuracy.demo_loss --texts 8  # 8 per domain

`one document` calibrates a pool on the single held-out text AFTER the ones measured; `random` is
the mean of three draws; `shared only` keeps the shared expert alone. The second table gives, for
each domain, the loss in the pool of every other domain, at 8 experts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from emo_serve import demo
from emo_serve.demo.training.evaluate import Experiment, encode_texts, heldout_loss
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.pools.calibration.build import calibrate

SIZES = (32, 16, 8, 4)
RANDOM_SEEDS = (0, 1, 2)


def measure(name: str, texts: int, matrix_texts: int) -> dict[str, object]:
    """Return every figure of one model."""
    experiment = Experiment.shipped(name, texts)
    checkpoint = Checkpoint.open(demo.model_dir(name))
    by_method: dict[str, dict[str, float]] = {}
    for domain, ids_BT in steps(experiment.texts.items(), name):
        after = encode_texts(demo.model_dir(name), demo.heldout(domain)[texts : texts + 1])
        rows = {f"{k} kept": experiment.loss(domain, k) for k in SIZES}
        for k in (8, 4):
            single = calibrate(checkpoint, list(after), k, "router").pool(domain)
            rows[f"{k} kept, one document"] = heldout_loss(experiment.model, ids_BT, single)
        rows["8 kept, random"] = statistics.mean(
            heldout_loss(experiment.model, ids_BT, drawn.pool("random"))
            for drawn in (calibrate(checkpoint, [], 8, "random", seed) for seed in RANDOM_SEEDS)
        )
        rows["shared only"] = experiment.loss(domain, 1)
        by_method[domain] = rows
        say(f"{name} {domain}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows.items()))
    part = Experiment.shipped(name, matrix_texts)
    matrix = {
        domain: {other: part.loss(domain, 8, other) for other in part.pools}
        for domain in steps(part.texts, f"{name}, pools of other domains")
    }
    return {"by_domain": by_method, "pool_of_another_domain": matrix}


def print_tables(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    """Print both tables as Markdown."""
    names = list(results)
    first = results[names[0]]["by_domain"]
    methods = list(next(iter(first.values())))
    print("\n| experts of 32 per layer | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for method in methods:
        means = [
            statistics.mean(row[method] for row in results[name]["by_domain"].values())
            for name in names
        ]
        print(f"| {method} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    for name in names:
        matrix = results[name]["pool_of_another_domain"]
        print(f"\n{name}, 8 kept: text of the row's domain in the pool of the column's\n")
        print("| | " + " | ".join(matrix) + " |\n|---|" + "---|" * len(matrix))
        for domain, row in matrix.items():
            print(f"| {domain} | " + " | ".join(f"{loss:.2f}" for loss in row.values()) + " |")


def main() -> None:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--texts", type=int, default=47, help="held-out texts per domain [47]")
    parser.add_argument("--matrix-texts", type=int, default=8, help="for the second table [8]")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    results = {name: measure(name, arguments.texts, arguments.matrix_texts) for name in demo.MODELS}
    print_tables(results)
    path = append_result("demo_loss", vars(arguments), results)
    print(f"\n{time.monotonic() - started:.0f} s; appended to {path}")


if __name__ == "__main__":
    main()
