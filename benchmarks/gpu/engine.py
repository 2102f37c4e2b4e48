"""vLLM's own engine with our plugin on a GPU: answers, loads beside decoding, tokens per second.

    python -m benchmarks.gpu.engine                       # four minutes; vLLM for CUDA installed
    python -m benchmarks.gpu.engine --layers 2 --batches 64

Without vLLM's compiled operations, its Python files do (gpu/vllm_files.py). The engine runs in this
process, in whole CUDA graphs, and every part is recorded before the next begins:

golden   the small checkpoint whose log-probabilities are known, in float32 and four pools at once:
         the largest difference before and after every expert was loaded again into another slot,
         and how many greedy tokens differ from the reference model's choice
speed    a random model of `--layers` layers of the released width with slots for all experts:
         tokens/s while every sequence decodes, all experts against a pool of 16 and four mixed
loads    the same engine decoding in one pool of 16 while another one is loaded from pinned memory
         again and again: seconds of a load, gaps of the steps against windows without loads

Rates are those of the whole engine, its scheduler and sampler included.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.decoding.loads import percentile
from benchmarks.gpu.vllm_files import ENGINE_ARGUMENTS, use_python_files
from benchmarks.harness.engines import engine_arguments, load_pools
from benchmarks.harness.random_checkpoint import RELEASED, write_checkpoint
from benchmarks.harness.results import RESULTS, append_result

__all__ = ["Engine", "golden", "loads", "main", "speed"]

_PROMPT = 16  # tokens of the prompts of random models
_BATCHES = (1, 8, 64, 256)
Pool = Sequence[Sequence[int]]


class Engine:
    """An engine in this process; row r of its pool table is `pools[r]`."""

    def __init__(self, model: Path, pools: Sequence[Pool], num_slots: int, **more: Any) -> None:
        from vllm import LLM

        from emo_serve.vllm_plugin import register

        register()  # a copy of the repository has no entry point
        self.pools, self._numbers = pools, 0
        more["enable_prefix_caching"] = False  # only the front end salts it with the pool
        arguments = engine_arguments(model, num_slots, len(pools), device="cuda", **more)
        self.llm: Any = LLM(**arguments)
        load_pools(
            self.llm,
            [(i, expert, expert) for i, layer in enumerate(pools[0]) for expert in layer],
            [SimpleNamespace(expert_ids=pool, router_temperature=1.0) for pool in pools],
        )

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call the worker between two steps."""
        (answer,) = self.llm.collective_rpc(method, args=(1, *arguments))
        assert answer["ok"], answer
        return answer  # type: ignore[no-any-return]

    def decode(
        self, rows: Sequence[int], tokens: int, between: Callable[[], object] = lambda: None
    ) -> list[float]:
        """Decode a random prompt in each of these rows; return the seconds of the steps.

        They are of steps in which every sequence decodes; `between` is called before each.
        """
        from vllm import SamplingParams

        from emo_serve.vllm_plugin.contract import RequestTag

        engine, last, seconds = self.llm.llm_engine, dict[str, int](), list[float]()
        for row in rows:
            self._numbers += 1
            params = SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=RequestTag(row).to_extra_args(),
            )
            ids = [5 + (31 * self._numbers + 7 * i) % 200 for i in range(_PROMPT)]
            engine.add_request(str(self._numbers), {"prompt_token_ids": ids}, params)
        ended = time.perf_counter()
        while engine.has_unfinished_requests():
            between()
            outputs = engine.step()
            began, ended = ended, time.perf_counter()
            now = {out.request_id: len(out.outputs[0].token_ids) for out in outputs}
            if len(now) == len(rows) and all(last.get(id) == n - 1 for id, n in now.items()):
                seconds.append(ended - began)
            last = now
        return seconds

    def close(self) -> None:
        """Give back the device's memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        torch.cuda.empty_cache()


# -- golden --


def golden(directory: Path, prompts: int = 3, tokens: int = 24, **more: Any) -> dict[str, Any]:
    """Compare the engine with the golden log-probabilities and the reference model's choices.

    Generates `tokens` for each of the first `prompts` prompts, in each pool.
    """
    from emo_serve.emo.checkpoint import load_model
    from tests.support.golden.checkpoints import golden as values
    from tests.support.golden.checkpoints import write_checkpoint as write_golden

    known, asked = values(), values().prompts[:prompts]
    write_golden("shared1", directory)
    everything = [list(range(32))] * 3
    names, pools = ["full", *known.pools], [everything, *known.pools.values()]
    settings = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}
    engine = Engine(directory, pools, 32, **settings, **more)
    before = _worst_difference(engine, names, prompts)
    moved = [(layer, expert, 31 - expert) for layer in range(3) for expert in range(32)]
    load_pools(
        engine.llm,
        moved,
        [SimpleNamespace(expert_ids=pool, router_temperature=1.0) for pool in pools],
    )
    after = _worst_difference(engine, names, prompts)
    reference = load_model(directory)
    differing = [
        _differing(reference, pool, prompt, out)
        for row, pool in enumerate(pools)
        for prompt, out in zip(asked, _greedy(engine, row, asked, tokens), strict=True)
    ]
    described = engine.call("emo_describe")
    engine.close()
    return {
        "part": "golden",
        "worst": before,
        "worst_after_loads": after,
        "greedy_tokens": tokens * len(differing),
        "greedy_tokens_that_differ": sum(differing),
        "moe_backend": described["moe_backend"],
        "model_runner": described["model_runner"],
    }


def _worst_difference(engine: Engine, names: Sequence[str], prompts: int) -> float:
    """Return the largest difference of a prompt token's log-probability, all pools in one batch."""
    from tests.support.golden.checkpoints import golden as values

    known = values()
    asked = [(row, i) for i in range(prompts) for row in range(len(names))]
    outputs = _generate(
        engine, [(row, known.prompts[i]) for row, i in asked], max_tokens=1, prompt_logprobs=0
    )
    differences = [
        entry[token].logprob - wanted
        for (row, i), output in zip(asked, outputs, strict=True)
        for entry, token, wanted in zip(
            output.prompt_logprobs[1:],
            known.prompts[i][1:],
            known.prompt_logprobs[names[row]][i],
            strict=True,
        )
    ]
    return float(torch.tensor(differences).abs().max())  # nan if any is


