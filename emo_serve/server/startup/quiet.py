"""A quiet start: our own progress and warnings an operator can act on; the rest of vLLM on request.

vLLM and its libraries log some 60 lines before a server is ready, none of which an operator can
use. Unless --log-level or one of vLLM's own logging flags or variables asks for them, vLLM's
loggers are configured by `quiet_logging.json` beside this file: in this process its filter lets
warnings through that are not known to be harmless; in the engine's processes everything, because
what those print is read line by line (`engine_output`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import MutableMapping, Sequence
from pathlib import Path

__all__ = ["QuietFilter", "be_quiet", "is_harmless", "is_quiet"]

_CONFIG = Path(__file__).with_name("quiet_logging.json")
_CONFIG_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
_VARIABLES = (_CONFIG_VARIABLE, "VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING")
_FLAGS = ("--log-level", "--log-config-file", "--logging-config")

_HARMLESS = (
    # what follows from serving on a CPU, or from --enforce-eager, and works as intended
    "Triton is installed, but doesn't include CPU backend",
    "Triton is not installed",
    "Model Runner V2 requires Triton",
    "Enforce eager set",
    "TORCH_COMPILE_DISABLE is set",
    "Inductor compilation was disabled",
    "Reset SSM cache type",
    "libtcmalloc is not found",
    "libiomp is not found",
    "Using MEMBIND policy",
    # vLLM tries to raise the limit by itself
    "Found ulimit of",
)
"""Beginnings or parts of vLLM's warnings (0.32.0) about which an operator need do nothing."""


def is_quiet(argv: Sequence[str], environ: MutableMapping[str, str] | None = None) -> bool:
    """Tell whether nothing asks for vLLM's own logging: no flag and no variable of it."""
    known = os.environ if environ is None else environ
    has_flag = any(argument.startswith(_FLAGS) for argument in argv)
    return not has_flag and not any(known.get(variable) for variable in _VARIABLES)


def be_quiet() -> None:
    """Configure this process and the engine's, which inherit it; before vLLM is imported."""
    os.environ[_CONFIG_VARIABLE] = str(_CONFIG)
    handler = logging.StreamHandler()  # until vLLM reads the file, long after its first warnings
    handler.addFilter(QuietFilter())
    logging.getLogger("vllm").addHandler(handler)
    warnings.filterwarnings("ignore", category=FutureWarning)


def is_harmless(message: str) -> bool:
    """Tell whether a warning is one about which an operator need do nothing."""
    return any(text in message for text in _HARMLESS)


class QuietFilter(logging.Filter):
    """Pass warnings that may matter; in a process of the engine pass everything."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to log a record."""
        if multiprocessing.parent_process() is not None:
            return True
        return record.levelno >= logging.WARNING and not is_harmless(record.getMessage())
