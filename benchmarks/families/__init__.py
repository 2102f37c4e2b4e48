"""Tiny random models of each family, and what transformers computes with experts sliced away."""
