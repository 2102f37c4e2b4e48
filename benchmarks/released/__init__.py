"""The released size on a machine without a GPU, with random weights."""
