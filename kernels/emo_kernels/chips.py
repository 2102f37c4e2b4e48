"""Chips that need not be here: compile what a launch on one would run, and run nothing.

Triton compiles when a kernel is launched. So `pretend` tells Triton that it sits on a chip and
lets a launch end after compiling; public launchers are then called with tensors that have no data.
What is compiled is what a launch would run, with the same specialisation (addresses and sizes
multiples of 16), and its log is that of Triton's own call of ptxas, with Triton's own options.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from emo_kernels.tuning import table_path

__all__ = ["CHIPS", "Chip", "Compiled", "DoesNotCompile", "pretend"]


@dataclass(frozen=True)
class Chip:
    """A compute capability, major * 10 + minor, and what is expected of kernels for it.

    `shared_limit`: the bytes of shared memory that a program may have; `instruction`: how PTX
    speaks to the tensor cores.
    """

    capability: int
    shared_limit: int
    instruction: str

    @property
    def table(self) -> Path:
        """Return the path of the table whose tiles it runs."""
        return table_path(divmod(self.capability, 10))

    @property
    def ptxas_version(self) -> str:
        """Return the version of the ptxas that Triton uses for it."""
        found = re.search(r"V([\d.]+)", get_ptxas_version(self.capability))
        return found[1] if found else "unknown"


CHIPS = {
    # Judged by the least that its table serves: sm_86, sm_89 and sm_120 have 99 KiB, sm_80 163.
    "sm80": Chip(80, 99 * 1024, "mma.sync"),
    "sm86": Chip(86, 99 * 1024, "mma.sync"),
    "sm89": Chip(89, 99 * 1024, "mma.sync"),
    "sm90": Chip(90, 227 * 1024, "wgmma"),
    "sm100": Chip(100, 227 * 1024, "tcgen05.mma"),
    "sm103": Chip(103, 227 * 1024, "tcgen05.mma"),
    "sm120": Chip(120, 99 * 1024, "mma.sync"),
}


class DoesNotCompile(Exception):
    """Triton or ptxas refused a kernel; one line says why."""


@dataclass(frozen=True)
class Compiled:
    """One kernel: its name, texts and metadata as Triton has them, and what ptxas said."""

    name: str
    ptx: str
    ttgir: str
    metadata: Any
    log: str


@contextmanager
def pretend(chip: Chip, cache: Path) -> Iterator[list[Compiled]]:
    """Compile in place of launching; yields the list that each new kernel is appended to.

    A launch raises DoesNotCompile where that fails. `cache` must be an empty directory, for a
    kernel found in a cache has no log. Triton and the launchers remember the chip after the end:
    enter it once in a process, and use that process for nothing else.
    """
    driver.set_active(_Driver(chip.capability))
    knobs.cache.dir = str(cache)
    knobs.nvidia.dump_ptxas_log = True
    kernels: list[Compiled] = []
    seen: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        said: list[str] = []
        try:
            with _captured(said):
                kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever Triton's passes raise
            raise DoesNotCompile(_cause(error, said[0])) from error
        if all(kernel is not other for other in seen):
            seen.append(kernel)
            kernels.append(
                Compiled(
                    kernel.metadata.name.strip("_").removesuffix("_kernel"),
                    kernel.asm["ptx"],
                    kernel.asm["ttgir"],
                    kernel.metadata,
                    said[0],
                )
            )

    capability = divmod(chip.capability, 10)
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
    ):
        yield kernels


class _Driver:
    """As much of a CUDA driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _cause(error: Exception, said: str) -> str:
    """Return one line: the exception, and the errors written before it."""
    found = re.findall(r"(?:error|fatal *) *: (.*)|Pipeline failed while executing \[(.*)\]", said)
    lines = [f"{type(error).__name__}: {error}".partition("\n")[0], *map("".join, found)]
    return "; ".join(lines)[:300]


@contextmanager
def _captured(texts: list[str]) -> Iterator[None]:
    """Append to `texts` what is written to stdout and stderr, by Python or below it."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        saved = [(stream, os.dup(stream)) for stream in (1, 2)]
        for stream, _ in saved:
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            for stream, copy in saved:
                os.dup2(copy, stream)
                os.close(copy)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
