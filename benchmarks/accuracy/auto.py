"""`model: "auto"`: how often it finds a text's domain, what mistakes cost, and how long it takes.

Every domain's pool is found layerwise on its examples; prompts are the first 16, 64 and 256 tokens
of its other texts, which share no document with the examples (`accuracy/texts.py`). A real server
chooses over HTTP, by the router or by the classifier that learned from the same examples, once with
the base pool resident and once in a slab one slot per layer too small for it. Each prompt's choice
is read from the answer's `model`.

- right: the share of prompts that got their own domain's pool; a prompt sent to the base pool is
  not right and is counted apart.
- loss: nats per token over the `--follow` tokens after the prompt, of the whole text run in the
  chosen pool; beside it in the domain's own pool (the oracle's) and in the base pool
  (`prompt_logprobs` of the server that holds all experts).
- added ms: time to the first token of a stream for `auto` minus that for the chosen pool by its
  name, prompt by prompt; one client, the two taking turns at being first, no prefix cache hits.

    python -m benchmarks.accuracy.auto                  # the shipped model
    python -m benchmarks.accuracy.auto --model emo_serve/demo/models/standard-moe-demo
    python -m benchmarks.accuracy.auto --margins        # no server: where MIN_MARGIN comes from
    python -m benchmarks.accuracy.auto --report         # the latest table of each model
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.scoring import Endpoint, standard_error
from benchmarks.accuracy.servers import serve
from benchmarks.accuracy.texts import Domain, read_domain
from benchmarks.harness.results import RESULTS, append_result
from emo_serve import demo
from emo_serve.config import AUTO_METHODS
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.pools.calibration.build import calibrate
from emo_serve.pools.document import write_pool
from emo_serve.server.auto.by_classifier import MIN_MARGIN
from emo_serve.server.auto.classifier import PoolClassifier

__all__ = ["Asked", "added_ms", "report", "rows_of"]

_CPU_FLAGS = "--enforce-eager --max-num-seqs 64 --kv-cache-memory-bytes 536870912"
_BASE = "base-model"  # the name the servers give to it
Losses = Mapping[str, Sequence[float]]  # by pool: nats per token, of each text


@dataclass(frozen=True)
class Asked:
    """One prompt's choice, and both times to the first token in seconds."""

    text: int
    chosen: str
    auto_seconds: float
    named_seconds: float


def main() -> None:
    """Measure one model, or print what was measured."""
    args = parse()
    if not args.report:
        torch.set_num_threads(args.threads)
        arguments = {key: value for key, value in vars(args).items() if key != "report"}
        result = sent_away(args) if args.margins else measure(args)
        path = append_result("auto", arguments, result)
        print(f"appended to {path}")
    print("\n".join(report(RESULTS)))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--model", type=Path, default=demo.model_dir(), help="[the shipped one]")
    add("--texts", type=Path, default=demo.heldout_dir(), help="DOMAIN.jsonl each [the shipped]")
    add("--experts", type=int, default=8, help="a layer and pool [8]")
    add("--lengths", type=int, nargs="+", default=[16, 64, 256], help="of prompts, in tokens")
    add("--follow", type=int, default=128, help="tokens after the prompt, for the loss [128]")
    add("--limit", type=int, help="measured texts per domain [every second document's]")
    add("--methods", nargs="+", choices=AUTO_METHODS, default=list(AUTO_METHODS))
    add("--dtype", default="bfloat16")
    add("--serve-flags", default=_CPU_FLAGS, help=f"[{_CPU_FLAGS}]")
    add("--threads", type=int, default=2, help="that find pools [2]")
    add("--margins", action="store_true", help="leave domains out of the classifier instead")
    add("--report", action="store_true", help="print the latest results, measure nothing")
    return parser.parse_args()


