"""Where a server listens, and how a client on this machine asks it."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass
from ipaddress import ip_address

__all__ = ["ServerAddress"]


@dataclass(frozen=True)
class ServerAddress:
    """Where the server listens; with `uds`, a Unix socket, host and port have no meaning.

    `key_variable` is the environment variable that a client's shell should keep the API key in,
    None if the server needs no key.
    """

    host: str | None
    port: int
    uds: str | None = None
    is_tls: bool = False
    key_variable: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace, key_variable: str | None) -> ServerAddress:
        """Return where a server with these flags listens."""
        return cls(
            host=args.host,
            port=args.port,
            uds=args.uds,
            is_tls=bool(args.ssl_keyfile and args.ssl_certfile),
            key_variable=key_variable,
        )

    @property
    def is_local(self) -> bool:
        """Tell whether only this machine can connect; a host name other than localhost says no."""
        if self.uds or self.host == "localhost":
            return True
        try:
            return ip_address(self.host or "").is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """Return a base URL that works on this machine."""
        scheme = "https" if self.is_tls else "http"
        if self.uds:
            return f"{scheme}://localhost"
        host = self.host or "127.0.0.1"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def curl(self, model: str) -> str:
        """Return one shell line that asks this server for a completion."""
        options = "-s"
        options += f" --unix-socket {shlex.quote(self.uds)}" if self.uds else ""
        options += " -k" if self.is_tls else ""
        if self.key_variable:
            options += f' -H "Authorization: Bearer ${self.key_variable}"'
        body = json.dumps({"model": model, "prompt": "Once upon a time", "max_tokens": 32})
        url = f"{self.url}/v1/completions"
        return (
            f"curl {options} -H 'Content-Type: application/json'"
            f" {shlex.quote(url)} -d {shlex.quote(body)}"
        )
