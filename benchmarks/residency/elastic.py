"""What elastic pools are worth: misses that wait, are refused, or begin in a part of their pool.

The shipped model, ten pools of 8 experts per layer, slots for three (24 per layer). One client asks
for pools at random, alone and beside four streams of two pools. One server per way to treat a miss:

    wait     the request waits for its whole pool, as without any flag
    refuse   --load-deadline 0.001: it gets 503 while its pool loads, and the client asks again when
             Retry-After says; its time to first token counts from the first time it asked
    K        --elastic-min-experts K: it begins in a smaller size, which the answer names

Time to first token of hits and misses; a miss is a request whose whole pool was not resident, as
refusals, the request log and the answer's x-emo-pool tell. The loss paid is that of the sizes the
answers named: every domain's held-out texts, scored at that size and at the whole pool's.

    python -m benchmarks.residency.elastic
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.harness.progress import say, steps
from benchmarks.harness.results import append_result
from benchmarks.harness.streams import beside, stream_completion
from benchmarks.residency.switching import foreground, start, summary
from emo_serve import demo
from emo_serve.names import split_size

_EXPERTS_A_POOL = 8  # of the shipped pools, a layer
_PROMPT_CHARACTERS = 200
_TOKENS, _BESIDE_TOKENS = 32, 200


class Answered(NamedTuple):
    """One request: the pool asked for, what served it, time to first token, refusals before."""

    pool: str
    served: str
    seconds: float
    refusals: int

    @property
    def experts(self) -> int:
        """Return the experts per layer that served it."""
        return split_size(self.served)[1] or _EXPERTS_A_POOL


async def ask(http: httpx.AsyncClient, pool: str, prompt: str, tokens: int = _TOKENS) -> Answered:
    """Stream one completion to its end, after as many refusals as there are."""
    body = {"model": pool, "prompt": prompt, "max_tokens": tokens}
    began, refusals = time.perf_counter(), 0
    while True:
        before = time.perf_counter() - began
        try:
            seconds, headers = await stream_completion(http, body)
        except httpx.HTTPStatusError as error:
            await asyncio.sleep(_retry_after(error.response))
            refusals += 1
        else:
            return Answered(pool, headers["x-emo-pool"], before + seconds, refusals)


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds after which a refused request may be sent again; raises for others."""
    if response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
        response.raise_for_status()
    return float(response.headers["retry-after"])


async def load(http: httpx.AsyncClient, pool: str) -> None:
    """Make a pool resident, however often that takes asking."""
    while not (answer := await http.post(f"/v1/pools/{pool}/load")).is_success:
        await asyncio.sleep(_retry_after(answer))


async def endless(http: httpx.AsyncClient, pool: str) -> None:
    """Keep one stream of a pool going."""
    while True:
        prompt = random.choice(demo.heldout(pool))[:_PROMPT_CHARACTERS]
        await ask(http, pool, prompt, _BESIDE_TOKENS)


async def ask_in_turn(
    http: httpx.AsyncClient, log: Path, pools: Sequence[str], requests: int, pause: float
) -> dict[str, Any]:
    """Ask one pool after another; return the times of hits and misses, and what served them."""
    skipped = len(foreground(log, None))
    chance = random.Random(requests)
    answers = []
    for _ in range(requests):
        pool = chance.choice(pools)
        answers.append(
            await ask(http, pool, chance.choice(demo.heldout(pool))[:_PROMPT_CHARACTERS])
        )
        await asyncio.sleep(pause)
    await asyncio.sleep(0.2)  # the last line is written when the stream has ended
    lines = [
        line
        for line in foreground(log, None)[skipped:]
        if split_size(line["pool"])[0] in pools and line["outcome"] == "finished"
    ]
    assert [answer.served for answer in answers] == [line["pool"] for line in lines]
    hits, misses = [], []
    for answer, line in zip(answers, lines, strict=True):
        is_hit = line["is_hit"] and answer.served == answer.pool and not answer.refusals
        (hits if is_hit else misses).append(answer)
    return {
        "hit": summary([answer.seconds for answer in hits]),
        "miss": summary([answer.seconds for answer in misses]) if misses else None,
        "smaller": [[a.pool, a.experts] for a in misses if a.experts < _EXPERTS_A_POOL],
    }


