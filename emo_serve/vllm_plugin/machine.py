"""What this machine computes experts with, found without starting vLLM: for `emo-serve doctor`.

torch is imported when it is looked at.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

__all__ = ["Accelerator", "look"]

_LEAST_CAPABILITY = (8, 0)  # TritonBackend.capability, which only vLLM's processes import


@dataclass(frozen=True)
class Accelerator:
    """The device that will be used, and what `--moe-backend auto` will compute experts with.

    `remedy` says what would make it faster, None if nothing that is missing would.
    """

    torch: str
    device: str
    kernels: str
    remedy: str | None = None


def look() -> Accelerator:
    """Look at this machine; raises ImportError without torch."""
    import torch

    version = torch.__version__
    if torch.cuda.is_available():
        return _cuda(version)
    return _cpu(version)


def _cuda(version: str) -> Accelerator:
    import torch

    count = torch.cuda.device_count()
    found = torch.cuda.get_device_capability(0)
    name = f"{count} x {torch.cuda.get_device_name(0)}, compute capability {found[0]}.{found[1]}"
    if found < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        return Accelerator(
            version,
            name,
            f"reference (plain torch, slow): triton needs compute capability {least}",
        )
    return Accelerator(version, name, "triton (emo_kernels)")


def _cpu(version: str) -> Accelerator:
    import torch

    has_avx512 = platform.machine() == "x86_64" and torch.cpu._is_avx512_supported()
    device = f"CPU, {platform.machine()}" + (", AVX-512" if has_avx512 else ", no AVX-512")
    has_amx = has_avx512 and torch.cpu._is_amx_tile_supported()
    device += ", AMX" if has_amx else ""
    if not has_avx512:
        return Accelerator(version, device, "vLLM's operation: ours needs AVX-512")
    if _compiler() is None:
        return Accelerator(
            version,
            device,
            "vLLM's operation: ours needs a C++ compiler",
            "apt-get install g++ (or set CXX)",
        )
    return Accelerator(version, device, "our kernel for CPUs, compiled on first use")


def _compiler() -> str | None:
    """Return the compiler that torch.compile would use; None without one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError):
        return None
