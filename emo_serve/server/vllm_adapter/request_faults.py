"""How the engine takes a request, and whose fault it is if it does not.

vLLM checks a request once more when it is given to the engine: when a stream's status has been sent
already, if it is not held back until the engine has taken the request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from emo_serve.errors import EmoServeError, EngineDead, RequestError, Unavailable

__all__ = ["as_ours", "check_grammar", "outputs_of", "refused_value"]


class _Asked:
    """The engine as one request sees it, which says when it has taken the request."""

    def __init__(self, engine: AsyncLLM, on_taken: Callable[[], None]) -> None:
        self._engine, self._on_taken = engine, on_taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def add_request(self, *args: Any, **options: Any) -> Any:
        """Give the request to the engine."""
        collector = await self._engine.add_request(*args, **options)
        self._on_taken()
        return collector


def outputs_of(
    engine: AsyncLLM, on_taken: Callable[[], None], *args: Any, **options: Any
) -> AsyncGenerator[RequestOutput, None]:
    """Return what the engine's `generate` returns; `on_taken` is called before the first output."""
    generate: Callable[..., AsyncGenerator[RequestOutput, None]] = type(engine).generate
    return generate(_Asked(engine, on_taken), *args, **options)


def as_ours(error: Exception) -> EmoServeError:
    """Return the error of ours that answers with the status of one that vLLM has raised."""
    if isinstance(error, VLLMClientError):
        return RequestError(str(error))
    if isinstance(error, GracefulHTTPError) and error.http_status == HTTPStatus.SERVICE_UNAVAILABLE:
        return Unavailable(str(error))
    if isinstance(error, EngineDeadError):
        return EngineDead(str(error))
    return EmoServeError(str(error) or f"the engine did not take the request: {error!r}")


def check_grammar(output: RequestOutput) -> None:
    """Raise RequestError if the first output of a request with a grammar says that it has failed.

    vLLM compiles grammars in the engine. If that fails, or if no token may come first, the output
    says no more than that there was an error.
    """
    if any(each.finish_reason == "error" and len(each.token_ids) <= 1 for each in output.outputs):
        raise RequestError(
            "no output can follow the request's grammar, schema or regular expression: it cannot be"
            " compiled, has no end, or excludes all tokens that the request allows; send another"
        )


def refused_value(error: Exception) -> VLLMValidationError | None:
    """Return the refusal of a request with a value that cannot be sent to the engine, else None.

    Such as a number beyond 64 bits or a text that UTF-8 cannot hold.
    """
    cause = error.__cause__
    is_value = isinstance(cause, OverflowError | UnicodeEncodeError)
    if not isinstance(error, EngineGenerateError) or not is_value:
        return None
    return VLLMValidationError(f"a field has a value that the engine cannot be sent: {cause}")