async def ask_beside(
    http: httpx.AsyncClient, log: Path, pools: Sequence[str], requests: int, pause: float
) -> dict[str, Any]:
    """Do the same while four streams of two of the pools run; ask for the others."""
    async with beside(endless(http, pool) for pool in pools[:2] * 2):
        return await ask_in_turn(http, log, pools[2:], requests, pause)


async def measure(url: str, log: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one way to treat misses."""
    pools = demo.domains()
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for pool in [*pools[3:], *pools[:3]]:  # warms up, and loads three
            await load(http, pool)
            await ask(http, pool, "a")
        alone = await ask_in_turn(http, log, pools, args.requests, args.pause)
        return {
            "alone": alone,
            "beside_4_streams": await ask_beside(http, log, pools, args.requests, args.pause),
        }


async def losses(url: str, texts: int, sizes: Sequence[int]) -> dict[str, dict[int, float]]:
    """Return each domain's loss in nats per token on held-out texts, by size."""
    found: dict[str, dict[int, float]] = {}
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for pool in demo.domains():
            found[pool] = {k: await loss(http, f"{pool}@{k}", pool, texts) for k in sizes}
    return found


async def loss(http: httpx.AsyncClient, model: str, domain: str, texts: int) -> float:
    """Return the loss of one domain's texts in one size, per token."""
    body = {
        "model": model,
        "prompt": [text[:1500] for text in demo.heldout(domain)[:texts]],
        "max_tokens": 1,
        "prompt_logprobs": 0,
    }
    whole = {"x-emo-min-experts": "all"}
    answer = await http.post("/v1/completions", json=body, headers=whole)
    answer.raise_for_status()
    values = [
        next(iter(token.values()))["logprob"]
        for choice in answer.json()["choices"]
        for token in choice["prompt_logprobs"]
        if token is not None
    ]
    return -statistics.fmean(values)


def paid(part: dict[str, Any], loss_at: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Return a part with its smaller answers as counts by size, and the loss they paid."""
    smaller = part.pop("smaller")
    extra = [loss_at[pool][k] - loss_at[pool][_EXPERTS_A_POOL] for pool, k in smaller]
    sizes = [k for _, k in smaller]
    part["sizes"] = {k: sizes.count(k) for k in sorted(set(sizes))}
    part["loss_paid"] = statistics.fmean(extra) if extra else 0.0
    return part


def main() -> None:
    """Measure each way, print, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=300, help="of each half [300]")
    parser.add_argument(
        "--ways", default="wait,refuse,2,4", help="wait, refuse or K [wait,refuse,2,4]"
    )
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between requests [0]")
    parser.add_argument("--texts", type=int, default=12, help="held-out texts per domain [12]")
    args = parser.parse_args()
    flags: dict[str, tuple[str, ...]] = {"wait": (), "refuse": ("--load-deadline", "0.001")}
    result: dict[str, Any] = {}
    loss_at: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for way in steps(args.ways.split(","), "ways"):
            log = Path(directory) / f"{way}.jsonl"
            more = flags.get(way, ("--elastic-min-experts", way))
            with start(3 * _EXPERTS_A_POOL, log, *more) as server:
                result[way] = asyncio.run(measure(server.url, log, args))
                if not loss_at and way not in flags:
                    sizes = range(int(way), _EXPERTS_A_POOL + 1)
                    loss_at = asyncio.run(losses(server.url, args.texts, sizes))
            say(f"{way}: {json.dumps(result[way])}")
    for parts in result.values():
        for part in parts.values():
            paid(part, loss_at)
    print(json.dumps(result, indent=1))
    print(f"appended to {append_result('elastic', vars(args), result)}")


if __name__ == "__main__":
    main()
