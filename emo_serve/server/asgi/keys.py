"""Which key opens which routes. Pure ASGI around all routes, vLLM's and ours.

vLLM's own check covers only paths that begin with /v1, has one kind of key, and answers outside the
CORS middleware, so that no browser may read why. This check replaces it, inside that middleware. It
covers every path. An admin key opens everything. An API key does too, except that it may not change
pools once admin keys are set. A server that other machines can reach changes pools only for an
admin key; without one it refuses. A path is judged as the router will see it: decoded once, without
the root path, and by its beginning, so that every spelling a route accepts counts.

    keys set            pools, changing      open_paths     everything else
    none                open                 open           open
    api                 api                  open           api
    admin               admin                open           open
    api and admin       admin                open           api or admin
    no admin, network   refused              as above       as above
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http import HTTPStatus
from typing import Literal

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from emo_serve.server.asgi.bodies import READING_METHODS
from emo_serve.server.asgi.errors import error_response, route_path

__all__ = ["Access", "KeyGuard", "KeyWord", "access_of"]

_POOLS = "/v1/pools"
_ACCESS = "emo_serve.access"
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1
_NO_ADMIN_KEY = (
    "pools cannot be changed: other machines can reach this server, and it has no admin key; start"
    " it with --admin-api-key KEY, or with --host 127.0.0.1"
)


class _Key(Enum):
    """The kind of key in a request's Authorization header."""

    NONE = "no key"
    UNKNOWN = "a key the server does not know"
    API = "an API key"
    ADMIN = "an admin key"


KeyWord = Literal["none", "unknown", "api", "admin"]
"""What a request's key is, for clients."""

_WORDS: dict[_Key, KeyWord] = {
    _Key.NONE: "none",
    _Key.UNKNOWN: "unknown",
    _Key.API: "api",
    _Key.ADMIN: "admin",
}


@dataclass(frozen=True)
class Access:
    """What one request may do beside reading; `refusal` says why not, None if it may."""

    key: KeyWord
    refusal: str | None


def access_of(scope: Scope) -> Access:
    """Return what the client of a request that passed the guard may do to pools."""
    access: Access = scope[_ACCESS]()
    return access


class KeyGuard:
    """Wrap an ASGI app; pass only requests that the key in `Authorization: Bearer` opens.

    `open_paths` are exact paths that need no key. `is_local` says that only this machine can
    connect, so that pools may be changed without an admin key.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Collection[str],
        admin_keys: Collection[str],
        open_paths: Collection[str],
        *,
        is_local: bool,
    ) -> None:
        self.app = app
        self._is_local = is_local
        self._api_hashes = _hashes(api_keys)
        self._admin_hashes = _hashes(admin_keys)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one ASGI connection on, or refuse it with 401 or 403."""
        scope[_ACCESS] = partial(self._access, scope)
        opened_by = self._opened_by(scope)
        key = self._key(scope) if opened_by else _Key.ADMIN
        if not opened_by or key in opened_by:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            await self._refused(scope, key, opened_by)(scope, receive, send)

    def _opened_by(self, scope: Scope) -> tuple[_Key, ...]:
        """Return the kinds of keys that open a connection; empty if it needs no key."""
        method = scope.get("method")  # a websocket has none
        if scope["type"] not in ("http", "websocket") or method == "OPTIONS":
            return ()  # OPTIONS: a browser's preflight carries no key
        path = route_path(scope)
        if path.startswith(_POOLS) and method not in READING_METHODS:
            return self._changing_opened_by()
        if not self._api_hashes or path in self._open_paths:
            return ()
        return (_Key.API, _Key.ADMIN)

    def _changing_opened_by(self) -> tuple[_Key, ...]:
        """Return the kinds of keys that may change pools; empty if that needs no key."""
        if self._admin_hashes or not self._is_local:
            return (_Key.ADMIN,)
        return (_Key.API, _Key.ADMIN) if self._api_hashes else ()

    def _access(self, scope: Scope) -> Access:
        key, opened_by = self._key(scope), self._changing_opened_by()
        may_change = not opened_by or key in opened_by
        return Access(_WORDS[key], None if may_change else self._reason(key, opened_by)[1])

    def _key(self, scope: Scope) -> _Key:
        value = Headers(scope=scope).get("authorization", "")
        scheme, _, token = value.partition(" ")
        if scheme.lower() != "bearer" or not token:
            return _Key.NONE
        digest = hashlib.sha256(token.encode("latin-1")).digest()
        # Every hash is compared, in constant time, so that timing tells nothing about the keys.
        is_admin, is_api = (
            sum(secrets.compare_digest(digest, known) for known in hashes)
            for hashes in (self._admin_hashes, self._api_hashes)
        )
        return _Key.ADMIN if is_admin else _Key.API if is_api else _Key.UNKNOWN

    def _refused(self, scope: Scope, key: _Key, opened_by: tuple[_Key, ...]) -> JSONResponse:
        status, message = self._reason(key, opened_by)
        asks = {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else {}
        return error_response(scope, status, message, asks)

    def _reason(self, key: _Key, opened_by: tuple[_Key, ...]) -> tuple[HTTPStatus, str]:
        """Return 403 if no key or a better key would do, 401 for a missing or unknown key."""
        if opened_by == (_Key.ADMIN,) and not self._admin_hashes:
            return HTTPStatus.FORBIDDEN, _NO_ADMIN_KEY
        if key is _Key.API:
            message = "this key may not change pools; use a key given by --admin-api-key"
            return HTTPStatus.FORBIDDEN, message
        return HTTPStatus.UNAUTHORIZED, (
            f"{key.value} was sent; send 'Authorization: Bearer KEY' with a key of this server"
        )


def _hashes(keys: Collection[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys if key)
