"""`model: "auto"`: how often it finds a text's domain, what mistakes cost, and how long it takes.

Every domain's pool is found layerwise on its examples; prompts are the first 8 to 256 tokens of its
other texts, which share no document with the examples (`accuracy/texts.py`). A second set, reported
apart, has fifty short prompts a domain, written by hand: code to go on with, facts to fill in,
questions and instructions (`accuracy/by_hand/`). Nothing was learned from either set, and no margin
chosen on them (`accuracy/auto_margins.py`). A real server chooses over HTTP, by the router, by the
classifier that learned from the same examples, or by the vote of both, once with the base pool
resident and once in a slab one slot per layer too small for it. Each prompt's choice is read from
the answer's `model`.

- right: the share of prompts that got their own domain's pool; a prompt sent to the base pool is
  not right and is counted apart.
- loss: nats per token over the `--follow` tokens after the prompt, of the whole text run in the
  chosen pool; beside it in the domain's own pool (the oracle's) and in the base pool
  (`prompt_logprobs` of the server that holds all experts). Prompts by hand go nowhere, so theirs is
  of the 32 tokens that the base pool goes on with, drawn at temperature 1, and apart from that of
  the prompt itself.
- against: the vote's loss minus that of either method alone, prompt by prompt, with a 95 % interval
  (`accuracy/auto_report.py`). Methods measured by several calls, on the same texts, are compared.
- added ms: time to the first token of a stream for `auto` minus that for the chosen pool by its
  name, prompt by prompt; one client, the two taking turns at being first, no prefix cache hits.

    python -m benchmarks.accuracy.auto                  # the shipped model
    python -m benchmarks.accuracy.auto --model emo_serve/demo/models/standard-moe-demo
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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.auto_report import report
from benchmarks.accuracy.prompts import PROMPTS, read_prompts
from benchmarks.accuracy.scoring import Endpoint, standard_error
from benchmarks.accuracy.servers import serve
from benchmarks.accuracy.texts import Domain, read_domain
from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import RESULTS, append_result
from emo_serve import demo
from emo_serve.emo.checkpoint import Checkpoint
from emo_serve.emo.tokenizer import ModelTokenizer
from emo_serve.pools.calibration.build import calibrate
from emo_serve.pools.document import write_pool

__all__ = ["Asked", "added_ms", "rows_of"]

_CPU_FLAGS = "--enforce-eager --max-num-seqs 64 --kv-cache-memory-bytes 536870912"
_METHODS = {
    "vote": [],  # the default
    "tfidf": ["--auto-method", "tfidf"],
    "router": ["--auto-method", "router"],
}
_BASE = "base-model"  # the name the servers give to it
_GOES_ON = 32  # tokens of the base pool after a prompt by hand
_PROMPTS_A_REQUEST = 50
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
        result = measure(args)
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
    add(
        "--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 256], help="of prompts, in tokens"
    )
    add("--prompts", type=Path, default=PROMPTS, help="DOMAIN.jsonl each [written by hand]")
    add("--follow", type=int, default=128, help="tokens after the prompt, for the loss [128]")
    add("--limit", type=int, help="measured texts per domain [every second document's]")
    add("--methods", nargs="+", choices=_METHODS, default=list(_METHODS))
    add("--dtype", default="bfloat16")
    add("--serve-flags", default=_CPU_FLAGS, help=f"[{_CPU_FLAGS}]")
    add("--threads", type=int, default=2, help="that find pools [2]")
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
    written = read_prompts(args.prompts)
    chosen: dict[tuple[str, str], list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        flags = [*shlex.split(args.serve_flags), "--dtype", args.dtype]
        flags += ["--served-model-name", _BASE, "--auto-tokens", str(max(args.lengths))]
        flags += write_inputs(Path(scratch), checkpoint, domains, tokenizer, args.experts)
        losses: dict[str, list[Any]] = {}
        of_written: tuple[Losses, Losses] = ({}, {})
        for slots in (largest - 1, largest):
            for method in args.methods:
                of_run = [*flags, *_METHODS[method], "--expert-slots", str(slots)]
                base = "resident" if slots == largest else "not resident"
                with serve(args.model, of_run) as (endpoint, _):
                    for length in args.lengths:
                        say(f"{method}, base {base}, {length} tokens")
                        prompts = [ids[:length] for _, ids in texts]
                        asked[method, base, length] = ask_all(endpoint, prompts)
                    chosen[method, base] = [
                        first_token(endpoint, "auto", text)[1]
                        for _, text in steps(written, "prompts by hand")
                    ]
                    if slots == largest and not losses:
                        losses = score(endpoint, [ids for _, ids in texts], domains)
                        of_written = score_written(endpoint, written, tokenizer, domains)
    labels = [name for name, _ in texts]
    rows = [
        {"method": method, "base": base, "tokens": length}
        | rows_of(found, labels, window(losses, length, args.follow))
        for (method, base, length), found in asked.items()
    ]
    short = [
        {"method": method, "base": base} | written_row(got, [n for n, _ in written], *of_written)
        for (method, base), got in chosen.items()
    ]
    return {
        "model": args.model.name,
        "experts": args.experts,
        "domains": len(domains),
        "texts": len(texts),
        "follow": args.follow,
        "rows": rows,
        "written": short,
    }


def score_written(
    endpoint: Endpoint,
    written: Sequence[tuple[str, str]],
    tokenizer: ModelTokenizer,
    domains: Sequence[Domain],
) -> tuple[Losses, Losses]:
    """Return each pool's loss of every prompt by hand, and of what the base pool goes on with."""
    prompts = [tokenizer.encode(text) for _, text in written]
    whole: list[list[int]] = []
    for start in range(0, len(prompts), _PROMPTS_A_REQUEST):
        part = prompts[start : start + _PROMPTS_A_REQUEST]
        drawn = {"max_tokens": _GOES_ON, "temperature": 1, "seed": 0, "ignore_eos": True}
        body = {"model": _BASE, "prompt": part, "return_token_ids": True, **drawn}
        answer = endpoint.ask("POST", "/v1/completions", json=body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        whole += [[*ids, *of["token_ids"]] for ids, of in zip(part, choices, strict=True)]
    losses = score(endpoint, whole, domains)
    ends = [len(ids) - 1 for ids in prompts]  # the first token has no loss
    pairs = {name: list(zip(rows, ends, strict=True)) for name, rows in losses.items()}
    return (
        {name: [statistics.mean(row[:end]) for row, end in of] for name, of in pairs.items()},
        {name: [statistics.mean(row[end:]) for row, end in of] for name, of in pairs.items()},
    )


def read_domains(args: argparse.Namespace, tokenizer: ModelTokenizer) -> list[Domain]:
    """Read every domain, measured texts cut to what is asked of them."""
    longest = max(args.lengths) + args.follow
    paths = sorted(args.texts.glob("*.jsonl"))
    return [read_domain(path, tokenizer.encode, longest, args.limit, None) for path in paths]


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
    for domain in steps(domains, "pools"):
        documents = [torch.tensor(text.ids) for text in domain.examples]
        pool = calibrate(checkpoint, documents, k).pool(domain.name)
        write_pool(pool, pools / f"{domain.name}.json")
        lines = [json.dumps(tokenizer.decode(text.ids)) for text in domain.examples]
        (examples / f"{domain.name}.jsonl").write_text("\n".join(lines) + "\n")
    return ["--pools", str(pools), "--auto-examples", str(examples)]


def ask_all(endpoint: Endpoint, prompts: Sequence[Sequence[int]]) -> list[Asked]:
    """Ask for each prompt's pool; then, with that pool resident, take both times."""
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)  # else a pool would be loaded once for its whole domain
    found: list[Asked] = []
    for place in steps(order, "prompts"):
        _, model = first_token(endpoint, "auto", prompts[place])
        seconds: dict[str, float] = {}
        for name in ("auto", model) if place % 2 else (model, "auto"):
            seconds[name], answered = first_token(endpoint, name, prompts[place])
            assert answered == model, (answered, model)
        found.append(Asked(place, model, seconds["auto"], seconds[model]))
    return found


