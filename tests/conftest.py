"""What every test shares: no network, no usage report, threads that sleep, Triton interpreted."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

_ENGINES = [Path(__file__).parent / name for name in ("abuse", "engine")]

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


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have pytest-xdist start engines in one process only: two at once take each other's cores."""
    for item in items:
        has_engine = any(place in item.path.parents for place in _ENGINES)
        item.add_marker(pytest.mark.xdist_group("engines" if has_engine else str(item.path)))


@pytest.fixture(autouse=True)
def root_log_level() -> None:
    """Set the level that caplog goes by: what vLLM's app imports raises it for the process."""
    logging.getLogger().setLevel(logging.WARNING)
