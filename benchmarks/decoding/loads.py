"""A stage of `python -m benchmarks.gpu`: loads beside decoding, by the product's own code.

The model of decoding/stage.py decodes in one pool of 16 by replays of its graph, and the host waits
for each step as an engine does. Meanwhile another pool's experts come from host memory into slots
that the first pool does not use: `ExpertLoad`, `CudaMover`, `HostMemory` and `ExpertStore` of the
plugin, that is pinned memory, a side stream, and publication between two steps. Host memory holds
all of them, so no disk is in the figures.

    link     GiB/s of one large copy from pinned memory, with nothing beside it
    load     seconds of the pool's load at idle and beside decoding, against its bytes over the link
    gaps     from the end of a step to the end of the next, by the host's clock, in windows with
             loads back to back and in windows without, in turn; the ratios are of pairs of windows

Before the first load the slots hold NaN. The pool that decodes must answer the same, to the bit,
with NaN in those slots, while a load runs and after it; and the loaded pool the same from its new
slots as from its old ones. Without CUDA, main memory stands in for pinned memory and the plugin's
`CpuMover`, a paced thread, for the side stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding.cases import Case, CheckFailed, Setting, geometry_of, relative
from benchmarks.decoding.stage import capture
from benchmarks.gpu.run import Run
from benchmarks.kernels.timing import Deadline, quartiles, repeated
from emo_serve.vllm_plugin.backends import TritonBackend
from emo_serve.vllm_plugin.expert_store import ExpertStore, HostMemory
from emo_serve.vllm_plugin.loads import CpuMover, CudaMover, ExpertLoad, Mover
from emo_serve.vllm_plugin.pacing import Steps
from emo_serve.vllm_plugin.packed import ExpertShape, PackedExpert, PackedMatrix

__all__ = ["loads", "percentile"]

_BATCH = 64
_PAIRS = 4  # of a window without loads and one with
_WINDOW_SECONDS = 5.0  # at most; on a GPU more than a thousand steps
_STEPS = 16  # whose answers are compared
_LEAST_STEPS = 8  # of a window, however little time is left
_TARGETS = {"load_to_floor": 2.0, "longest_ratio": 1.3}  # at most


@torch.no_grad()
def loads(run: Run) -> bool:
    """Measure loads beside a decoding batch; return whether every answer was the same."""
    setting = {
        "batch": min(_BATCH, max(run.args.batches)),
        "context": run.args.context,
        "layers": geometry_of(run).num_layers,
    }
    known = [found for found in run.done("loads") if setting.items() <= found.items()]
    if known:
        result = known[-1]
    else:
        measured = _Bench(run, setting["batch"]).measure(run.deadline)
        result = {"stage": "loads", **setting, **measured}
        run.record(result)
    print_result(result)
    return all(answer["is_identical"] for answer in result["answers"].values())


@dataclass
class _Window:
    """The gaps of a window's steps, and how long its loads took to their publication."""

    gaps_ms: list[float] = field(default_factory=list)
    load_seconds: list[float] = field(default_factory=list)


