"""Which cores a load's thread may use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from emo_serve.vllm_plugin import thread_place


def test_one_openmp_thread_is_a_matter_of_the_calling_thread() -> None:
    seen: list[int] = []

    def run() -> None:
        thread_place.use_one_openmp_thread()
        seen.append(torch.get_num_threads())  # what torch's own parallel regions would use

    before = torch.get_num_threads()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [1] and torch.get_num_threads() == before


def test_cores_that_model_threads_are_bound_to_are_not_spare() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    bound, release = threading.Event(), threading.Event()

    def model_thread() -> None:
        os.sched_setaffinity(0, {cores[0]})
        bound.set()
        release.wait()

    thread = threading.Thread(target=model_thread)
    thread.start()
    bound.wait()
    try:
        thread_place.spare_cores.cache_clear()
        assert thread_place.spare_cores() == set(cores[1:])
    finally:
        release.set()
        thread.join()
    kernel_entry = Path(f"/proc/self/task/{thread.native_id}")
    while kernel_entry.exists():  # join() returns a moment before the kernel forgets the thread
        time.sleep(0.001)
    thread_place.spare_cores.cache_clear()
    assert thread_place.spare_cores() == set(), "a model that is bound nowhere computes anywhere"


IN_A_REGION = """
import ctypes, os, sys, threading
from emo_serve.vllm_plugin import thread_place

aside = int(sys.argv[1])
thread_place.spare_cores = lambda: frozenset({aside})
region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)


def load():
    assert thread_place.stand_aside()
    for runtime in thread_place._openmp_runtimes():
        runtime.GOMP_parallel(region, None, 1, 0)  # as vLLM's packing begins one
    print(sorted(os.sched_getaffinity(0)))


thread = threading.Thread(target=load)
thread.start()
thread.join()
"""


def test_openmp_does_not_bring_the_thread_back_to_the_models_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    model, aside = cores[:2]
    bound = {"OMP_PLACES": f"{{{model}}}", "OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", IN_A_REGION, str(aside)],
        env={**os.environ, **bound},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == f"[{aside}]"
