"""What every test shares: no network, no usage report, threads that sleep, Triton interpreted."""

from __future__ import annotations

import logging
import os

import pytest

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process of pytest-xdist, and all tests of a shared server."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        server = callspec.params.get("server") if callspec else None
        item.add_marker(pytest.mark.xdist_group(server or item.path.as_posix()))


@pytest.fixture(autouse=True)
def root_log_level() -> None:
    """Set the level that caplog goes by: what vLLM's app imports raises it for the process."""
    logging.getLogger().setLevel(logging.WARNING)
