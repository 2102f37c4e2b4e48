"""How much memory this process may still take, by each authority that sets a limit.

Three authorities do on Linux: the kernel (MemAvailable), the control groups this process is in, and
the memory nodes that vLLM binds its CPU workers to. What is free is the smallest of them.

Page cache counts as free, as in MemAvailable: the kernel drops it when memory is asked for. So a
container whose usage is at its limit because a checkpoint has been read is not a full one.

vLLM binds each worker strictly to one node (`init_cpu_memory_env`: `numa_set_membind`). That limits
a worker only where there is memory outside the nodes bound. On a machine with one node the node's
file is not asked: it may say less than the machine has (memory added while it runs), and a worker
gets that memory all the same.

Files are read below `root`, so that tests can lay out a machine in a directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryLimit", "read_limits"]

_UNLIMITED = 2**60  # version 1 of control groups writes "no limit" as a number near 2**63
_GROUP_FILES = {
    1: (
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
    2: (("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file")),
}
"""By version of control groups: the files of limits, the file of usage, and page cache's names."""
_NODES = "sys/devices/system/node"


@dataclass(frozen=True)
class MemoryLimit:
    """What one authority still lets this process take; `name` says which, for operators."""

    name: str
    free_bytes: int


def read_limits(nodes: Sequence[int], root: Path = Path("/")) -> tuple[MemoryLimit, ...]:
    """Return every limit that can be read, the smallest first; none on a system without /proc.

    `nodes` has the memory node that each worker is bound to; empty if they are not bound.
    """
    limits = [*_kernel_limit(root), *_group_limits(root), *_node_limit(root, nodes)]
    return tuple(sorted(limits, key=lambda limit: limit.free_bytes))


def _kernel_limit(root: Path) -> Iterator[MemoryLimit]:
    free = _table(root / "proc/meminfo").get("MemAvailable:")
    if free is not None:
        yield MemoryLimit("MemAvailable of the kernel", free * 1024)


# -- control groups --


def _group_limits(root: Path) -> Iterator[MemoryLimit]:
    """Yield the limit of each group that has one, from this process's own up to the root."""
    mounts = _mounts(root)
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" else 1
        if version not in mounts or (version == 1 and "memory" not in controllers.split(",")):
            continue
        top, mount_point = mounts[version]
        inside = _path_inside(path, top)
        for group in (inside, *inside.parents):
            free = _group_free(root / mount_point.lstrip("/") / str(group).lstrip("/"), version)
            if free is not None:
                yield MemoryLimit(f"cgroup {group}", free)


def _mounts(root: Path) -> dict[int, tuple[str, str]]:
    """Map a version of control groups to the group that is mounted, and where."""
    mounts: dict[int, tuple[str, str]] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        top, mount_point = before.split()[3:5]
        kind, *_, options = after.split()
        if kind == "cgroup2":
            mounts[2] = (top, mount_point)
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts[1] = (top, mount_point)
    return mounts


def _path_inside(path: str, top: str) -> Path:
    """Return a group's path below the mounted one; "/" if it is not below, as in a container."""
    group = Path(path)
    if ".." in group.parts or not group.is_relative_to(top):
        return Path("/")
    return Path("/") / group.relative_to(top)


def _group_free(directory: Path, version: int) -> int | None:
    """Return what a group still allows, None without a limit."""
    limits, usage, cache = _GROUP_FILES[version]
    known = [limit for name in limits if (limit := _number(directory / name)) is not None]
    used = _number(directory / usage)
    if not known or min(known) >= _UNLIMITED or used is None:
        return None
    statistics = _table(directory / "memory.stat")
    cached = sum(statistics.get(name, 0) for name in cache)
    return max(0, min(known) - max(0, used - cached))


# -- memory nodes --


def _node_limit(root: Path, nodes: Sequence[int]) -> Iterator[MemoryLimit]:
    """Yield what the bound nodes have for all workers, if there is memory outside these nodes.

    Workers take equal shares, so the fullest node decides.
    """
    free = {node: _node_free(root, node) for node in set(nodes)}
    if not _nodes_with_memory(root) - set(nodes):
        return
    workers = Counter(nodes)
    shares = {node: known // workers[node] for node, known in free.items() if known is not None}
    if shares:
        names = ", ".join(map(str, sorted(shares)))
        name = f"memory node {names}" if len(shares) == 1 else f"memory nodes {names}"
        yield MemoryLimit(name, min(shares.values()) * len(nodes))


def _nodes_with_memory(root: Path) -> set[int]:
    text = " ".join(_lines(root / _NODES / "has_memory"))
    return set(_ids(text)) if text else set()


def _ids(text: str) -> Iterator[int]:
    """Yield the numbers of a list such as 0-1,3."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _node_free(root: Path, node: int) -> int | None:
    """Return a node's free memory and page cache, counted as vLLM does; None without its file."""
    lines = _lines(root / _NODES / f"node{node}" / "meminfo")
    table = {name: int(value) for _, _, name, value, *_ in map(str.split, lines)}
    parts = ("MemFree:", "Active(file):", "Inactive(file):", "SReclaimable:")
    return sum(table.get(part, 0) for part in parts) * 1024 if table else None


# -- files --


def _lines(path: Path) -> list[str]:
    """Return a file's lines, none if it cannot be read: not every kernel has every file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file, None for "max" and for a file that is not there."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _table(path: Path) -> Mapping[str, int]:
    """Return the first number after each name at the start of a line."""
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
