"""Where a load's thread runs: on a core of its own if there is one, and on no more than one.

vLLM binds a CPU worker's threads to cores and leaves some to its other processes. A load's thread
belongs there. It opens no OpenMP team, whose threads would run on the model's cores.
"""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from pathlib import Path

import torch

__all__ = ["spare_cores", "stand_aside", "use_one_openmp_thread"]


def stand_aside() -> bool:
    """Keep the calling thread to one core at a time, off the model's; return whether one is free.

    At its usual priority: one that waits for a core while it holds the interpreter's lock would
    have the model wait as well.
    """
    use_one_openmp_thread()  # which may bind the thread to a core of the model's: before ours
    spare = spare_cores()
    if spare:
        os.sched_setaffinity(0, spare)
    return bool(spare)


def use_one_openmp_thread() -> None:
    """Have parallel regions begun by this thread run on it alone.

    The number of threads is a setting of the calling thread in OpenMP, not of the process. torch
    has a call for it, which vLLM's CPU worker replaces by one that does nothing, so we ask the
    runtime that is loaded. A runtime that binds threads (OMP_PROC_BIND, which vLLM sets) binds this
    one to the model's first core when it first begins a region, however few threads that has. It
    does so when asked for the thread's place too, and never again: so that is asked here.
    """
    torch.get_num_threads()  # torch sets a new thread's number at its first question
    for runtime in _openmp_runtimes():
        runtime.omp_set_num_threads(1)
        runtime.omp_get_place_num()


@cache  # reading and searching the maps of a process this size takes as long as a small load
def _openmp_runtimes() -> tuple[ctypes.CDLL, ...]:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return ()
    names = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b[^\s/]*\.so\S*", maps.read_text())
    return tuple(ctypes.CDLL(name) for name in sorted(set(names)))


@cache  # vLLM binds its threads before the first load
def spare_cores() -> frozenset[int]:
    """Return the cores this process may use and no model thread of the engine is bound to.

    vLLM binds a CPU worker's threads to cores; its parent process keeps all that it was given. None
    is known to be spare if no thread is bound: then the model computes anywhere.
    """
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    parent = os.getppid()
    allowed = os.sched_getaffinity(parent)
    bound: set[int] = set()
    for worker in _children(parent):
        for task in Path(f"/proc/{worker}/task").iterdir():
            try:
                cores = os.sched_getaffinity(int(task.name))
            except ProcessLookupError:
                continue
            if cores < allowed:
                bound |= cores
    return frozenset(allowed - bound) if bound else frozenset()


def _children(parent: int) -> list[int]:
    """Return the children of a process, this one at least."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    found = {int(pid) for path in lists for pid in path.read_text().split()}
    return sorted(found | {os.getpid()})
