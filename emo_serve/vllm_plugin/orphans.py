"""The engine's processes end when the process that started them does, however that ends.

Without this, a front end that is killed leaves its engine and workers with all their memory. The
kernel does the work: PR_SET_PDEATHSIG sends SIGKILL to a process whose parent has ended. There is
nothing left to save then. The engine is the front end's child and each worker is the engine's.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

from emo_serve.vllm_plugin.contract import END_WITH_PARENT_VARIABLE

__all__ = ["end_with_parent", "in_run_directory"]

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Tie this process's life to its parent's, if a front end of ours started the engine.

    Does nothing in a process that multiprocessing did not start, and outside Linux.
    """
    parent = multiprocessing.parent_process()
    if parent is None or END_WITH_PARENT_VARIABLE not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def in_run_directory(init_method: str) -> str:
    """Return where ranks meet: a file:// in the run directory of our front end, if there is one.

    vLLM's own path is in the temporary directory, where a killed worker would leave the file. The
    file's name stays, because vLLM also names shared memory after it.
    """
    directory = os.environ.get("VLLM_RPC_BASE_PATH")
    is_file = init_method.startswith("file://")
    if END_WITH_PARENT_VARIABLE not in os.environ or directory is None or not is_file:
        return init_method
    return f"file://{directory}/{os.path.basename(init_method)}"
