"""What limits memory, read from machines that are laid out in a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from emo_serve.config import GIB
from emo_serve.server.startup.machine_memory import MemoryLimit, read_limits

KERNEL = "MemAvailable of the kernel"
V2_MOUNT = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


class Machine:
    """A machine's files below a directory; sizes are in GiB."""

    def __init__(self, root: Path, available: int = 20) -> None:
        self.root = root
        text = f"MemTotal: {24 * 2**20} kB\nMemAvailable: {available * 2**20} kB\nHugePages: 0\n"
        self.write("proc/meminfo", text)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def nodes(self, *free: int, kept: str | None = None) -> None:
        """Give each node so much free memory; a fourth of it is in use as page cache."""
        for node, size in enumerate(free):
            kib = size * 2**20
            rows = {
                "MemTotal": 2 * kib,
                "MemFree": kib // 2,
                "Active(file)": kib // 4,
                "Inactive(file)": kib // 8,
                "Inactive(anon)": kib,
                "SReclaimable": kib // 8,
            }
            lines = [f"Node {node} {name}: {value} kB\n" for name, value in rows.items()]
            self.write(f"sys/devices/system/node/node{node}/meminfo", "".join(lines))
        self.write(
            "sys/devices/system/node/has_memory", f"0-{len(free) - 1}\n" if kept is None else kept
        )

    def group_v2(
        self, path: str, limit: object, used: int = 0, cached: int = 0, high: object = "max"
    ) -> None:
        directory = f"sys/fs/cgroup{path}"
        self.write(f"{directory}/memory.max", f"{limit}\n")
        self.write(f"{directory}/memory.high", f"{high}\n")
        self.write(f"{directory}/memory.current", f"{used * GIB}\n")
        stat = f"anon 5\nactive_file {cached * GIB // 2}\ninactive_file {cached * GIB // 2}\n"
        self.write(f"{directory}/memory.stat", stat)

    def group_v1(self, path: str, limit: int, used: int = 0, cached: int = 0) -> None:
        directory = f"sys/fs/cgroup/memory{path}"
        self.write(f"{directory}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{directory}/memory.usage_in_bytes", f"{used * GIB}\n")
        stat = f"active_file 1\ntotal_active_file {cached * GIB}\ntotal_inactive_file 0\n"
        self.write(f"{directory}/memory.stat", stat)

    def limits(self, *nodes: int) -> tuple[MemoryLimit, ...]:
        return read_limits(nodes, self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_alone_has_what_the_kernel_says(machine: Machine) -> None:
    assert machine.limits() == (MemoryLimit(KERNEL, 20 * GIB),)
    machine.nodes(23)
    assert machine.limits(0) == (MemoryLimit(KERNEL, 20 * GIB),)


def test_a_system_without_these_files_has_no_limit(tmp_path: Path) -> None:
    assert read_limits([0], tmp_path) == ()


def test_this_machine_can_be_read() -> None:
    (tightest, *_) = read_limits([0])
    assert 0 < tightest.free_bytes < 2**50


# -- memory nodes --


def test_the_only_nodes_file_may_say_less_than_the_machine_has(machine: Machine) -> None:
    machine.nodes(4)
    assert machine.limits(0) == (MemoryLimit(KERNEL, 20 * GIB),)


@pytest.mark.parametrize(
    ("nodes", "name", "free"),
    [
        ((0,), "memory node 0", 6),
        ((1,), "memory node 1", 12),
        ((0, 0), "memory node 0", 6),  # two workers on one node
    ],
)
def test_a_worker_is_bound_to_one_of_two_nodes(
    machine: Machine, nodes: tuple[int, ...], name: str, free: int
) -> None:
    machine.nodes(6, 12)
    assert machine.limits(*nodes)[0] == MemoryLimit(name, free * GIB)


def test_workers_on_all_nodes_are_not_held_to_one(machine: Machine) -> None:
    machine.nodes(6, 12)
    assert machine.limits(0, 1) == (MemoryLimit(KERNEL, 20 * GIB),)


def test_workers_on_some_nodes_take_equal_shares(machine: Machine) -> None:
    machine.nodes(6, 5, 12)
    assert machine.limits(0, 1)[0] == MemoryLimit("memory nodes 0, 1", 10 * GIB)


def test_workers_that_are_not_bound_may_use_every_node(machine: Machine) -> None:
    machine.nodes(6, 12)
    assert machine.limits() == (MemoryLimit(KERNEL, 20 * GIB),)


def test_memory_without_cpus_is_outside_too(machine: Machine) -> None:
    machine.nodes(6, kept="0,2-3\n")
    assert machine.limits(0)[0] == MemoryLimit("memory node 0", 6 * GIB)


# -- control groups --


def test_a_container_of_version_2_sees_its_own_group_as_the_root(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(top="/"))
    machine.group_v2("", 16 * GIB, used=5, cached=2)
    assert machine.limits()[0] == MemoryLimit("cgroup /", 13 * GIB)


def test_every_parent_of_version_2_has_its_say(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/kube/pod/main\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(top="/"))
    machine.group_v2("/kube/pod/main", "max", used=1)
    machine.group_v2("/kube/pod", 12 * GIB, used=5, cached=1)
    machine.group_v2("/kube", 100 * GIB, used=30)
    assert machine.limits() == (
        MemoryLimit("cgroup /kube/pod", 8 * GIB),
        MemoryLimit(KERNEL, 20 * GIB),
        MemoryLimit("cgroup /kube", 70 * GIB),
    )


def test_a_group_that_would_be_slowed_down_is_full(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(top="/"))
    machine.group_v2("/service", 16 * GIB, used=1, high=8 * GIB)
    assert machine.limits()[0] == MemoryLimit("cgroup /service", 7 * GIB)


def test_a_group_full_of_page_cache_is_not_full(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(top="/"))
    machine.group_v2("/service", 16 * GIB, used=16, cached=15)
    assert machine.limits()[0] == MemoryLimit("cgroup /service", 15 * GIB)


def test_a_group_over_its_limit_has_nothing_left(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/service\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(top="/"))
    machine.group_v2("/service", 1 * GIB, used=2)
    assert machine.limits()[0] == MemoryLimit("cgroup /service", 0)


def test_version_1_writes_no_limit_as_a_large_number(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "9:name=systemd:/\n4:memory:/jobs/a:b\n1:cpu:/x\n0::/\n")
    machine.write("proc/self/mountinfo", V1_MOUNTS.format(top="/"))
    machine.group_v1("/jobs/a:b", 9223372036854771712, used=3)
    assert machine.limits() == (MemoryLimit(KERNEL, 20 * GIB),)
    machine.group_v1("/jobs", 10 * GIB, used=5, cached=3)
    assert machine.limits()[0] == MemoryLimit("cgroup /jobs", 8 * GIB)


@pytest.mark.parametrize("path", ["/docker/c0ffee", "/elsewhere", "/../.."])
def test_a_container_of_version_1_finds_its_group_at_the_mount(machine: Machine, path: str) -> None:
    machine.write("proc/self/cgroup", f"4:cpu,memory:{path}\n0::/\n")
    machine.write("proc/self/mountinfo", V1_MOUNTS.format(top="/docker/c0ffee"))
    machine.group_v1("", 4 * GIB, used=2, cached=1)
    assert machine.limits()[0] == MemoryLimit("cgroup /", 3 * GIB)
