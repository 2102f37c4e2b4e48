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
from enum import Enum
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from emo_serve.server.asgi.bodies import READING_METHODS
from emo_serve.server.asgi.errors import error_response, route_path

__all__ = ["KeyGuard"]

_POOLS = "/v1/pools"
_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1
_NO_ADMIN_KEY = (
    "pools cannot be changed: other machines can reach this server, and it has no admin key; start"
    " it with --admin-api-key KEY, or with --host 127.0.0.1"
)


class _Key(Enum):
    """The kind of key in a request's Authorization header."""

    MISSING = "no key"
    UNKNOWN = "a key the server does not know"
    API = "an API key"
    ADMIN = "an admin key"


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
        changes_pools = path.startswith(_POOLS) and method not in READING_METHODS
        if changes_pools and (self._admin_hashes or not self._is_local):
            return (_Key.ADMIN,)
        if not self._api_hashes or (path in self._open_paths and not changes_pools):
            return ()
        return (_Key.API, _Key.ADMIN)

    def _key(self, scope: Scope) -> _Key:
        value = Headers(scope=scope).get("authorization", "")
        scheme, _, token = value.partition(" ")
        if scheme.lower() != "bearer" or not token:
            return _Key.MISSING
        digest = hashlib.sha256(token.encode("latin-1")).digest()
        # Every hash is compared, in constant time, so that timing tells nothing about the keys.
        is_admin, is_api = (
            sum(secrets.compare_digest(digest, known) for known in hashes)
            for hashes in (self._admin_hashes, self._api_hashes)
        )
        return _Key.ADMIN if is_admin else _Key.API if is_api else _Key.UNKNOWN

    def _refused(self, scope: Scope, key: _Key, opened_by: tuple[_Key, ...]) -> JSONResponse:
        """Return 403 if no key or a better key would do, 401 for a missing or unknown key."""
        if opened_by == (_Key.ADMIN,) and not self._admin_hashes:
            return error_response(scope, HTTPStatus.FORBIDDEN, _NO_ADMIN_KEY)
        if key is _Key.API:
            message = "this key may not change pools; use a key given by --admin-api-key"
            return error_response(scope, HTTPStatus.FORBIDDEN, message)
        message = (
            f"{key.value} was sent; send 'Authorization: Bearer KEY' with a key of this server"
        )
        return error_response(
            scope, HTTPStatus.UNAUTHORIZED, message, {"www-authenticate": "Bearer"}
        )


def _hashes(keys: Collection[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys if key)
