"""Triton kernels for pool-masked mixture-of-experts layers; torch and triton only, never emo_serve.

The kernels are not here yet. Until they are, vLLM's own CPU kernel and emo-serve's plain-torch
`reference` backend do the expert maths.
"""

__all__: list[str] = []
