"""All that needs a GPU, in one call: `python -m benchmarks.gpu`."""
