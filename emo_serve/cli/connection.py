"""One server over HTTP, as the terminal asks it.

Each failure is one error whose message says what to do, in the server's own words if it answered.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from emo_serve.cli.environment import route_to
from emo_serve.cli.rendering.tables import printable
from emo_serve.errors import ConfigError, RequestError, Unavailable

__all__ = [
    "ADMIN_KEY_VARIABLE",
    "KEY_VARIABLES",
    "NOT_OURS",
    "Connection",
    "events_of",
    "key_from",
    "parsed",
]

ADMIN_KEY_VARIABLE = "EMO_SERVE_ADMIN_API_KEY"
KEY_VARIABLES = (ADMIN_KEY_VARIABLE, "EMO_SERVE_API_KEY", "VLLM_API_KEY")
"""Environment variables that are searched for a key, in this order, when none is given."""

NOT_OURS = "but not with the pools of an emo-serve server"

_CONNECT_SECONDS = 10.0
_FIRST_SERVER_ERROR = 500


def key_from(given: str | None, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the key to send: the one given, or the first found in a variable."""
    known = os.environ if environ is None else environ
    candidates = (given, *(known.get(variable) for variable in KEY_VARIABLES))
    return next((key.strip() for key in candidates if key and key.strip()), None)


class Connection:
    """Ask one server. Use it in a `with`.

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what httpx raises inside the block into errors that say what to do."""
        try:
            yield
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

    @contextmanager
    def events(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[tuple[httpx.Response, Iterator[tuple[str, str]]]]:
        """Ask for a stream; yield the answer's head, and its events as (name, data)."""
        with ExitStack() as stack:
            with self.explained():
                asked = self._client.stream(method, f"{self.url}{path}", json=body, headers=headers)
                response = stack.enter_context(asked)
                if not response.is_success:
                    response.read()
                    raise self.refusal(response)
            yield response, events_of(self._lines(response))

    def _lines(self, response: httpx.Response) -> Iterator[str]:
        with self.explained():
            try:
                yield from response.iter_lines()
            except (httpx.ReadError, httpx.RemoteProtocolError) as error:
                raise Unavailable(f"{self.url} broke off its answer: {error}") from error

    def _bad_url(self, error: Exception) -> ConfigError:
        return ConfigError(f"--server is {self.url!r}: {error}; give http://HOST:PORT")

    def refusal(self, response: httpx.Response) -> Exception:
        """Return the error for an answer that is none."""
        status, message = response.status_code, _message(response)
        if message is None:
            return ConfigError(f"{self.url} answers {status}, {NOT_OURS}")
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


def events_of(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the data of server-sent events; comments are left out."""
    name, data = "message", []
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif not line:
            if data:
                yield name, "\n".join(data)
            name, data = "message", []


def _message(response: httpx.Response) -> str | None:
    """Return the text of an error in OpenAI's shape, or of vLLM's own key check."""
    answer = parsed(response)
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return printable(" ".join(message.split())) if isinstance(message, str) else None


def parsed(response: httpx.Response) -> Any:
    """Return the JSON of an answer; None if it is none."""
    try:
        return response.json()
    except ValueError:
        return None
