"""All that needs a GPU, in one call of nine minutes: what matters most first, and it resumes.

    python -m benchmarks.gpu                              # all of it, in nine minutes
    python -m benchmarks.gpu                              # again: continues where it stopped
    python -m benchmarks.gpu --stages decode --batches 64 --layers 8
    TRITON_INTERPRET=1 python -m benchmarks.gpu --device cpu      # tiny, without a GPU

check    every kernel against its torch twin in bf16, fp8 and fp16, at the corners of
         kernels/corners.py, then captured in a CUDA graph and replayed with other pools.
decode   a whole model of the released size decoding in CUDA graphs, with the tiles of the table:
         all experts, a pool of 32, one of 16, four of 16 mixed (decoding/stage.py).
loads    a pool's experts from pinned host memory into slots, on the product's own side stream,
         while such a graph is replayed: seconds against the link, gaps of the steps against none,
         answers before, during and after (decoding/loads.py).
tune     the tiles of EMO's layers, into the table of this architecture
         (kernels/emo_kernels/tuned), see kernels/tuner.py.
tuned    decode again, where tuning changed the tiles.
measure  one layer at T = 1 to 4096 against torch's and vLLM's kernels (kernels/baselines.py) and
         two floors (kernels/cases.py), by the medians of kernels/timing.py.

Each stage is a process of its own with a share of the time left, so that neither a fault nor a hang
takes another stage with it, and writes into results/gpu.jsonl as it goes. A check that fails makes
the exit status 1. The stages after it check what they time themselves, but for `measure`, and kinds
of weights that failed are neither tuned nor measured.

Needs torch 2.11 and triton 3.6 or later, a copy of this repository, and nothing else. Without a GPU
all stages run in Triton's interpreter (which needs numpy), at sizes and times that mean nothing:
calls stand in for graphs, main memory for pinned memory, a paced thread for the side stream. Such
results and tables are marked, and go to a temporary directory unless told otherwise.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.decoding.loads import loads
from benchmarks.decoding.stage import decode
from benchmarks.gpu.run import BENCHMARK, Run
from benchmarks.harness.results import RESULTS, ROOT, append_result
from benchmarks.kernels.stages import check, measure, tune
from benchmarks.kernels.timing import Deadline

__all__ = ["main"]

_STAGES: dict[str, tuple[Callable[[Run], bool], int]] = {
    "check": (check, 110),
    "decode": (decode, 85),
    "loads": (loads, 45),
    "tune": (tune, 170),
    "tuned": (decode, 55),
    "measure": (measure, 75),
}
"""By worth: what runs it and returns whether all was well, and its share of the time."""

_LATE_SECONDS = 20.0  # a stage that overruns its time by this is ended
_TOKENS = (64, 8, 256, 1, 4096)
_POOLS = ((1, 16), (1, 128), (1, 32), (4, 16))
_BATCHES = (64, 8, 256, 1)


def main() -> int:
    """Run the stages asked for, each in a process of its own; return the exit status."""
    args = _arguments()
    if args.here:
        return max(_run(stage, args) for stage in args.stages)
    deadline, status = Deadline(args.minutes), 0
    for place, stage in enumerate(args.stages):
        shares = [_STAGES[later][1] for later in args.stages[place:]]
        seconds = deadline.share(shares[0] / sum(shares)).seconds_left
        if seconds < 5:
            print(f"{stage}: left for another call, out of time")
            continue
        status |= _apart(stage, args, seconds)
    return status


def _run(stage: str, args: argparse.Namespace) -> int:
    """Run a stage in this process; an error is recorded as the stage's failure."""
    run = Run(args)
    print(f"\n== {stage}: {run.device_name}, {60 * args.minutes:.0f} s, kernels {run.digest} ==")
    try:
        is_well = _STAGES[stage][0](run)
    except Exception as problem:
        failure = f"{type(problem).__name__}: {problem}"[:500]
        run.record({"stage": stage, "broke": failure})
        print(f"FAILED {stage}: {failure}")
        return 1
    return 0 if is_well else 1


