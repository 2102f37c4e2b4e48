"""Quantising weights to fp8: a scale a channel, errors within e4m3's step."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_kernels import quantize


@settings(deadline=None)
@given(
    st.integers(0, 2**16), st.floats(1e-6, 1e4), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_error_is_within_a_step(seed: int, size: float, dtype: torch.dtype) -> None:
    weight = size * torch.randn(3, 8, 16, generator=torch.manual_seed(seed))
    weight = weight.to(dtype).float()
    q, scales = quantize(weight.to(dtype))
    assert q.dtype == torch.float8_e4m3fn and q.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == (3, 8)
    back = q.float() * scales[..., None]
    largest = weight.abs().amax(-1, keepdim=True)
    # 3 bits of mantissa: half a step is 2**-4 of the value; below 2**-6, 2**-10 in e4m3's units.
    assert ((back - weight).abs() <= weight.abs() * 2**-4 + largest * (2**-10 / 448) * 1.01).all()
    torch.testing.assert_close(back.abs().amax(-1, keepdim=True), largest, rtol=1e-5, atol=0)


def test_a_channel_of_zeros_stays_zero() -> None:
    q, scales = quantize(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert (q.float()[0] == 0).all() and scales[0] == 1
    assert torch.equal(q.float()[1] * scales[1], torch.tensor([1.0, -2.0]))
