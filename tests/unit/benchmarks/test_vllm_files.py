"""vLLM's Python files without its libraries: what is packed, and that each reason still stands."""

from __future__ import annotations

import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu.vllm_files import pack

VLLM = find_spec("vllm")
pytestmark = pytest.mark.skipif(VLLM is None, reason="vLLM is not installed")

REASONS = (
    ("platforms/cuda.py", "\nimport vllm._C_stable_libtorch"),
    ("vllm_flash_attn/__init__.py", "raise ImportError("),
    ("v1/attention/backends/fa_utils.py", "    from vllm.vllm_flash_attn import ("),
    (
        "model_executor/layers/quantization/utils/w8a8_utils.py",
        "\nCUTLASS_BLOCK_FP8_SUPPORTED = cutlass_block_fp8_supported()",
    ),
    (
        "model_executor/layers/quantization/online/fp8.py",
        "kFp8DynamicTokenSym if cutlass_fp8_supported() else",
    ),
    (
        "v1/sample/ops/topk_topp_sampler.py",
        "from vllm.v1.attention.backends.flashinfer import FlashInferBackend",
    ),
    (
        "model_executor/warmup/kernel_warmup.py",
        "    from vllm.model_executor.warmup.minimax_m3_msa_warmup import (",
    ),
    ("v1/worker/gpu/buffer_utils.py", "UvaBuffer if is_uva_available() else NonUvaBuffer"),
    ("utils/torch_utils.py", "torch.ops._C.get_cuda_view_from_cpu_tensor("),
    ("utils/torch_utils.py", "torch.ops._C.weak_ref_tensor("),
    ("kernels/vllm_c.py", "torch.ops._C.fused_add_rms_norm("),
    ("platforms/cuda.py", 'else ["vllm_c", "native"]'),
    ("model_executor/layers/rotary_embedding/base.py", "ops.rotary_embedding("),
    ("model_executor/layers/activation.py", "self.op = torch.ops._C.silu_and_mul\n"),
    ("v1/attention/backends/triton_attn.py", "triton_reshape_and_cache_flash("),
)
"""What docs/development.md says of vLLM's files."""


@pytest.mark.parametrize(("file", "text"), REASONS)
def test_vllm_still_asks_for_what_is_replaced(file: str, text: str) -> None:
    assert VLLM is not None and VLLM.origin is not None
    assert text in (Path(VLLM.origin).parent / file).read_text()


def test_the_archive_holds_no_library_and_calls_itself_vllm(tmp_path: Path) -> None:
    pack(tmp_path / "vllm.zip")
    assert (tmp_path / "vllm.zip").stat().st_size < 20 << 20
    with zipfile.ZipFile(tmp_path / "vllm.zip") as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        assert "\nName: vllm\n" in archive.read(metadata).decode()
    assert not any(name.endswith((".so", ".pyc")) for name in names)
    assert "vllm/platforms/cuda.py" in names
