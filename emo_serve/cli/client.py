"""HTTP client for the pools of a running server, used by `emo-serve pools --server URL`.

One object per server. Each failure is one error whose message says what to do, in the server's own
words if it answered. Answers are the JSON of /v1/pools, which the server documents in its
/openapi.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from emo_serve.cli.environment import route_to
from emo_serve.cli.rendering.tables import printable
from emo_serve.errors import ConfigError, RequestError, Unavailable
from emo_serve.names import UNION

__all__ = ["ADMIN_KEY_VARIABLE", "KEY_VARIABLES", "PoolServer", "key_from"]

ADMIN_KEY_VARIABLE = "EMO_SERVE_ADMIN_API_KEY"
KEY_VARIABLES = (ADMIN_KEY_VARIABLE, "EMO_SERVE_API_KEY", "VLLM_API_KEY")
"""Environment variables that are searched for a key, in this order, when none is given."""

_CONNECT_SECONDS = 10.0
_FIRST_SERVER_ERROR = 500
_OBJECTS = ("pool", "pool.usage", "list")
_NOT_OURS = "but not with the pools of an emo-serve server"


def key_from(given: str | None, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the key to send: the one given, or the first found in a variable."""
    known = os.environ if environ is None else environ
    candidates = (given, *(known.get(variable) for variable in KEY_VARIABLES))
    return next((key.strip() for key in candidates if key and key.strip()), None)


class PoolServer:
    """Query and change the pools of one server. Use it in a `with`.

    `url` may end in /v1, as OpenAI clients write it. Raises RequestError for what the caller must
    change (a key, a name, a document), ConfigError for an invalid URL, and Unavailable for a server
    that does not answer or has failed.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_seconds: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        base = url if "://" in url else f"http://{url}"
        self.url = base.rstrip("/").removesuffix("/v1")
        self._timeout_seconds = timeout_seconds
        value = f"Bearer {key}".encode("utf-8", "surrogateescape")  # a variable may hold any bytes
        headers = [] if key is None else [(b"authorization", value)]
        try:
            address = httpx.URL(self.url)
            if not 0 < (address.port or 1) < 2**16:
                raise ValueError(f"there is no port {address.port}")
            route = route_to(address)
        except (httpx.InvalidURL, ValueError) as error:
            raise self._bad_url(error) from error
        self._via = route.via
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, _CONNECT_SECONDS)),
            transport=transport,
            verify=route.verify,
            proxy=None if transport else route.proxy,
            trust_env=False,  # the route has what the environment says
        )

    def __enter__(self) -> PoolServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    # -- the routes --

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
        try:
            response = self._client.request(
                method, f"{self.url}/v1/pools{path}", params=params, content=body, headers=headers
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, OverflowError, ValueError) as error:
            raise self._bad_url(error) from error
        except httpx.ProxyError as error:
            raise Unavailable(f"{self.url} cannot be asked{self._via}: {error}") from error
        except httpx.ConnectError as error:
            raise Unavailable(
                f"no server answers at {self.url}{self._via} ({error}); is `emo-serve serve`"
                " running there?"
            ) from error
        except httpx.TimeoutException as error:
            raise Unavailable(
                f"no answer from {self.url} within {self._timeout_seconds:g} s; a load or"
                " build that has begun continues there; see `emo-serve pools list --server`, or"
                " raise --timeout"
            ) from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} does not speak HTTP: {error}") from error
        if not response.is_success:
            raise self._refusal(response)
        answer = _parsed(response)
        if not isinstance(answer, dict) or answer.get("object") not in _OBJECTS:
            raise ConfigError(f"{self.url} answers, {_NOT_OURS}")
        return answer

    def _bad_url(self, error: Exception) -> ConfigError:
        return ConfigError(f"--server is {self.url!r}: {error}; give http://HOST:PORT")

    def _refusal(self, response: httpx.Response) -> Exception:
        status, message = response.status_code, _message(response)
        if message is None:
            return ConfigError(f"{self.url} answers {status}, {_NOT_OURS}")
        if status == httpx.codes.UNAUTHORIZED:
            return RequestError(
                f"{message}; set {KEY_VARIABLES[1]} ({ADMIN_KEY_VARIABLE} to change pools), or give"
                " --api-key"
            )
        if status == httpx.codes.FORBIDDEN:
            return RequestError(f"{message}; set {ADMIN_KEY_VARIABLE}, or give it by --api-key")
        if status < _FIRST_SERVER_ERROR:
            return RequestError(message)
        seconds = response.headers.get("retry-after")
        return Unavailable(f"{message}; try again in {seconds} s" if seconds else message)


def _path(name: str, verb: str | None = None) -> str:
    path = f"/{quote(name, safe=UNION)}"
    return path if verb is None else f"{path}/{verb}"


def _json(options: dict[str, bool]) -> bytes:
    return json.dumps(options).encode()


def _message(response: httpx.Response) -> str | None:
    """Return the text of an error in OpenAI's shape, or of vLLM's own key check."""
    answer = _parsed(response)
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return printable(" ".join(message.split())) if isinstance(message, str) else None


def _parsed(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None
