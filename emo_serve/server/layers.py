"""Our ASGI layers around all routes, inside vLLM's middleware: which, and in which order.

From outside: `KeyGuard`, `BodyLimit`, `ReadableBody`, `Admission`, `AutoPool`, `Entry`,
`Invocations`, the routes. What a layer refuses passes vLLM's middleware like any answer of a route:
a browser may read it, it has a request id, and it is counted.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from starlette.types import ASGIApp

from emo_serve.metrics import PoolMetrics
from emo_serve.names import ModelNames
from emo_serve.server.asgi.admission import Admission
from emo_serve.server.asgi.bodies import BodyLimit
from emo_serve.server.asgi.entry import Entry
from emo_serve.server.asgi.invocations import Invocations
from emo_serve.server.asgi.readable import ReadableBody
from emo_serve.server.auto.choice import PoolChooser
from emo_serve.server.auto.middleware import AutoPool
from emo_serve.server.vllm_adapter.openai import innermost, replace_innermost

__all__ = ["Around", "put_layers", "unchanged"]

Around = Callable[[ASGIApp], ASGIApp]
"""What puts one more layer around all routes, inside the check of keys and of bodies."""


def unchanged(app: ASGIApp) -> ASGIApp:
    """Put no layer around the routes."""
    return app


def put_layers(
    app: FastAPI,
    guard: Callable[[ASGIApp], ASGIApp],
    names: ModelNames,
    chooser: PoolChooser,
    metrics: PoolMetrics,
    max_body_bytes: int,
    around: Around,
) -> Admission:
    """Put the layers around the routes of vLLM's app; `guard` makes the outermost.

    `around` may put one more around `Admission`: it sees requests that may be made, with all of
    their bodies.
    """
    routes = Invocations(innermost(app), names.base, metrics.count_refusal)
    admission = Admission(AutoPool(Entry(routes, metrics.count_refusal), names, chooser, metrics))
    replace_innermost(app, guard(BodyLimit(ReadableBody(around(admission)), max_body_bytes)))
    return admission
