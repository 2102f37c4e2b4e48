"""How far a kernel may be from its twin: they differ in the order of sums alone."""

import torch

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}