class _Bench:
    """The model, a graph of its step, and a pool in host memory."""

    def __init__(self, run: Run, num: int) -> None:
        self._is_cuda = run.is_cuda
        self._setting = setting = Setting.of(run, num)
        self._batch = batch = setting.batch(num)
        self._device = batch.tokens_T.device  # with its index, which a load's thread needs
        self._cache = [layer.clone() for layer in batch.cache]
        decoding = setting.cases[-2]  # the last of one pool
        (row,), other = decoding.rows, setting.cases[-1].rows[-1]
        self._decoding, self._loaded = decoding, Case("the loaded pool", (other,), decoding.slots)
        setting.begin(batch, decoding)
        step = setting.replayed_moe(num)
        self._replay, self._logits_TV = capture(
            lambda: setting.model.step(batch, step), self._device
        )
        self._shape = ExpertShape(
            setting.geometry.hidden_size, setting.geometry.expert_size, setting.dtype
        )
        self._copies, self._slots_after = self._plan(row, other)
        self._host = self._filled_host()
        self._steps = Steps()
        self._store = ExpertStore(
            _NO_FILES,  # type: ignore[arg-type]
            TritonBackend(),
            self._shape,
            self._host,
            CudaMover.piece_bytes,
        )
        self._mover: Mover = (
            CudaMover(self._store, self._slot, self._shape, self._device)
            if run.is_cuda
            else CpuMover(self._store, self._slot, self._steps)
        )

    def _plan(self, row: int, other: int) -> tuple[list[tuple[int, int, int]], list[Tensor]]:
        """Choose slots for the other pool's experts: those of experts in neither pool.

        Returns the copies, and where each layer's experts are after them.
        """
        copies, after = [], []
        for index, layer in enumerate(self._setting.model.layers):
            mine, theirs = (self._setting.pools[r][index] for r in (row, other))
            slots_E = layer.tables.slot_of_expert_E.tolist()
            free = [slot for e, slot in enumerate(slots_E) if e not in mine | theirs]
            for expert, slot in zip(sorted(theirs - mine), free, strict=False):
                copies.append((index, expert, slot))
                slots_E[expert] = slot
            after.append(torch.tensor(slots_E, dtype=torch.int32, device=self._device))
        return copies, after

    def _slot(self, layer: int, number: int) -> PackedExpert:
        weights = self._setting.model.layers[layer]
        return PackedExpert(PackedMatrix(weights.w13[number]), PackedMatrix(weights.w2[number]))

    def _filled_host(self) -> HostMemory:
        host = HostMemory(
            len(self._copies) * self._shape.num_bytes, self._shape, is_pinned=self._is_cuda
        )
        for layer, expert, _ in self._copies:
            memory = host.take()
            assert memory is not None
            slots_E = self._setting.model.layers[layer].tables.slot_of_expert_E
            source = self._slot(layer, int(slots_E[expert]))
            for target, held in zip(memory.tensors(), source.tensors(), strict=True):
                target.copy_(held)
            host.put((layer, expert), memory, self)
        return host

    # -- measuring --

    def measure(self, deadline: Deadline) -> dict[str, Any]:
        """Compare answers, then time the link, loads at idle, and windows of steps."""
        before, other_before = self._answers(self._decoding), self._answers(self._loaded)
        for layer, _, slot in self._copies:
            for tensor in self._slot(layer, slot).tensors():
                tensor.fill_(float("nan"))
        answers = {"with NaN in free slots": _compared(before, self._answers(self._decoding))}
        load = self._begin_load()
        during = self._answers(self._decoding)
        was_running = load.state == "loading"
        self._end_load(load)
        answers["while a load ran"] = _compared(before, during)
        answers["after it"] = _compared(before, self._answers(self._decoding))
        answers["of the loaded pool"] = _compared(other_before, self._answers(self._loaded))

        num_bytes = len(self._copies) * self._shape.num_bytes
        link = self._link_bytes_per_s()
        idle = [self._idle_load() for _ in range(3)]
        quiet, loading = list[_Window](), list[_Window]()
        self._setting.begin(self._batch, self._decoding)
        for pair in range(_PAIRS):
            seconds = deadline.share(0.7 / (2 * (_PAIRS - pair))).seconds_left
            seconds = min(seconds, _WINDOW_SECONDS if self._is_cuda else 0.2)
            quiet.append(self._window(seconds, is_loading=False))
            loading.append(self._window(seconds, is_loading=True))
        beside = [s for window in loading for s in window.load_seconds]
        last = self._answers(self._loaded)
        answers["of the loaded pool, at the end"] = _compared(other_before, last)
        return {
            "answers": answers,
            "load_ran_during_all_compared_steps": was_running,
            "pool_gib": num_bytes / 2**30,
            "link_gib_per_s": link / 2**30,
            "floor_seconds": num_bytes / link,
            "idle_seconds": idle,
            "beside_seconds": quartiles(beside) | {"longest": max(beside), "loads": len(beside)},
            "load_to_floor": median(beside) * link / num_bytes,
            "quiet": _gaps(quiet),
            "loading": _gaps(loading),
            "longest_ratio": _ratio(quiet, loading, max),
            "p999_ratio": _ratio(quiet, loading, lambda gaps: percentile(gaps, 0.999)),
            "median_ratio": _ratio(quiet, loading, median),
            "stand_ins": [] if self._is_cuda else ["graph", "pinned memory", "side stream"],
        }

    def _answers(self, case: Case) -> tuple[Tensor, Tensor]:
        """Decode from the start; return the tokens of some steps, and the logits of the last."""
        for cache, kept in zip(self._batch.cache, self._cache, strict=True):
            cache.copy_(kept)
        self._setting.begin(self._batch, case)
        tokens = []
        for _ in range(_STEPS):
            self._step()
            tokens.append(self._batch.tokens_T.clone())
        return torch.stack(tokens), self._logits_TV.clone()

    def _step(self) -> None:
        self._steps.begin()
        self._replay()
        if self._is_cuda:
            torch.cuda.current_stream().synchronize()
        self._steps.end()

    def _begin_load(self) -> ExpertLoad:
        return ExpertLoad(0, self._copies, self._mover, self._store)

    def _end_load(self, load: ExpertLoad) -> None:
        while load.state == "loading":
            time.sleep(1e-4)
        self._publish(load)

    def _publish(self, load: ExpertLoad) -> None:
        if load.failure is not None:
            raise CheckFailed(f"a load failed: {load.failure}")

        def apply(_: object) -> None:
            layers = self._setting.model.layers
            for layer, slots_E in zip(layers, self._slots_after, strict=True):
                layer.tables.slot_of_expert_E.copy_(slots_E)

        load.publish(apply)

    def _idle_load(self) -> float:
        started = time.perf_counter()
        self._end_load(self._begin_load())
        return time.perf_counter() - started

    def _window(self, seconds: float, *, is_loading: bool) -> _Window:
        window, load, began = _Window(), None, 0.0
        last = time.perf_counter()
        end = last + seconds
        while (
            last < end
            or len(window.gaps_ms) < _LEAST_STEPS
            or (is_loading and not window.load_seconds)
        ):
            if load is not None and load.state != "loading":
                self._publish(load)
                window.load_seconds.append(time.perf_counter() - began)
                load = None
            if is_loading and load is None:
                load, began = self._begin_load(), time.perf_counter()
            self._step()
            now = time.perf_counter()
            window.gaps_ms.append(1e3 * (now - last))
            last = now
        if load is not None:
            self._end_load(load)
        return window

    def _link_bytes_per_s(self) -> float:
        size = 2**30 if self._is_cuda else 2**25
        source = torch.ones(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        target = torch.empty_like(source, device=self._device)
        times_ms = repeated(
            lambda: target.copy_(source, non_blocking=True), self._device, 0.5, 5, 20
        )
        return size / (1e-3 * median(times_ms))


_NO_FILES = SimpleNamespace(expert_bytes=1 << 30, facts=SimpleNamespace(names=None))
"""In place of a checkpoint: host memory holds all that is loaded."""


def _compared(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return how far tokens and the last step's logits agree."""
    tokens, logits = zip(before, after, strict=True)
    return {
        "is_identical": torch.equal(*tokens) and torch.equal(*logits),
        "tokens_same": (tokens[0] == tokens[1]).float().mean().item(),
        "logits_error": relative(logits[1], logits[0]).median().item(),
    }


def percentile(values: list[float], share: float) -> float:
    """Return the least value that `share` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _gaps(windows: list[_Window]) -> dict[str, float]:
    gaps = [gap for window in windows for gap in window.gaps_ms]
    return {
        "steps": len(gaps),
        "median_ms": median(gaps),
        "p999_ms": percentile(gaps, 0.999),
        "longest_ms": max(gaps),
    }


def _ratio(
    quiet: list[_Window], loading: list[_Window], value: Callable[[list[float]], float]
) -> float:
    """Return the median over pairs of windows: with loads to without."""
    pairs = zip(quiet, loading, strict=True)
    return median(value(with_.gaps_ms) / value(without.gaps_ms) for without, with_ in pairs)


# -- output --


def print_result(found: dict[str, Any]) -> None:
    """Print the loads' seconds and the steps' gaps, and which targets were reached."""
    if found["stand_ins"]:
        print(f"calls stand in for: {', '.join(found['stand_ins'])}; no figure means anything")
    beside, idle = found["beside_seconds"], median(found["idle_seconds"])
    print(f"a pool of {found['pool_gib']:.3g} GiB, link {found['link_gib_per_s']:.3g} GiB/s:")
    print(f"  floor {found['floor_seconds']:.3g} s, at idle {idle:.3g} s, beside decoding", end=" ")
    middle = f"{beside['q1']:.3g}-{beside['q3']:.3g}"
    print(f"{beside['median']:.3g} s ({middle}), {beside['loads']} loads")
    print("\n| gaps of steps | steps | median ms | 99.9th percentile | longest |")
    print("|---" * 5 + "|")
    for name in ("quiet", "loading"):
        gaps = found[name]
        cells = (gaps["median_ms"], gaps["p999_ms"], gaps["longest_ms"])
        print(f"| {name} | {gaps['steps']} | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
    ratios = (found["median_ratio"], found["p999_ratio"], found["longest_ratio"])
    print("| ratio, median of pairs | | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |\n")
    for when, answer in found["answers"].items():
        same = "the same to the bit"
        if not answer["is_identical"]:
            same = f"DIFFER: {answer['tokens_same']:.0%} of tokens the same, logits"
            same += f" {answer['logits_error']:.2g} away"
        print(f"answers {when}: {same}")
    if not found["stand_ins"]:
        for name, most in _TARGETS.items():
            verdict = "reached" if found[name] <= most else "NOT reached"
            print(f"- {name} at most {most}: {verdict} ({found[name]:.2f})")
