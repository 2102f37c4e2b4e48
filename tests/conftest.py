"""What every test shares: no network, no usage report, threads that sleep, Triton interpreted."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

# Before anything imports torch. Threads that spin while they wait take each other's cores, and on a
# busy machine a forward pass of milliseconds takes seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Before anything imports triton, which decides at each kernel's definition. Without a GPU driver
# nothing else could run a kernel.
if not os.path.exists("/proc/driver/nvidia/version"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


class OneForEngines(LoadScopeScheduling):
    """Have pytest-xdist start engines in one process only: two at once take each other's cores.

    But for that of `tests/abuse`, whose requests are mostly refused before they reach it.
    """

    def _split_scope(self, nodeid: str) -> str:
        """Return what stays together: all tests that start engines, and the tests of a file."""
        path = nodeid.split("::")[0]
        return "engines" if path.startswith("tests/engine/") else path


@pytest.hookimpl(optionalhook=True)  # `-p no:xdist` works, too
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneForEngines:
    """Replace xdist's scheduler for `-n`."""
    return OneForEngines(config, log)


@pytest.fixture(autouse=True)
def root_log_level() -> None:
    """Set the level that caplog goes by: what vLLM's app imports raises it for the process."""
    logging.getLogger().setLevel(logging.WARNING)
