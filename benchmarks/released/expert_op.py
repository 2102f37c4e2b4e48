"""The expert maths of one layer on this CPU, against what the machine can do at best.

The roofline of a batch is max(bytes of the experts hit / read bandwidth, FLOPs / dense rate), both
measured here, in the same process, between the rows. Each variant computes the same batches, all
layers of them before the next variant's turn, so that weights come from memory and not from a
cache; a time is the median over layers and rounds, the first of which is not counted. Variants that
pack weights alike read the same memory: on a virtual machine some of it may be slower than the
rest. Random weights of the released sizes.

    python -m benchmarks.released.expert_op
    python -m benchmarks.released.expert_op --threads 1 --dtype float32 --pools 16
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.harness.progress import steps
from benchmarks.harness.random_checkpoint import RELEASED
from benchmarks.harness.results import append_result
from emo_kernels.cpu import CpuExperts, may_use_tiles

if TYPE_CHECKING:
    from emo_serve.vllm_plugin.cpu_backend import CpuBackend, VllmCpuBackend

_HIDDEN, _WIDTH, _TOP_K = (
    RELEASED[name] for name in ("hidden_size", "intermediate_size", "num_experts_per_tok")
)
_LEAST_BYTES = 2e9
"""What the layers of a rotation weigh together at least; a cache must not hold them."""


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Machine:
    """What this machine reads and multiplies at best: the largest rates seen so far."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.ones(2**28)  # 1 GiB
        self._vector = torch.ones(2048)
        self._a, self._b = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        self.read_bytes_per_second = self.flops_per_second = 0.0
        for _ in range(3):
            self.measure()

    def measure(self) -> None:
        """Measure once more."""
        matrix = self._memory.view(-1, len(self._vector))
        for read in (self._memory.sum, lambda: matrix @ self._vector):
            rate = self._memory.nbytes / seconds(read)
            self.read_bytes_per_second = max(self.read_bytes_per_second, rate)
        flops = 2 * self._a.numel() * self._b.shape[1]
        rate = flops / min(seconds(lambda: self._a @ self._b.t()) for _ in range(5))
        self.flops_per_second = max(self.flops_per_second, rate)

    def roofline_seconds(self, num_bytes: float, flops: float) -> float:
        """Return the least time for so many bytes read and products and sums made."""
        return max(num_bytes / self.read_bytes_per_second, flops / self.flops_per_second)


class Op:
    """Slabs of several layers, packed for one variant, or for another that packs alike."""

    def __init__(
        self, variant: str, pool: int, layers: int, dtype: torch.dtype, others: Iterable[Op] = ()
    ) -> None:
        from emo_serve.vllm_plugin.packed import ExpertShape

        self._backend = _backend(variant, dtype)
        shape = ExpertShape(_HIDDEN, _WIDTH, dtype)
        draw = torch.Generator().manual_seed(0)
        w13 = torch.randn(2 * _WIDTH, _HIDDEN, generator=draw).mul_(0.02).to(dtype)
        w2 = torch.randn(_HIDDEN, _WIDTH, generator=draw).mul_(0.02).to(dtype)
        sample = shape.slab(1).slot(0).w2
        self._backend.pack_into(sample, w2)
        for other in others:
            if torch.equal(other.slabs[0].slot(0).w2.values, sample.values):
                self.slabs = other.slabs
                return
        self.slabs = [shape.slab(pool) for _ in range(layers)]
        for slab in self.slabs:
            for slot in range(pool):
                expert = slab.slot(slot)
                self._backend.pack_into(expert.w13, w13.roll(slot, 0))
                self._backend.pack_into(expert.w2, w2.roll(slot, 0))

    def run(self, layer: int, x_TD: Tensor, weights_TK: Tensor, slots_TK: Tensor) -> Tensor:
        """Compute one batch in one layer."""
        return self._backend.compute(x_TD, weights_TK, slots_TK, self.slabs[layer])


def _backend(variant: str, dtype: torch.dtype) -> CpuBackend | VllmCpuBackend:
    """Return our kernel ("ours", or "vectors" to leave AMX aside), or a variant of vLLM's."""
    from emo_serve.vllm_plugin.cpu_backend import CpuBackend, VllmCpuBackend

    if variant not in ("ours", "vectors"):
        may_use_tiles()
        return VllmCpuBackend(variant)
    experts = CpuExperts.of(dtype, tiles=variant == "ours")
    if experts is None:
        raise SystemExit(f"--variants {variant} needs AVX-512 and a C++ compiler")
    return CpuBackend(experts)


