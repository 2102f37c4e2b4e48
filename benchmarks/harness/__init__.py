"""What benchmarks share: lines of results, engines and servers to measure."""
