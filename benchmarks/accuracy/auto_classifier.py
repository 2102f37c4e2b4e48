"""How often the text classifier behind `auto` is right, alone and without a server; a few seconds.

It learns from the examples of each domain (`accuracy/texts.py`), as the server does, and is asked
about the first tokens of the measured texts, which share no document with them, and about the
prompts written by hand. Its best pool counts; here no prompt goes to the base pool.

    python -m benchmarks.accuracy.auto_classifier
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.prompts import PROMPTS, read_prompts
from benchmarks.accuracy.texts import read_domain
from benchmarks.harness.results import append_result
from emo_serve import demo
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.server.auto.classifier import PoolClassifier, counts_of, counts_of_asking, merged

_LENGTHS = (8, 16, 32, 64)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the shares that are right, by length and of the prompts by hand by domain."""
    tokenizer = ModelTokenizer(args.model)
    paths = sorted(args.texts.glob("*.jsonl"))
    domains = [read_domain(path, tokenizer.encode, max(_LENGTHS), None, None) for path in paths]
    examples = {
        domain.name: counts_of([tokenizer.decode(text.ids) for text in domain.examples])
        for domain in domains
    }
    classifier = PoolClassifier.fit(
        {name: merged([counts, counts_of_asking(name)]) for name, counts in examples.items()}
    )
    by_length = {
        length: right(
            classifier,
            [(d.name, tokenizer.decode(t.ids[:length])) for d in domains for t in d.measured],
        )
        for length in _LENGTHS
    }
    written = read_prompts(PROMPTS)
    by_domain = {
        name: right(classifier, [pair for pair in written if pair[0] == name]) for name in examples
    }
    return {
        "texts": sum(len(domain.measured) for domain in domains),
        "right": by_length,
        "prompts": len(written),
        "prompts_right": right(classifier, written),
        "prompts_right_by_domain": by_domain,
    }


def right(classifier: PoolClassifier, asked: Sequence[tuple[str, str]]) -> float:
    """Return the share of texts whose domain has the largest margin."""
    found = [(name, classifier.margins(text)) for name, text in asked]
    return statistics.mean(max(of, key=of.__getitem__) == name for name, of in found)


def main() -> None:
    """Measure, print, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=demo.model_dir(), help="[the shipped one]")
    parser.add_argument("--texts", type=Path, default=demo.heldout_dir(), help="[the shipped]")
    args = parser.parse_args()
    result = measure(args)
    for length, share in result["right"].items():
        print(f"{length} tokens of {result['texts']} texts: right {share:.3f}")
    print(f"{result['prompts']} prompts by hand: right {result['prompts_right']:.3f}")
    print({name: round(share, 2) for name, share in result["prompts_right_by_domain"].items()})
    print(f"appended to {append_result('auto_classifier', vars(args), result)}")


if __name__ == "__main__":
    main()