# -- measuring --


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return every figure of one model."""
    tokenizer = ModelTokenizer(args.model)
    longest = max(args.lengths) + args.follow
    domains = read_domains(args, tokenizer)
    texts = [(d.name, t.ids) for d in domains for t in d.measured if len(t.ids) == longest]
    checkpoint = Checkpoint.open(args.model)
    largest = max(moe.num_experts for moe in checkpoint.config.moe_layers if moe)
    asked: dict[tuple[str, str, int], list[Asked]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        flags = [*shlex.split(args.serve_flags), "--dtype", args.dtype]
        flags += ["--served-model-name", _BASE, "--auto-tokens", str(max(args.lengths))]
        flags += write_inputs(Path(scratch), checkpoint, domains, tokenizer, args.experts)
        losses: dict[str, list[float]] = {}
        for slots in (largest - 1, largest):
            for method in args.methods:
                of_run = [*flags, "--auto-method", method, "--expert-slots", str(slots)]
                base = "resident" if slots == largest else "not resident"
                with serve(args.model, of_run) as (endpoint, _):
                    for length in args.lengths:
                        print(f"{method}, base {base}, {length} tokens", flush=True)
                        prompts = [ids[:length] for _, ids in texts]
                        asked[method, base, length] = ask_all(endpoint, prompts)
                    if slots == largest and not losses:
                        losses = score(endpoint, [ids for _, ids in texts], domains)
    labels = [name for name, _ in texts]
    rows = [
        {"method": method, "base": base, "tokens": length}
        | rows_of(found, labels, window(losses, length, args.follow))
        for (method, base, length), found in asked.items()
    ]
    return {
        "model": args.model.name,
        "experts": args.experts,
        "domains": len(domains),
        "texts": len(texts),
        "follow": args.follow,
        "rows": rows,
    }


def read_domains(args: argparse.Namespace, tokenizer: ModelTokenizer) -> list[Domain]:
    """Read every domain, measured texts cut to what is asked of them."""
    longest = max(args.lengths) + args.follow
    paths = sorted(args.texts.glob("*.jsonl"))
    return [read_domain(path, tokenizer.encode, longest, args.limit, None) for path in paths]


def sent_away(args: argparse.Namespace) -> dict[str, Any]:
    """Return how many texts of known and of unknown domains lie below some margins.

    Each domain in turn is left out of the classifier, and its texts are the unknown ones.
    """
    tokenizer = ModelTokenizer(args.model)
    domains = read_domains(args, tokenizer)
    found: dict[int, dict[bool, list[float]]] = {n: {True: [], False: []} for n in args.lengths}
    for unknown in domains:
        examples = {d.name: [tokenizer.decode(t.ids) for t in d.examples] for d in domains}
        del examples[unknown.name]
        classifier = PoolClassifier.fit(examples)
        for domain in domains:
            for text in domain.measured:
                for length in args.lengths:
                    margins = classifier.margins(tokenizer.decode(text.ids[:length]))
                    found[length][domain is not unknown].append(max(margins.values()))
    margins_tried = (-0.5, MIN_MARGIN, 0.0)
    rows = [
        {
            "tokens": length,
            "margin": margin,
            "known": statistics.mean(value < margin for value in found[length][True]),
            "unknown": statistics.mean(value < margin for value in found[length][False]),
        }
        for length in args.lengths
        for margin in margins_tried
    ]
    for row in rows:
        print(
            f"{row['tokens']} tokens, margin {row['margin']}: to the base pool"
            f" {row['known']:.3f} of known domains, {row['unknown']:.3f} of unknown"
        )
    return {"domains": len(domains), "margins": rows}


def write_inputs(
    scratch: Path,
    checkpoint: Checkpoint,
    domains: Sequence[Domain],
    tokenizer: ModelTokenizer,
    k: int,
) -> list[str]:
    """Find and write the pools, write the examples; return the flags that name both."""
    pools, examples = scratch / "pools", scratch / "examples"
    pools.mkdir()
    examples.mkdir()
    for domain in domains:
        documents = [torch.tensor(text.ids) for text in domain.examples]
        pool = calibrate(checkpoint, documents, k).pool(domain.name)
        write_pool(pool, pools / f"{domain.name}.json")
        lines = [json.dumps(tokenizer.decode(text.ids)) for text in domain.examples]
        (examples / f"{domain.name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"found pool {domain.name} on {len(documents)} examples", flush=True)
    return ["--pools", str(pools), "--auto-examples", str(examples)]


def ask_all(endpoint: Endpoint, prompts: Sequence[Sequence[int]]) -> list[Asked]:
    """Ask for each prompt's pool; then, with that pool resident, take both times."""
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)  # else a pool would be loaded once for its whole domain
    found: list[Asked] = []
    for place in order:
        _, model = first_token(endpoint, "auto", prompts[place])
        seconds: dict[str, float] = {}
        for name in ("auto", model) if place % 2 else (model, "auto"):
            seconds[name], answered = first_token(endpoint, name, prompts[place])
            assert answered == model, (answered, model)
        found.append(Asked(place, model, seconds["auto"], seconds[model]))
    return found


