"""What our kernels are compared with: vLLM's fused MoE in Triton, and torch's grouped product.

Each takes just the selection that our routing made, over the same slabs, and its own routing and
sorting do not count. So `vllm` is compared with our layer after routing, and baselines of
`products` with our gate_up and down, which also gather, activate and weight:

    vllm           fused_experts(x, w13, w2, weights, slots), with the tile sizes vLLM ships
    vllm-products  where vLLM's compiled operations are missing: its Triton kernel's two launches
                   alone, on an alignment made here; activation and sum not counted
    grouped_mm     torch._grouped_mm over rows already gathered and sorted, twice; 16bit weights

A baseline whose import, first run or first result fails is left out, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernels.cases import Batch
from emo_kernels import reference
from emo_kernels.tables import Routed, Schedule

__all__ = ["Baseline", "Selection", "baselines", "select"]

Call = Callable[[], Tensor]
_TOLERANCE = 2e-2
"""Relative error in norm: two bf16 pipelines that round h at other places agree within it."""


@dataclass(frozen=True)
class Selection:
    """What routing chose for a batch; the schedule is the twin's, with tiles of 16 rows."""

    routed: Routed
    schedule: Schedule

    @property
    def rows(self) -> Tensor:
        """Return the taken rows in the order of their slots. Syncs: a Python size."""
        return self.schedule.rows_R[: int(self.schedule.offsets_S1[-1])].long()


@dataclass(frozen=True)
class Baseline:
    """Another way to compute the same; `against` is `experts` (all after routing) or `products`.

    `make` returns what is timed; `result` takes the layer's output from it, to be checked.
    """

    name: str
    against: str
    make: Callable[[Batch, Selection], Call]
    result: Callable[[Batch, Selection], Tensor]


def select(batch: Batch) -> Selection:
    """Route a batch with the twin."""
    routed = reference.route(batch.logits_TE, batch.pool_rows_T, batch.tables, batch.router)
    return Selection(routed, reference.dispatch(routed.slots_TK, batch.w13.shape[0], 16))


def baselines(batch: Batch) -> tuple[list[Baseline], dict[str, str]]:
    """Return the baselines that give the right result here, and a note on every baseline."""
    selection = select(batch)
    expected = _expected(batch, selection)
    kept: list[Baseline] = []
    notes: dict[str, str] = {}
    for baseline in (_VLLM, _VLLM_PRODUCTS, _GROUPED_MM):
        if baseline is _VLLM_PRODUCTS and _VLLM in kept:
            continue
        if baseline is not _GROUPED_MM and batch.x_TD.device.type != "cuda":
            notes[baseline.name] = "left out, made for CUDA"
            continue
        try:
            error = _relative_error(baseline.result(batch, selection), expected)
        except Exception as problem:  # another project's code, on a machine it may not know
            reason = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
            notes[baseline.name] = f"left out, {reason}"
        else:
            if error < _TOLERANCE:
                kept.append(baseline)
                tiles = "" if baseline is _GROUPED_MM else f", {_vllm_tiles(batch)[1]}"
                notes[baseline.name] = f"relative error {error:.2g}{tiles}"
            else:
                notes[baseline.name] = f"left out, wrong here: relative error {error:.3g}"
    return kept, notes


def _expected(batch: Batch, selection: Selection) -> Tensor:
    schedule, routed = selection.schedule, selection.routed
    h_RF = reference.gate_up(batch.x_TD, batch.w13, schedule, batch.router.top_k)
    rows_RD = reference.down(h_RF, batch.w2, routed.weights_TK, schedule)
    return reference.combine(rows_RD, routed.slots_TK)


def _relative_error(got: Tensor, expected: Tensor) -> float:
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    return float(error) if bool(error.isfinite()) else float("inf")


def _silu_mul(both_RF: Tensor) -> Tensor:
    gate_RF, up_RF = both_RF.chunk(2, -1)
    return functional.silu(gate_RF) * up_RF


# -- torch._grouped_mm --


def _grouped_mm(batch: Batch, selection: Selection) -> Call:
    x_RD, ends_S = _sorted_inputs(batch, selection)
    h_RF = torch.randn(len(x_RD), batch.w2.shape[2], device=x_RD.device).to(x_RD.dtype)
    w13_SDF, w2_SFD = batch.w13.transpose(1, 2), batch.w2.transpose(1, 2)

    def call() -> Tensor:
        torch._grouped_mm(x_RD, w13_SDF, offs=ends_S)
        return torch._grouped_mm(h_RF, w2_SFD, offs=ends_S)

    return call


