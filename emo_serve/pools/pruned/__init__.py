"""Pruned checkpoints: a pool written as one, and one's list of experts read as a pool."""
