"""Benchmarks: each prints a table and appends one line to results/; see README.md.

Run one from the repository's root, for example `python -m benchmarks.serving.throughput`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

# A GPU machine may have this repository's files, torch and triton, and no way to install.
if find_spec("emo_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
