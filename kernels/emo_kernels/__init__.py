"""Triton kernels for pool-masked mixture-of-experts layers; torch and triton only, never emo_serve.

`pooled_moe` is a whole layer; `route`, `dispatch`, `gate_up`, `down` and `combine` are its stages.
Each has a twin of the same name and signature in `emo_kernels.reference`, in plain torch.

Shapes: T tokens, D model dim, F expert dim, E experts, P pool rows, S slots, K places a token
(top-k), R = T * K routed rows.
"""

from emo_kernels.dispatch import dispatch
from emo_kernels.fp8 import quantize
from emo_kernels.grouped_gemm import down, gate_up
from emo_kernels.moe_mlp import combine, pooled_moe
from emo_kernels.routing import route
from emo_kernels.tables import NO_SLOT, PoolTables, Routed, Router, Schedule
from emo_kernels.tuning import Config, Tile

__all__ = [
    "NO_SLOT",
    "Config",
    "PoolTables",
    "Routed",
    "Router",
    "Schedule",
    "Tile",
    "combine",
    "dispatch",
    "down",
    "gate_up",
    "pooled_moe",
    "quantize",
    "route",
]
