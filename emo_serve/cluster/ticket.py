"""What a proxy tells a router about a request, as the text of one header.

A router sees no body, so the proxy reads the model's name there. Changes to pools go to one replica
while it lives: it writes their files, and builds one pool at a time. With ?replica=ID an operator
says who shall answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

__all__ = ["NO_TICKET", "Ticket", "model_in", "ticket_for"]

_POOLS = "/v1/pools"
_LONGEST_NAME = 4096
_LARGE_BODY = 256 * 2**10
_MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]{0,200})"')


@dataclass(frozen=True)
class Ticket:
    """The model and the x-emo-pool headers of a request, and whether it changes pools.

    `replica` is the one that must answer, None for any.
    """

    model: str | None = None
    headers: tuple[str, ...] = ()
    is_change: bool = False
    replica: str | None = None

    def encode(self) -> str:
        """Return the ticket as ASCII text; "" for one that asks for nothing in particular."""
        names = (self.model or "", self.replica or "", *self.headers)
        if self == NO_TICKET or sum(map(len, names)) > _LONGEST_NAME:
            return ""
        return json.dumps([self.model, list(self.headers), self.is_change, self.replica])

    @classmethod
    def decode(cls, text: str) -> Ticket:
        """Read what `encode` wrote; any other text asks for nothing in particular."""
        try:
            model, headers, is_change, replica = json.loads(text)
            return cls(model, tuple(headers), is_change, replica)
        except (TypeError, ValueError):
            return NO_TICKET


NO_TICKET = Ticket()


def ticket_for(
    method: str, path: str, query: bytes, headers: tuple[str, ...], body: bytes
) -> Ticket:
    """Return the ticket of a request whose whole body is `body`."""
    options = dict(parse_qsl(query.decode("latin-1"))) if b"replica=" in query else {}
    replica = options.get("replica")
    if path == _POOLS or path.startswith(f"{_POOLS}/"):
        return Ticket(is_change=method in ("POST", "DELETE"), replica=replica)
    if method != "POST":
        return Ticket(replica=replica)
    return Ticket(model_in(body), headers, replica=replica)


def model_in(body: bytes) -> str | None:
    """Return the model that a body names, None if it names none.

    Large bodies are searched, not parsed: a name misread there costs a load at worst.
    """
    if len(body) > _LARGE_BODY:
        found = _MODEL.search(body)
        return found[1].decode(errors="replace") if found else None
    try:
        document = json.loads(body)
    except ValueError:  # whichever replica gets it answers 400
        return None
    model = document.get("model") if isinstance(document, dict) else None
    return model if isinstance(model, str) else None
