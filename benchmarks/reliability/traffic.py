"""The mixed load of the soak: what clients and operators of a server do, the careless ones too.

Clients ask for named pools, unions and `auto`, as streams or not, for text and chat; some leave in
the middle or before an answer, some send bodies that are refused. There are more pools than slots,
so pools are loaded and evicted all the time. One operator lists, loads, evicts, adds, builds and
removes pools.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from benchmarks.reliability.client import COMPLETIONS, Answer, ask, read_event
from emo_serve import demo

__all__ = ["Traffic"]

_CHAT = "/v1/chat/completions"
_ADDED = ("soak-a", "soak-b", "soak-c")  # there at times; asked for always
_SHARES = {
    "stream": 28,
    "plain": 18,
    "chat": 10,
    "union": 6,
    "auto": 8,
    "added": 4,
    "leaves": 10,
    "leaves early": 5,
    "refused": 8,
    "tokenize": 3,
}
_OPERATIONS = {"list": 3, "usage": 1, "load": 3, "evict": 3, "add": 3, "remove": 2, "build": 1}
_EXPECTED: dict[str, set[int]] = {
    "added": {200, 404, 503},
    "refused": {400, 404, 413},
    "load": {200, 409, 503},
    "evict": {200, 409},
    "add": {200, 201, 409},
    "remove": {200, 404, 409},
    "build": {200, 201, 409, 503},
}
_BAD_BODIES: tuple[tuple[str, dict[str, Any] | bytes], ...] = (
    (COMPLETIONS, {"model": "nowhere", "prompt": "a"}),
    (COMPLETIONS, {"model": "python", "prompt": "a", "max_tokens": -1}),
    (COMPLETIONS, {"model": "python", "prompt": "a", "n": 5000}),
    (COMPLETIONS, {"model": "python", "prompt": "a", "temperature": "hot", "stream": True}),
    (COMPLETIONS, {"model": "python"}),
    (COMPLETIONS, {"model": "auto", "prompt": "word " * 200_000}),
    (COMPLETIONS, b'{"model": "python", "prompt": '),
    (COMPLETIONS, b"[" + b" " * (9 << 20) + b"]"),
    (_CHAT, {"model": "python", "messages": "hello"}),
    ("/v1/pools", {"format": "emo-pool/1", "name": "..", "layers": []}),
)


class Traffic:
    """Counts of what was asked, by kind, status and ending; `surprises` has unexpected answers."""

    def __init__(self, session: aiohttp.ClientSession, seed: int = 1) -> None:
        self.counts: Counter[str] = Counter()
        self.surprises: list[str] = []
        self._session = session
        self._chance = random.Random(seed)
        self._domains = demo.domains()
        self._texts = {name: demo.heldout(name) for name in self._domains}
        self._kinds: dict[str, Callable[[], Awaitable[Answer]]] = {
            "stream": lambda: self._complete(self._pool(), stream=True),
            "plain": lambda: self._complete(self._pool()),
            "chat": self._chat,
            "union": lambda: self._complete("+".join(self._chance.sample(self._domains, 2))),
            "auto": lambda: self._complete("auto", stream=self._chance.random() < 0.5),
            "added": lambda: self._complete(self._chance.choice(_ADDED)),
            "leaves": self._leave_in_the_middle,
            "leaves early": self._leave_early,
            "refused": self._send_bad_body,
            "tokenize": lambda: self._post({"model": self._pool(), "prompt": "a b"}, "/tokenize"),
        }

    async def client(self, end: float, pause_seconds: float) -> None:
        """Ask and pause in turn until `end` (time.monotonic)."""
        while time.monotonic() < end:
            (kind,) = self._chance.choices(list(_SHARES), list(_SHARES.values()))
            self._count(kind, await self._kinds[kind]())
            await asyncio.sleep(self._chance.expovariate(1 / pause_seconds))

    async def operator(self, end: float, pause_seconds: float) -> None:
        """Change pools until `end`, one operation at a time."""
        while time.monotonic() < end:
            (kind,) = self._chance.choices(list(_OPERATIONS), list(_OPERATIONS.values()))
            self._count(kind, await self._operate(kind))
            await asyncio.sleep(pause_seconds)

    # -- clients --

    def _pool(self) -> str:
        return self._chance.choice(self._domains)

    def _body(self, model: str, tokens: int) -> dict[str, Any]:
        text = self._chance.choice(self._texts[self._pool() if model == "auto" else "python"])
        length = self._chance.randrange(20, 400)
        return {"model": model, "prompt": text[:length], "max_tokens": tokens, "ignore_eos": True}

    async def _post(self, body: dict[str, Any] | bytes, path: str) -> Answer:
        return await ask(self._session, body, path)

    async def _complete(self, model: str, stream: bool = False) -> Answer:
        body = self._body(model, self._chance.randrange(1, 60))
        return await self._post({**body, "stream": stream}, COMPLETIONS)

    async def _chat(self) -> Answer:
        message = {"role": "user", "content": f"hi {self._chance.randrange(999)}"}
        stream = self._chance.random() < 0.5
        body = {"model": self._pool(), "messages": [message], "max_tokens": 20, "stream": stream}
        return await self._post(body, _CHAT)

    async def _send_bad_body(self) -> Answer:
        path, body = self._chance.choice(_BAD_BODIES)
        return await self._post(body, path)

    async def _leave_in_the_middle(self) -> Answer:
        """Close the connection after the first token of many."""
        start = time.monotonic()
        body = {**self._body(self._pool(), 500), "stream": True}
        try:
            async with self._session.post(COMPLETIONS, json=body) as response:
                async for line in response.content:
                    if read_event(line) is not None:
                        break
                response.close()
                return Answer(response.status, "left", time.monotonic() - start)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return Answer(None, "no answer", time.monotonic() - start, message=repr(error))

    async def _leave_early(self) -> Answer:
        """Close the connection soon, often while the pool is waited for."""
        start = time.monotonic()
        body = {**self._body(self._pool(), 500), "stream": self._chance.random() < 0.5}
        try:
            async with asyncio.timeout(self._chance.uniform(0.001, 0.2)):
                return await self._post(body, COMPLETIONS)
        except TimeoutError:
            return Answer(200, "left", time.monotonic() - start)

    # -- the operator --

    async def _operate(self, kind: str) -> Answer:
        name, added = self._pool(), self._chance.choice(_ADDED)
        if kind == "add":
            document = json.loads((demo.pools_dir() / f"{name}.json").read_text())
            return await self._post({**document, "name": added}, "/v1/pools?replace=true")
        if kind == "build":
            texts = [text[:400] for text in self._chance.sample(self._texts[name], 3)]
            body = {"name": added, "examples": texts, "experts": 8}
            return await self._post(body, "/v1/pools?replace=true")
        if kind in ("load", "evict"):
            return await self._post({}, f"/v1/pools/{name}/{kind}")
        path = {"list": "", "usage": f"/{name}/usage", "remove": f"/{added}"}[kind]
        return await self._request("DELETE" if kind == "remove" else "GET", f"/v1/pools{path}")

    async def _request(self, method: str, path: str) -> Answer:
        start = time.monotonic()
        try:
            async with self._session.request(method, path) as response:
                text = await response.text()
                seconds = time.monotonic() - start
                return Answer(response.status, "finished", seconds, message=text[:300])
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return Answer(None, "no answer", time.monotonic() - start, message=repr(error))

    def _count(self, kind: str, answer: Answer) -> None:
        self.counts[f"{kind}: {answer.status or '-'} {answer.ending}"] += 1
        is_expected = answer.status in _EXPECTED.get(kind, {200, 503})
        if (not is_expected or answer.ending in ("torn", "error event")) and (
            len(self.surprises) < 20
        ):
            self.surprises.append(f"{kind}: {answer.status} {answer.ending} {answer.message}")
