"""HTTP client for the pools of a running server, used by `emo-serve pools --server URL`.

Answers are the JSON of /v1/pools, which the server documents in its /openapi.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from emo_serve.cli.connection import NOT_OURS, Connection, parsed
from emo_serve.errors import ConfigError
from emo_serve.names import UNION

__all__ = ["PoolServer"]

_OBJECTS = ("pool", "pool.usage", "list")


class PoolServer(Connection):
    """Query and change the pools of one server. Use it in a `with`."""

    def list_pools(self, *, experts: bool = False) -> dict[str, Any]:
        """Return every pool and the slab's slots; with `experts` also the holders of each."""
        return self._ask("GET", "", params={"experts": "true"} if experts else None)

    def show(self, name: str) -> dict[str, Any]:
        """Return one pool with its expert ids."""
        return self._ask("GET", _path(name))

    def usage(self, name: str) -> dict[str, Any]:
        """Return how often tokens took each expert of a pool."""
        return self._ask("GET", _path(name, "usage"))

    def load(self, name: str, *, pin: bool = False) -> dict[str, Any]:
        """Make a pool resident; returns when it is."""
        return self._ask("POST", _path(name, "load"), body=_json({"pin": pin}))

    def evict(self, name: str, *, drain: bool = False) -> dict[str, Any]:
        """Free the slots that only this pool needs; with `drain` wait for its requests to end."""
        return self._ask("POST", _path(name, "evict"), body=_json({"drain": drain}))

    def evict_all(self, *, drain: bool = False) -> dict[str, Any]:
        """Evict every pool that is not pinned; return all pools and the slab's slots."""
        return self._ask("POST", "/evict-all", body=_json({"drain": drain}))

    def pin(self, name: str) -> dict[str, Any]:
        """Make a pool resident and keep it so."""
        return self._ask("POST", _path(name, "pin"))

    def unpin(self, name: str) -> dict[str, Any]:
        """Allow a pool to be evicted again."""
        return self._ask("POST", _path(name, "unpin"))

    def add(self, document: bytes, *, replace: bool = False) -> dict[str, Any]:
        """Define a pool from a document or from examples; with `replace` redefine it."""
        params = {"replace": "true"} if replace else None
        return self._ask("POST", "", params=params, body=document)

    def remove(self, name: str) -> dict[str, Any]:
        """Remove a pool and its file on the server."""
        return self._ask("DELETE", _path(name))

    @contextmanager
    def follow(self) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
        """Yield what happens to pools and slots: events `pools` and `slots` with their JSON."""
        with self.events("GET", "/v1/residency/events") as (_, events):
            yield ((name, json.loads(data)) for name, data in events)

    # -- one request --

    def _ask(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> dict[str, Any]:
        headers = {} if body is None else {"content-type": "application/json"}
        with self.explained():
            response = self._client.request(
                method, f"{self.url}/v1/pools{path}", params=params, content=body, headers=headers
            )
        if not response.is_success:
            raise self.refusal(response)
        answer = parsed(response)
        if not isinstance(answer, dict) or answer.get("object") not in _OBJECTS:
            raise ConfigError(f"{self.url} answers, {NOT_OURS}")
        return answer


def _path(name: str, verb: str | None = None) -> str:
    path = f"/{quote(name, safe=UNION)}"
    return path if verb is None else f"{path}/{verb}"


def _json(options: dict[str, bool]) -> bytes:
    return json.dumps(options).encode()