def _sorted_inputs(batch: Batch, selection: Selection) -> tuple[Tensor, Tensor]:
    """Return each taken row's token, in the order of slots, and where each slot's rows end."""
    x_RD = batch.x_TD[selection.rows // batch.router.top_k]
    return x_RD, selection.schedule.offsets_S1[1:].contiguous()


def _grouped_mm_result(batch: Batch, selection: Selection) -> Tensor:
    x_RD, ends_S = _sorted_inputs(batch, selection)
    both_RF = torch._grouped_mm(x_RD, batch.w13.transpose(1, 2), offs=ends_S)
    out_RD = torch._grouped_mm(_silu_mul(both_RF), batch.w2.transpose(1, 2), offs=ends_S)
    weights_TK, slots_TK = selection.routed.weights_TK, selection.routed.slots_TK
    rows_RD = torch.zeros(slots_TK.numel(), out_RD.shape[1], device=out_RD.device)
    rows_RD[selection.rows] = out_RD.float() * weights_TK.reshape(-1)[selection.rows, None]
    return reference.combine(rows_RD, slots_TK)


# -- vLLM --


def _vllm(batch: Batch, selection: Selection) -> Call:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    routed = selection.routed
    arguments = (batch.x_TD, batch.w13, batch.w2, routed.weights_TK, routed.slots_TK)
    return lambda: fused_experts(*arguments)


def _vllm_products(batch: Batch, selection: Selection) -> Call:
    first, second, _ = _vllm_launches(batch, selection)

    def call() -> Tensor:
        first()
        return second()

    return call


def _vllm_products_result(batch: Batch, selection: Selection) -> Tensor:
    first, second, h_RF = _vllm_launches(batch, selection)
    h_RF.copy_(_silu_mul(first().flatten(0, 1)))
    return second().float().sum(1).to(batch.x_TD.dtype)


def _vllm_launches(batch: Batch, selection: Selection) -> tuple[Call, Call, Tensor]:
    """Return the two launches of vLLM's kernel, and the h that the second one reads."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    routed, (tokens, model_dim) = selection.routed, batch.x_TD.shape
    experts, width, _ = batch.w13.shape
    top_k, dtype = batch.router.top_k, batch.x_TD.dtype
    config, _ = _vllm_tiles(batch)
    alignment = _alignment(routed.slots_TK, config["BLOCK_SIZE_M"], experts)
    both_TKF = torch.empty(tokens, top_k, width, device=batch.x_TD.device, dtype=dtype)
    rows_TKD = torch.empty(tokens, top_k, model_dim, device=batch.x_TD.device, dtype=dtype)
    h_RF = torch.randn(tokens * top_k, width // 2, device=batch.x_TD.device).to(dtype)
    element = getattr(fused_moe.tl, {torch.bfloat16: "bfloat16"}.get(dtype, "float16"))

    def launch(a: Tensor, b: Tensor, out: Tensor, weigh: bool, a_top_k: int) -> Tensor:
        fused_moe.invoke_fused_moe_triton_kernel(
            a, b, out, None, None, routed.weights_TK, *alignment, weigh, a_top_k, config,
            element, False, False, False, False, False,
        )  # fmt: skip
        return out

    return (
        lambda: launch(batch.x_TD, batch.w13, both_TKF, False, top_k),
        lambda: launch(h_RF, batch.w2, rows_TKD, True, 1),
        h_RF,
    )


def _vllm_tiles(batch: Batch) -> tuple[Mapping[str, int], str]:
    """Return the tile sizes vLLM takes for this device and shape, and where they come from.

    The lookup is vLLM's own except for the device's name: without compiled operations vLLM may not
    know what it runs on.
    """
    from vllm.model_executor.layers.fused_moe import fused_moe

    (tokens, model_dim), (experts, _, expert_dim) = batch.x_TD.shape, batch.w2.shape
    device = torch.cuda.get_device_name() if batch.x_TD.device.type == "cuda" else "cpu"
    device = "NVIDIA_H200" if "H200" in device else re.sub(r"[\s/]+", "_", device)
    name = f"E={experts},N={expert_dim},device_name={device}.json"
    path = Path(fused_moe.__file__).parent / "configs" / name
    if path.exists():
        tuned = {int(m): tile for m, tile in json.loads(path.read_text()).items() if m.isdigit()}
        return tuned[min(tuned, key=lambda m: abs(m - tokens))], f"tiles of {name}"
    default: dict[str, int] = fused_moe.get_default_config(
        tokens, experts, expert_dim, model_dim, batch.router.top_k, None
    )
    return default, f"vLLM's default tiles: it has no {name}"


def _alignment(slots_TK: Tensor, block: int, experts: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return what vLLM's moe_align_block_size does: rows by slot, each slot padded to blocks.

    If there are few rows, each gets a block, unsorted, which is vLLM's own shortcut.
    """
    slots_R = slots_TK.flatten().long()
    if len(slots_R) * 4 <= experts:
        blocks = torch.full((1,), len(slots_R) * block, device=slots_TK.device)
        return None, slots_TK.flatten(), blocks.int()
    pads, experts = [], []
    for slot in slots_R[slots_R >= 0].unique().tolist():
        rows = (slots_R == slot).nonzero().flatten()
        blocks = -(-len(rows) // block)
        pads.append(functional.pad(rows, (0, blocks * block - len(rows)), value=len(slots_R)))
        experts += [slot] * blocks
    sorted_ids = torch.cat(pads).int()
    experts_B = torch.tensor(experts, dtype=torch.int32, device=slots_TK.device)
    return sorted_ids, experts_B, torch.tensor([len(sorted_ids)], device=slots_TK.device).int()


_VLLM = Baseline("vllm", "experts", _vllm, lambda batch, made: _vllm(batch, made)())
_VLLM_PRODUCTS = Baseline("vllm-products", "products", _vllm_products, _vllm_products_result)
_GROUPED_MM = Baseline("grouped_mm", "products", _grouped_mm, _grouped_mm_result)
