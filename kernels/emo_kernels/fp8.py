"""Expert weights in fp8 (e4m3), one fp32 scale an output channel: half the bytes of a slot.

Tokens stay in 16 bits: the kernels widen weights on the way to the tensor cores and scale the
product, w = q * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantize"]

_LARGEST = 448.0  # of e4m3fn


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (q, scales): q float8_e4m3fn of weight's shape [..., N, k], scales fp32 [..., N].

    A channel's largest value becomes e4m3's largest; a channel of zeros keeps the scale 1. Channels
    know nothing of each other: rows of a matrix can be quantised by themselves.
    """
    weight = weight.float()
    scales = weight.abs().amax(-1) / _LARGEST
    scales = torch.where(scales == 0, 1.0, scales)
    return (weight / scales[..., None]).to(torch.float8_e4m3fn), scales
