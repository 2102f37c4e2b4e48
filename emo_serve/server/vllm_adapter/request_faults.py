"""Failures of the engine that are the request's fault, though vLLM calls them internal errors."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.exceptions import EngineGenerateError

from emo_serve.errors import RequestError

__all__ = ["check_grammar", "refused_value"]


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


def refused_value(error: EngineGenerateError) -> VLLMValidationError | None:
    """Return the refusal of a request with a value that cannot be sent to the engine, else None.

    Such as a number beyond 64 bits or a text that UTF-8 cannot hold.
    """
    cause = error.__cause__
    if not isinstance(cause, OverflowError | UnicodeEncodeError):
        return None
    return VLLMValidationError(f"a field has a value that the engine cannot be sent: {cause}")
