"""`/` and `/console`: a page that a browser runs, and links for every other client.

The page is a handful of files beside this module, read once and answered from memory. They hold no
data: everything that the page shows comes from the HTTP API, with the key that its user gives it.
So they need no key themselves. A strict Content-Security-Policy keeps the page to its own files and
to this server, and to texts: what the server sends can never become markup or code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

__all__ = ["CONSOLE_PATHS", "create_console_router"]

_PAGE = Path(__file__).parent / "page"
_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # asked for again each time, and seldom sent again
}
_LINKS = {
    "console": "/console",
    "openapi": "/openapi.json",
    "models": "/v1/models",
    "pools": "/v1/pools",
    "residency": "/v1/residency",
    "ready": "/ready",
    "metrics": "/metrics",
}


@dataclass(frozen=True)
class _File:
    body: bytes
    headers: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _File:
        body = path.read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
        return cls(body, {**_HEADERS, "content-type": _TYPES[path.suffix], "etag": tag})

    def answer(self, request: Request) -> Response:
        if self.headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers)


_FILES = {path.name: _File.read(path) for path in sorted(_PAGE.iterdir())}

CONSOLE_PATHS = ("/", "/console", *(f"/console/{name}" for name in _FILES if name != _INDEX))
"""The exact paths of the page, which need no key."""


def create_console_router() -> APIRouter:
    """Return the routes; they are in no OpenAPI document, because they are not for programs."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def root(request: Request) -> Response:
        """Send a browser to the console, and tell any other client what there is."""
        base = request.scope.get("root_path", "")
        varies = {"vary": "accept"}
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"{base}/console", 307, headers=varies)
        links = {name: base + path for name, path in _LINKS.items()}
        return JSONResponse({"server": "emo-serve", "links": links}, headers=varies)

    @router.get("/console")
    async def page(request: Request) -> Response:
        """Return the page."""
        return _FILES[_INDEX].answer(request)

    @router.get("/console/{name}")
    async def file(name: str, request: Request) -> Response:
        """Return one of the page's files."""
        if name == _INDEX or name not in _FILES:
            return JSONResponse({"detail": "Not Found"}, 404)
        return _FILES[name].answer(request)

    return router
