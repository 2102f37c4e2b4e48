"""Pruned checkpoints: write a pool as one, and read one's list of experts as a pool."""
