"""`emo-serve demo train|corpus|eval`: rebuild the shipped models, or measure them.

torch, transformers and tokenizers are imported only when a command runs.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from emo_serve import demo
from emo_serve.cli.progress import steps_of

__all__ = ["add_demo_parser"]


def add_demo_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` and its commands; each sets `run`, a function of the arguments."""
    parser = subparsers.add_parser("demo", help="train or measure the tiny shipped EMO model")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    corpus = commands.add_parser("corpus", help="fetch, clean and tokenize the training text")
    corpus.add_argument("directory", type=Path, metavar="DIR", help="working directory")
    corpus.set_defaults(run=_run_corpus)

    train = commands.add_parser(
        "train",
        help="build everything that ships: corpus, tokenizer, both models, pools, held-out texts",
    )
    train.add_argument("directory", type=Path, metavar="DIR", help="working directory")
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write the result [DIR/out-SEED]"
    )
    train.add_argument(
        "--seed", type=int, default=0, help="seed of weights, batches and pool sizes [0]"
    )
    train.add_argument(
        "--steps",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        help="steps on 256-token, then on 512-token documents [the shipped models' numbers]",
    )
    train.add_argument(
        "--model",
        choices=(demo.DEMO_MODEL, demo.TWIN_MODEL),
        help="train only this model, so that two processes can share the work",
    )
    train.set_defaults(run=_run_train)

    evaluate = commands.add_parser("eval", help="print held-out loss of the shipped models by pool")
    evaluate.add_argument("--texts", type=int, default=8, help="held-out texts per domain [8]")
    evaluate.set_defaults(run=_run_eval)


def _run_corpus(arguments: argparse.Namespace) -> None:
    _show_progress()
    from emo_serve.demo.training.corpus import build_corpus

    print(f"{'domain':12}{'documents':>10}{'tokens':>11}{'held out':>10}{'seen before cut':>17}")
    for row in build_corpus(arguments.directory):
        print(
            f"{row.domain:12}{row.documents:10}{row.training_tokens:11}{row.heldout_documents:10}"
            f"{row.contamination_cleaned:17.2%}"
        )


def _run_train(arguments: argparse.Namespace) -> None:
    _show_progress()
    from tqdm.contrib.logging import logging_redirect_tqdm

    from emo_serve.demo.training.corpus import build_corpus
    from emo_serve.demo.training.release import release_model
    from emo_serve.demo.training.train import Recipe, demo_config, train

    directory: Path = arguments.directory
    if not (directory / "tokens.npz").exists():
        build_corpus(directory)
    out = arguments.out or directory / f"out-{arguments.seed}"
    for name in [arguments.model] if arguments.model else demo.MODELS:
        recipe = Recipe(emo=name == demo.DEMO_MODEL, seed=arguments.seed)
        if arguments.steps:
            short, long = arguments.steps
            (first, _), (second, _) = recipe.stages
            recipe = replace(recipe, stages=((first, short), (second, long)))
        trained = directory / "trained" / f"{name}-{recipe.seed}"
        tokens = directory / "tokens.npz"
        with logging_redirect_tqdm(), steps_of(f"training {name}", recipe.total_steps) as advance:
            model = train(recipe, demo_config(), tokens, trained, advance=advance)
        release_model(name, model, directory, out)
        print(f"wrote {name} and its pools below {out}")


def _run_eval(arguments: argparse.Namespace) -> None:
    from emo_serve.demo.training.evaluate import Experiment

    for name in demo.MODELS:
        experiment = Experiment.shipped(name, arguments.texts)
        print(f"{name}: held-out nats per token, mean of {len(experiment.texts)} domains")
        for k in (32, 16, 8, 4):
            print(f"  {k:2} experts kept  {experiment.mean_loss(k):.3f}")


def _show_progress() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