def _greedy(engine: Engine, row: int, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    asked = [(row, prompt) for prompt in prompts]
    outputs = _generate(engine, asked, max_tokens=tokens, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _generate(engine: Engine, asked: Sequence[tuple[int, list[int]]], **settings: Any) -> Any:
    from vllm import SamplingParams

    from emo_serve.vllm_plugin.contract import RequestTag

    params = [
        SamplingParams(temperature=0.0, extra_args=RequestTag(row).to_extra_args(), **settings)
        for row, _ in asked
    ]
    prompts = [{"prompt_token_ids": ids} for _, ids in asked]
    return engine.llm.generate(prompts, params, use_tqdm=False)


@torch.no_grad()
def _differing(reference: Any, pool: Pool, prompt: list[int], tokens: list[int]) -> int:
    """Count tokens that are not the reference's likeliest, ties within 1e-3 nats apart."""
    members = [torch.zeros(32, dtype=torch.bool) for _ in pool]
    for mask, experts in zip(members, pool, strict=True):
        mask[list(experts)] = True
    scores = reference(torch.tensor([[*prompt, *tokens]]), pool=[m[None] for m in members])
    scores = scores[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return int((scores.max(-1).values - chosen > 1e-3).sum())


# -- a random model --


def random_engine(directory: Path, layers: int, sizes: dict[str, int], **more: Any) -> Engine:
    """Start an engine on a random model; row 0 has all experts, rows 1 to 4 disjoint pools of 16.

    The pools share the shared expert only, and are smaller where there are fewer experts.
    """
    all_sizes = RELEASED | {"num_hidden_layers": layers} | sizes
    write_checkpoint(directory, all_sizes)
    experts = all_sizes["num_experts"]
    size = min(15, (experts - 1) // 4)
    layer_pools = [
        list(range(experts)),
        *([*range(size * row, size * (row + 1)), experts - 1] for row in range(4)),
    ]
    pools = [[pool] * layers for pool in layer_pools]
    # Room in pinned memory for the pool that is loaded again and again, and one more.
    expert_bytes = 3 * 2 * all_sizes["hidden_size"] * all_sizes["intermediate_size"]
    host_bytes = 2 * layers * (size + 1) * expert_bytes
    settings = {"dtype": "bfloat16", "max_model_len": 1024}
    return Engine(directory, pools, experts, host_expert_bytes=host_bytes, **settings, **more)


def speed(engine: Engine, batches: Sequence[int], tokens: int) -> dict[str, Any]:
    """Return tokens/s by batch and case, cases in turn, the best of three rounds' medians."""
    cases = {"all experts": (0,), "pool of 16": (1,), "4 pools of 16": (1, 2, 3, 4)}
    rows = []
    for num in batches:
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(3):
            for name, rows_of in cases.items():
                asked = [rows_of[i % len(rows_of)] for i in range(num)]
                found[name].append(num / median(engine.decode(asked, tokens)))
        best = {name: max(rates) for name, rates in found.items()}
        rows.append({"batch": num, "tokens_per_second": best})
    return {"part": "speed", "rows": rows}


def loads(engine: Engine, num: int, tokens: int, pairs: int = 4) -> dict[str, Any]:
    """Return gaps of steps with loads back to back and without, and seconds of the loads."""
    # Pool 2's experts go where pool 3's are; row 3 is not used meanwhile.
    copies = [
        (layer, expert, slot)
        for layer, (new, old) in enumerate(zip(engine.pools[2], engine.pools[3], strict=True))
        for expert, slot in zip(new[:-1], old[:-1], strict=True)
    ]
    loader = _Loader(engine, copies)
    for _ in range(2):
        loader.finish(loader.start)  # into pinned memory, and from there
    idle = loader.seconds[-1]
    loader.seconds.clear()
    quiet, loading = list[list[float]](), list[list[float]]()
    for _ in range(pairs):
        quiet.append(engine.decode([1] * num, tokens))
        loading.append(engine.decode([1] * num, tokens, loader.between))
        loader.finish()
    gaps = {"quiet": sum(quiet, []), "loading": sum(loading, [])}
    pair_ratios = [max(b) / max(a) for a, b in zip(quiet, loading, strict=True)]
    return {
        "part": "loads",
        "batch": num,
        "loads": len(loader.seconds),
        "load_seconds": median(loader.seconds),
        "idle_load_seconds": idle,
        "longest_ratio": median(pair_ratios),
        **{
            kind: {
                "steps": len(found),
                "median_ms": 1e3 * median(found),
                "p999_ms": 1e3 * percentile(found, 0.999),
                "longest_ms": 1e3 * max(found),
            }
            for kind, found in gaps.items()
        },
    }


class _Loader:
    """Load one pool again and again, a call between two steps at most."""

    def __init__(self, engine: Engine, copies: Sequence[tuple[int, int, int]]) -> None:
        self._engine, self._copies = engine, [list(copy) for copy in copies]
        self._load, self._began, self._is_under_way = 1, 0.0, False
        self.seconds: list[float] = []

    def start(self) -> None:
        self._load += 1
        self._began, self._is_under_way = time.perf_counter(), True
        self._engine.call("emo_start_load", self._load, self._copies)

    def between(self) -> None:
        """Begin a load if none is under way, else see whether it is done."""
        if not self._is_under_way:
            self.start()
            return
        pool = [list(layer) for layer in self._engine.pools[2]]
        answer = self._engine.call("emo_finish_load", self._load, 2, pool, 1.0)
        assert not answer["failure"], answer
        if answer["state"] == "published":
            self.seconds.append(time.perf_counter() - self._began)
            self._is_under_way = False

    def finish(self, start: Callable[[], None] = lambda: None) -> None:
        """Wait for the load that is under way, or that `start` begins."""
        start()
        while self._is_under_way:
            self.between()


# -- running --


def main() -> None:
    """Measure every part, and append each to results/engine.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="of the random model [4]")
    parser.add_argument("--batches", type=int, nargs="+", default=list(_BATCHES))
    parser.add_argument("--tokens", type=int, default=128, help="per request [128]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="[benchmarks/results]")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what this process replaces holds here only
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    use_python_files()
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch), **ENGINE_ARGUMENTS)


def run(
    args: argparse.Namespace, scratch: Path, sizes: dict[str, int] | None = None, **more: Any
) -> None:
    """Run the parts; `sizes` replace those of the random model, `more` are engine arguments."""

    def record(found: dict[str, Any]) -> None:
        print(found, flush=True)
        append_result("engine", vars(args), found, args.results)

    record(golden(scratch / "golden", **more))
    most = max(args.batches)
    engine = random_engine(scratch / "random", args.layers, sizes or {}, max_num_seqs=most, **more)
    record(speed(engine, args.batches, args.tokens))
    record(loads(engine, min(64, most), args.tokens))
    engine.close()


if __name__ == "__main__":
    main()