def first_token(endpoint: Endpoint, model: str, prompt: Sequence[int]) -> tuple[float, str]:
    """Return the seconds to a stream's first event, and the model it names."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
        "cache_salt": str(time.monotonic_ns()),
    }
    start, seconds, named = time.perf_counter(), 0.0, ""
    with endpoint.http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{model}: {response.status_code} {response.read()[:500]!r}")
        for line in response.iter_lines():
            if line.startswith("data: {") and not named:
                seconds = time.perf_counter() - start
                named = json.loads(line.removeprefix("data: "))["model"]
    return seconds, named


def score(
    endpoint: Endpoint, texts: Sequence[Sequence[int]], domains: Sequence[Domain]
) -> dict[str, list[Any]]:
    """Return each pool's losses of every text, token by token."""
    losses: dict[str, list[Any]] = {}
    for name in (_BASE, *(domain.name for domain in domains)):
        print(f"losses in {name}", flush=True)
        scored = endpoint.score(name, texts)
        losses[name] = [[-token.logprob for token in tokens] for tokens in scored]
    return losses


def window(losses: Mapping[str, Sequence[Any]], length: int, follow: int) -> Losses:
    """Return each pool's loss of every text over the tokens that follow its first `length`."""
    return {
        name: [statistics.mean(row[length - 1 : length - 1 + follow]) for row in rows]
        for name, rows in losses.items()
    }


# -- figures --


def rows_of(found: Sequence[Asked], labels: Sequence[str], losses: Losses) -> dict[str, Any]:
    """Return the figures of the choices of one method and length."""
    got = [losses[asked.chosen][asked.text] for asked in found]
    own = [losses[labels[asked.text]][asked.text] for asked in found]
    base = [losses[_BASE][asked.text] for asked in found]
    return {
        "right": statistics.mean(asked.chosen == labels[asked.text] for asked in found),
        "to_base": statistics.mean(asked.chosen == _BASE for asked in found),
        "loss": statistics.mean(got),
        "own_loss": statistics.mean(own),
        "base_loss": statistics.mean(base),
        "above_own": statistics.mean(got) - statistics.mean(own),
        "above_own_error": standard_error(got, own),
        **added_ms(found),
    }


def added_ms(found: Sequence[Asked]) -> dict[str, float]:
    """Return quantiles of the differences, and the median times themselves."""
    differences = [1e3 * (asked.auto_seconds - asked.named_seconds) for asked in found]
    tenths = statistics.quantiles(differences, n=10)
    return {
        "added_ms_p50": statistics.median(differences),
        "added_ms_p90": tenths[-1],
        "named_ms_p50": 1e3 * statistics.median(asked.named_seconds for asked in found),
    }


def report(directory: Path) -> list[str]:
    """Return each model's latest table, as Markdown."""
    path = directory / "auto.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    measured = [line for line in map(json.loads, lines) if "rows" in line["result"]]
    latest = {line["result"]["model"]: line for line in measured}
    told: list[str] = []
    for name, line in latest.items():
        result = line["result"]
        told += [
            "",
            f"{name}: {result['domains']} pools of {result['experts']}, {result['texts']} texts,"
            f" loss over {result['follow']} tokens; {line['device'][0]}, {line['date'][:10]}",
            "",
            "| base pool | tokens | method | right | to base | loss | own pool's | base's"
            " | above own | added ms p50 | p90 | named ms |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        told += map(_line_of, sorted(result["rows"], key=_place))
    return told


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["base"] != "resident", row["tokens"], row["method"]


def _line_of(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['base']} | {row['tokens']} | {row['method']} | {row['right']:.3f}"
        f" | {row['to_base']:.3f} | {row['loss']:.3f} | {row['own_loss']:.3f}"
        f" | {row['base_loss']:.3f} | {row['above_own']:+.3f} +- {row['above_own_error']:.3f}"
        f" | {row['added_ms_p50']:.1f} | {row['added_ms_p90']:.1f} | {row['named_ms_p50']:.1f} |"
    )


if __name__ == "__main__":
    main()
