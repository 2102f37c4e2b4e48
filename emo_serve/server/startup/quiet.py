"""A quiet start: our own progress, and vLLM's warnings only where an operator can act on them.

vLLM and its libraries log some 60 lines before a server is ready, none of which an operator can
use. Unless --log-level or one of vLLM's own logging flags or variables asks for them, vLLM's
loggers are configured by `quiet_logging.json` beside this file. In this process its filter passes
warnings that are not known to be harmless. In the engine's processes it passes everything, because
their output is read line by line (`engine_output`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["QuietFilter", "be_quiet", "is_harmless", "is_quiet", "log_to_stderr"]

_CONFIG = Path(__file__).with_name("quiet_logging.json")
_CONFIG_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
_VARIABLES = ("VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_")
_OPTIONS = ("log-level", "log-config-file", "logging-config", "enable-log-requests")
"""vLLM's flags, and keys of its --config file, that ask for what it logs."""

_HARMLESS = (
    # consequences of serving on a CPU or of --enforce-eager, as intended
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
    # pools that do not fit have steps of their own
    "Using custom scheduler class",
    # vLLM tries to raise the limit by itself
    "Found ulimit of",
)
"""Parts of vLLM's warnings (0.32.0) that need no action by an operator."""


def is_quiet(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether no flag and no environment variable asks for vLLM's own logging."""
    known = os.environ if environ is None else environ
    if any(name.startswith(_VARIABLES) and value for name, value in known.items()):
        return False
    names = [argument.lstrip("-") for argument in argv if argument.startswith("--")]
    names += [line.strip() for line in _config_lines(argv)]
    return not any(name.replace("_", "-").startswith(_OPTIONS) for name in names)


def _config_lines(argv: Sequence[str]) -> list[str]:
    """Return the lines of vLLM's --config FILE; none if there is no such file to read."""
    for place, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag == "--config":
            path = Path(value or "".join(argv[place + 1 : place + 2]))
            with suppress(OSError, UnicodeDecodeError):
                return path.read_text().splitlines()
    return []


def be_quiet() -> None:
    """Configure logging of this process and the engine's; call it before vLLM is imported.

    The engine's processes inherit the environment variable that this sets.
    """
    os.environ[_CONFIG_VARIABLE] = str(_CONFIG)
    handler = logging.StreamHandler()  # until vLLM reads the file, long after its first warnings
    handler.addFilter(QuietFilter())
    logging.getLogger("vllm").addHandler(handler)
    warnings.filterwarnings("ignore", category=FutureWarning)


def log_to_stderr() -> None:
    """Show our own log lines, once, in the form of vLLM, which configures only its own loggers."""
    ours = logging.getLogger("emo_serve")
    if not ours.handlers:
        form = "%(levelname)s %(asctime)s [%(name)s] %(message)s"
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(form, "%m-%d %H:%M:%S"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


def is_harmless(message: str) -> bool:
    """Tell whether a warning needs no action by an operator."""
    return any(text in message for text in _HARMLESS)


class QuietFilter(logging.Filter):
    """Pass warnings that may matter; in the engine's processes, pass everything."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to log a record."""
        if multiprocessing.parent_process() is not None:
            return True
        return record.levelno >= logging.WARNING and not is_harmless(record.getMessage())
