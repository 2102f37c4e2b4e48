"""Check, tune and measure the Triton kernels on this machine's GPU, in one call.

    python -m benchmarks.kernels.run                      # all of it, in nine minutes
    python -m benchmarks.kernels.run                      # again: continues where it stopped
    python -m benchmarks.kernels.run --stages measure --tokens 1 64 --pools 16 4x16
    TRITON_INTERPRET=1 python -m benchmarks.kernels.run --device cpu    # tiny, without a GPU

check    every kernel against its torch twin in bf16, fp16 and fp8, at the corners of
         kernels/corners.py, then captured in a CUDA graph and replayed with other pools. A failure
         ends the run with status 1: nothing is tuned or measured.
tune     the tiles of each (tokens, slots of the pools), into the table of this architecture
         (kernels/emo_kernels/tuned), see kernels/tuner.py. Gets about half of the time left.
measure  the layer at T = 1 to 16384 in pools of 8 to 128 and four pools of 16 mixed, 16bit and fp8
         weights, against vLLM's and torch's kernels (kernels/baselines.py) and two floors
         (kernels/cases.py), by the medians of kernels/timing.py, into results/kernels.jsonl.

Needs torch and triton only; emo-serve need not be installed. Without a GPU all stages run in
Triton's interpreter, at sizes and times that mean nothing: such results and tables are marked, and
go to a temporary directory unless told otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.kernels.stages import Run

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("check", "tune", "measure")
DTYPES = ("bf16", "fp16", "fp32")
TOKENS = tuple(2**n for n in range(15))
POOLS = ((1, 16), (1, 128), (1, 32), (4, 16), (1, 8), (1, 64))
"""(pools, experts each), what the targets name first."""


def main() -> int:
    """Run the stages asked for; return the exit status."""
    run = Run(_arguments())
    if "check" in run.args.stages and not run.check():
        return 1
    if "tune" in run.args.stages:
        run.tune()
    if "measure" in run.args.stages:
        run.measure()
    return 0


def _pool(text: str) -> tuple[int, int]:
    count, _, size = text.rpartition("x")
    return int(count or 1), int(size)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--minutes", type=float, default=9.0, help="end within this time [9]")
    parser.add_argument("--device", default="cuda", help="[cuda]")
    parser.add_argument("--dtype", choices=DTYPES, help="of tokens and 16bit weights [bf16]")
    parser.add_argument("--tokens", type=int, nargs="+", help="[1 2 4 ... 16384]")
    parser.add_argument("--pools", type=_pool, nargs="+", help="8, 4x16 ... [8 to 128, and 4x16]")
    parser.add_argument("--weights", nargs="+", default=["16bit", "fp8"], choices=("16bit", "fp8"))
    parser.add_argument(
        "--lookup",
        choices=("pool", "slab"),
        default="pool",
        help="slots that tiles are looked up for: those of the batch's pools, or all [pool]",
    )
    parser.add_argument("--again", action="store_true", help="repeat what has been done")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; implied by --device cpu")
    parser.add_argument("--workers", type=int, help="processes that try candidates [cores, <= 14]")
    parser.add_argument("--results", type=Path, help="directory [benchmarks/results]")
    parser.add_argument("--tables", type=Path, help="directory [the package's]")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("no CUDA device: nothing measured. TRITON_INTERPRET=1 and --device cpu run it tiny")
        sys.exit(0)
    if cuda and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 would time the interpreter; unset it")
    if not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
    if "fp8" in args.weights and "16bit" not in args.weights and "tune" in args.stages:
        parser.error("tables are tuned for 16bit weights before fp8: add 16bit")
    args.smoke = args.smoke or not cuda
    args.dtype = args.dtype or ("bf16" if cuda else "fp16")
    args.tokens = args.tokens or ([1, 5, 24] if args.smoke else list(TOKENS))
    args.pools = args.pools or ([(1, 8), (2, 8)] if args.smoke else list(POOLS))
    if args.workers is None:
        args.workers = min(14, os.cpu_count() or 1) if cuda else 0
    if args.smoke:  # figures of tiny sizes must not be taken for the kernels'
        home = args.results or Path(tempfile.mkdtemp(prefix="bench_kernels-"))
        args.results, args.tables = home, args.tables or home
    args.results = args.results or ROOT / "benchmarks" / "results"
    return args


if __name__ == "__main__":
    sys.exit(main())
