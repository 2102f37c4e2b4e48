"""Refusals in vLLM's log: one line each, where vLLM would log a traceback.

vLLM's routes and stream generators log every exception that reaches them with its traceback, those
by which we refuse or cut a request, too, and what follows from them: the stream of /v1/messages
cannot read the error event of the chat stream below it. Other exceptions are logged as ever.
"""

from __future__ import annotations

import logging

from emo_serve.server.asgi.context import current_request
from emo_serve.server.asgi.errors import cause_of

__all__ = ["log_refusals_in_one_line"]

_SERVING = "vllm.entrypoints."
_NEVER_RETRIEVED = "asyncio"  # which logs the error of a background response


def log_refusals_in_one_line() -> None:
    """Shorten the records of vLLM's serving modules imported so far; may be called twice."""
    for name in [*logging.root.manager.loggerDict, _NEVER_RETRIEVED]:
        if name.startswith((_SERVING, _NEVER_RETRIEVED)):
            logging.getLogger(name).addFilter(_shortened)


def _shortened(record: logging.LogRecord) -> bool:
    """Turn a traceback of one of our errors into a warning of one line, once per request."""
    if not record.exc_info:
        return True
    request = current_request()
    error = cause_of(record.exc_info[1]) or request.refused_by
    if error is None:
        return True
    if request.is_refusal_logged:
        return False
    request.is_refusal_logged = True
    said = " ".join(record.getMessage().partition("\n")[0].split())
    record.msg, record.args = (said if str(error) in said else f"{said} {error}"), ()
    record.exc_info = record.exc_text = None
    record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
    return True
