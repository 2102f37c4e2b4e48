"""The Triton kernels on this machine's GPU: check, tune, measure."""