def draw_batch(tokens: int, pool: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, weights and slots: the last slot is the shared expert's, the rest is even."""
    draw = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, _HIDDEN, generator=draw).to(dtype)
    scores = torch.rand(tokens, pool - 1, generator=draw)
    chosen = scores.topk(_TOP_K - 1).indices
    slots_TK = torch.cat([chosen, torch.full((tokens, 1), pool - 1)], 1).int().contiguous()
    return x_TD, torch.rand(tokens, _TOP_K, generator=draw), slots_TK


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all batches of one pool size on one number of threads."""
    (pool,), (threads,) = args.pools, args.threads
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    torch.set_num_threads(threads)
    dtype = getattr(torch, args.dtype)
    expert_bytes = 3 * _HIDDEN * _WIDTH * dtype.itemsize
    layers = max(2, round(_LEAST_BYTES / (pool * expert_bytes)))
    variants = [name for name in args.variants if name != "amx" or dtype == torch.bfloat16]
    ops: dict[str, Op] = {}
    for variant in variants:
        ops[variant] = Op(variant, pool, layers, dtype, ops.values())
    machine = Machine(dtype)
    rows = []
    for tokens in steps(args.tokens, f"pool of {pool}, {threads} threads"):
        batch = draw_batch(tokens, pool, dtype)
        times: dict[str, list[float]] = {variant: [] for variant in ops}
        for counted in range(-1, args.rounds):  # the first round warms up
            for variant, op in ops.items():
                for layer in range(layers):
                    taken = seconds(partial(op.run, layer, *batch))
                    if counted >= 0:
                        times[variant].append(taken)
        machine.measure()
        rows.append((tokens, int(batch[2].unique().numel()), times))
    results = []
    for tokens, hit, times in rows:
        flops = 2 * tokens * _TOP_K * 3 * _HIDDEN * _WIDTH
        best = machine.roofline_seconds(hit * expert_bytes, flops)
        medians = {variant: statistics.median(each) for variant, each in times.items()}
        share = {variant: best / median for variant, median in medians.items()}
        results.append(
            {"dtype": args.dtype, "threads": threads, "pool": pool, "tokens": tokens, "hit": hit}
            | {"roofline_seconds": best, "seconds": medians, "of_roofline": share}
            | {"read_bytes_per_second": machine.read_bytes_per_second}
            | {"flops_per_second": machine.flops_per_second}
        )
    return results


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one pool size and number of threads."""
    first = rows[0]
    print(
        f"\n{first['dtype']}, {first['threads']} threads, pool of {first['pool']}: reads"
        f" {first['read_bytes_per_second'] / 1e9:.1f} GB/s, multiplies"
        f" {first['flops_per_second'] / 1e9:.0f} GFLOP/s"
    )
    variants = list(first["seconds"])
    print(
        "| tokens | experts hit | roofline ms |" + "".join(f" {v} ms (share) |" for v in variants)
    )
    print("|---|---|---|" + "---|" * len(variants))
    for row in rows:
        cells = [
            f" {1e3 * row['seconds'][v]:.1f} ({row['of_roofline'][v]:.2f}) |" for v in variants
        ]
        best = f"{1e3 * row['roofline_seconds']:.1f}"
        print(f"| {row['tokens']} | {row['hit']} | {best} |" + "".join(cells))
    sys.stdout.flush()


def main() -> None:
    """Measure each case in a process of its own, print tables, append a result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--pools", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(11)])
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=["ours", "vectors", "amx", "vec"],
        help="our kernel, the same without AMX, vLLM's [ours and vLLM's fastest]",
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.variants is None:
        from emo_serve.vllm_plugin.cpu_backend import VllmCpuBackend

        args.variants = ["ours", VllmCpuBackend.fastest(getattr(torch, args.dtype))]
    if len(args.threads) == len(args.pools) == 1:
        rows = measure(args)
        show(rows)
        append_result("released_expert_op", vars(args), rows)
        return
    for threads in args.threads:
        for pool in args.pools:
            options = [f"--threads={threads}", f"--pools={pool}", f"--dtype={args.dtype}"]
            options += ["--variants", *args.variants, f"--rounds={args.rounds}"]
            options += ["--tokens", *map(str, args.tokens)]
            command = [sys.executable, "-m", "benchmarks.released.expert_op", *options]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