def _apart(stage: str, args: argparse.Namespace, seconds: float) -> int:
    """Run a stage in a process, and end that with all it started if it takes too long."""
    sys.stdout.flush()
    command = _command(stage, args, seconds)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds + _LATE_SECONDS)
    except subprocess.TimeoutExpired:
        status = None
    finally:  # its workers too, however it ended
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status in (0, 1):
        return status
    failure = "ended: out of time" if status is None else f"its process died: status {status}"
    append_result(BENCHMARK, vars(args), {"stage": stage, "broke": failure}, args.results)
    print(f"FAILED {stage}: {failure}")
    return 1


def _command(stage: str, args: argparse.Namespace, seconds: float) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--here"]
    command += ["--stages", stage, "--minutes", str(seconds / 60)]
    command += ["--results", str(args.results)]
    return command + (["--tables", str(args.tables)] if args.tables else [])


# -- arguments --


def _pool(text: str) -> tuple[int, int]:
    count, _, size = text.rpartition("x")
    return int(count or 1), int(size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--stages", nargs="+", default=list(_STAGES), choices=list(_STAGES))
    parser.add_argument("--minutes", type=float, default=9.0, help="end within this time [9]")
    parser.add_argument("--device", default="cuda", help="[cuda]")
    parser.add_argument("--again", action="store_true", help="repeat what has been done")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; implied by --device cpu")
    parser.add_argument("--results", type=Path, help="directory [benchmarks/results]")
    parser.add_argument("--tables", type=Path, help="directory [the package's]")
    parser.add_argument("--workers", type=int, help="processes that compile [cores, <= 14]")
    parser.add_argument("--here", action="store_true", help="run the stages in this process")
    kernels = parser.add_argument_group("check, tune and measure")
    kernels.add_argument("--tokens", type=int, nargs="+", help=f"[{_words(_TOKENS)}]")
    kernels.add_argument("--pools", type=_pool, nargs="+", help="measured [16 128 32 4x16]")
    kernels.add_argument("--slots", type=int, nargs="+", help="tuned [16 128]")
    kernels.add_argument("--weights", nargs="+", default=["16bit", "fp8"], choices=("16bit", "fp8"))
    kernels.add_argument(
        "--lookup",
        choices=("pool", "slab"),
        default="pool",
        help="slots that measured tiles are looked up for: those of the batch's pools, or all",
    )
    whole = parser.add_argument_group("decode and loads")
    whole.add_argument("--batches", type=int, nargs="+", help=f"[{_words(_BATCHES)}]")
    whole.add_argument("--context", type=int, help="tokens attention sees [512]")
    whole.add_argument("--layers", type=int, help="layers of the model [16]")
    whole.add_argument(
        "--tiles-for", type=int, metavar="SLOTS", help="slots that tiles are chosen for [all]"
    )
    return parser


def _words(numbers: tuple[int, ...]) -> str:
    return " ".join(map(str, numbers))


def _arguments() -> argparse.Namespace:
    parser = _parser()
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
    args.tokens = args.tokens or ([5, 1] if args.smoke else list(_TOKENS))
    args.pools = args.pools or ([(1, 8), (2, 8)] if args.smoke else list(_POOLS))
    args.slots = args.slots or ([8] if args.smoke else [16, 128])
    args.batches = args.batches or ([5, 1] if args.smoke else list(_BATCHES))
    args.context = args.context or (8 if args.smoke else 512)
    args.layers = args.layers or (2 if args.smoke else 16)
    if min(*args.batches, *args.tokens, args.context, args.layers) < 1:
        parser.error("--tokens, --batches, --context and --layers must be at least 1")
    if args.workers is None:
        args.workers = min(14, os.cpu_count() or 1) if cuda else 0
    if args.smoke:  # figures of tiny sizes must not be taken for the kernels'
        home = args.results or Path(tempfile.mkdtemp(prefix="benchmarks-gpu-"))
        args.results, args.tables = home, args.tables or home
    args.results = args.results or RESULTS
    return args


if __name__ == "__main__":
    sys.exit(main())
