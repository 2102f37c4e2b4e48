"""What benchmarks share: result lines, engines and servers to measure."""