def first_token(endpoint: Endpoint, model: str, prompt: Sequence[int] | str) -> tuple[float, str]:
    """Return the seconds to a stream's first event, and the model it names."""
    body = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
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
    for name in steps([_BASE, *(domain.name for domain in domains)], "losses by pool"):
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
    found = sorted(found, key=lambda asked: asked.text)
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
        "above_own_by_text": above(got, own),
        **added_ms(found),
    }


def written_row(
    chosen: Sequence[str], labels: Sequence[str], of_prompts: Losses, following: Losses
) -> dict[str, Any]:
    """Return the figures of one method's choices for the prompts by hand."""
    pairs, names = list(zip(chosen, labels, strict=True)), sorted(set(labels))
    row: dict[str, Any] = {
        "prompts": len(labels),
        "right": statistics.mean(got == name for got, name in pairs),
        "to_base": chosen.count(_BASE) / len(chosen),
        "by_domain": {
            name: statistics.mean(got == name for got, of in pairs if of == name) for name in names
        },
    }
    missed = [place for place, (got, name) in enumerate(pairs) if got != name]
    row["misses"] = {
        name: Counter(chosen[p] for p in missed if labels[p] == name) for name in names
    }
    for key, losses in (("of_prompt", of_prompts), ("following", following)):
        got = [losses[name][place] for place, name in enumerate(chosen)]
        own = [losses[name][place] for place, name in enumerate(labels)]
        row[f"{key}_above_own_by_text"] = differences = above(got, own)
        row[f"{key}_of_misses"] = {
            name: [differences[place] for place in missed if labels[place] == name]
            for name in names
        }
    return row


def above(got: Sequence[float], own: Sequence[float]) -> list[float]:
    """Return the differences text by text, short enough for a line of results."""
    return [round(mine - other, 4) for mine, other in zip(got, own, strict=True)]


def added_ms(found: Sequence[Asked]) -> dict[str, float]:
    """Return quantiles of the differences, and the median times themselves."""
    differences = [1e3 * (asked.auto_seconds - asked.named_seconds) for asked in found]
    tenths = statistics.quantiles(differences, n=10)
    return {
        "added_ms_p50": statistics.median(differences),
        "added_ms_p90": tenths[-1],
        "named_ms_p50": 1e3 * statistics.median(asked.named_seconds for asked in found),
    }


if __name__ == "__main__":
    main()
