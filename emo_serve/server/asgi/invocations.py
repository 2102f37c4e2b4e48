"""The model of a request to /invocations, vLLM's route for SageMaker.

That route serves the bodies of /v1/chat/completions and /v1/completions, but takes the model from
SageMaker's header alone and drops the one in the body: the base pool would answer in silence. Here
the body's model is written into that header.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from emo_serve.errors import PoolConflict, RequestError
from emo_serve.server.asgi.bodies import replay
from emo_serve.server.asgi.errors import reason_of, refusal, route_path

__all__ = ["INVOCATIONS", "Invocations"]

INVOCATIONS = "/invocations"

_HEADER = "x-amzn-sagemaker-adapter-identifier"


class Invocations:
    """Wrap an ASGI app inside `BodyLimit`; its /invocations gets the model from the body, too.

    `base_names` are the model's own names, beside which the header may name any pool. `count` gets
    the reason of each refusal.
    """

    def __init__(
        self, app: ASGIApp, base_names: Collection[str], count: Callable[[str], None]
    ) -> None:
        self.app = app
        self._base_names, self._count = base_names, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if is_post and route_path(scope) == INVOCATIONS:
            body: bytes = (await receive())["body"]
            receive = replay(body, receive)
            try:
                scope = self._with_model(scope, body)
            except RequestError as error:
                self._count(reason_of(error))
                await refusal(scope, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _with_model(self, scope: Scope, body: bytes) -> Scope:
        """Return a scope whose header has the body's model; raises RequestError."""
        model = _model_in(body)
        if model is None or model == "":
            return scope
        if not isinstance(model, str):
            raise RequestError(f"model is {model!r}; send the name of a pool or of the model")
        given = Headers(scope=scope).get(_HEADER)
        if given is None:
            changed = dict(scope)
            MutableHeaders(scope=changed).raw.append(
                (_HEADER.encode(), model.encode("latin-1", "backslashreplace"))
            )
            return changed
        if model != given and model not in self._base_names:
            raise PoolConflict(
                f"model {model!r} and {_HEADER} {given!r} name different models; send one of them"
            )
        return scope


def _model_in(body: bytes) -> Any:
    """Return the body's model; None if it has none, or is none that vLLM can read."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document.get("model") if isinstance(document, dict) else None
