"""Real vLLM engines for the tests, fed with pools the way the front end feeds them.

An engine runs in the test's own process, which starts it in a few seconds, one at a time. With
`own_processes` it has vLLM's usual ones, a core and a worker per rank, as under the server.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from emo_serve.families.opening import open_checkpoint
from emo_serve.vllm_plugin import WORKER_EXTENSION_CLS, worker_cls_for
from emo_serve.vllm_plugin.contract import LOAD_FORMAT, POOL_ROW_ARG, PluginSettings


class PooledEngine:
    """An offline engine with pools by name; rows follow the order of `pools`."""

    def __init__(self, llm: LLM, pools: dict[str, list[list[int]]]) -> None:
        self.llm = llm
        self.rows = {name: row for row, name in enumerate(pools)}
        self._calls = 0
        self._loads = 0

    def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Call every rank; fail unless each says ok and echoes the call id."""
        self._calls += 1
        answers = self.llm.collective_rpc(method, args=(self._calls, *args))
        assert all(a["ok"] and a["call_id"] == self._calls for a in answers), answers
        return answers

    def load(self, copies: Sequence[Sequence[int]], row: int, ids: list[list[int]]) -> None:
        """Copy experts into slots and publish a row that may use them."""
        self.start_load(copies)
        answers = self.finish_load(row, ids)
        assert {answer["state"] for answer in answers} == {"published"}, answers

    def start_load(self, copies: Sequence[Sequence[int]]) -> None:
        """Have every rank begin a load under the next number."""
        self._loads += 1
        self.call("emo_start_load", self._loads, [list(copy) for copy in copies])

    def finish_load(
        self, row: int, ids: list[list[int]], temperature: float = 1.0
    ) -> list[dict[str, Any]]:
        """Poll the last load until no rank is copying; return each rank's last reply."""
        while True:
            answers = self.call("emo_finish_load", self._loads, row, ids, temperature)
            if all(answer["state"] != "loading" for answer in answers):
                return answers
            time.sleep(0.005)

    def params(self, pool: str, **kwargs: Any) -> SamplingParams:
        """Return sampling parameters of a request of `pool`, greedy unless told otherwise."""
        settings = {"temperature": 0.0, "max_tokens": 1, **kwargs}
        return SamplingParams(extra_args={POOL_ROW_ARG: self.rows[pool]}, **settings)

    def prompt_logprobs(self, requests: Sequence[tuple[str, list[int]]]) -> list[list[float]]:
        """Return, for each (pool, prompt), the log-probability of each token after the first."""
        prompts = [{"prompt_token_ids": ids} for _, ids in requests]
        params = [self.params(pool, prompt_logprobs=0) for pool, _ in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            chosen_logprobs(output.prompt_logprobs[1:], ids[1:])
            for output, (_, ids) in zip(outputs, requests, strict=True)
        ]


def chosen_logprobs(entries: Sequence[Any], tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of each token from vLLM's entry for its position."""
    return [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]


@contextmanager
def started_engine(
    directory: Path, *, own_processes: bool = False, **engine_args: Any
) -> Iterator[LLM]:
    """Start a small engine; shut it down on exit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(own_processes)))
        patch.setenv("VLLM_DIST_IDENT", "")  # a worker sets it,
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # and replaces this
        if not own_processes:  # vLLM collects four times, each time all that pytest has imported
            patch.setattr(gc, "collect", lambda generation=2: 0)
        llm = LLM(str(directory), **{**SMALL, **engine_args})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def pooled_engine(
    directory: Path,
    pools: dict[str, list[list[int]]],
    *,
    num_slots: int | None = None,
    moe_backend: str = "auto",
    expert_dtype: str = "auto",
    host_expert_bytes: int = 0,
    is_empty: bool = False,
    stream_slots: int = 0,
    streamed: Collection[str] = (),
    **engine_args: Any,
) -> Iterator[PooledEngine]:
    """Start an engine, put every expert the pools need into a random slot, publish the pools.

    Those that are `streamed` must be too large for the slots. `num_slots` None gives exactly as
    many slots as the largest layer of the others needs. With `is_empty` nothing is loaded, and rows
    exist but are not published.
    """
    facts = open_checkpoint(directory).facts
    experts_of_layer = facts.experts_per_layer
    layers = range(len(experts_of_layer))
    held = [pool for name, pool in pools.items() if name not in streamed]
    wanted = [sorted({e for pool in held for e in pool[i]}) for i in layers]
    num_slots = num_slots or max(1, *(len(experts) for experts in wanted))
    if facts.architecture is not None:
        engine_args = {"hf_overrides": {"architectures": [facts.architecture]}, **engine_args}
    settings = PluginSettings(
        *(num_slots, len(pools), moe_backend, expert_dtype, host_expert_bytes),
        stream_slots=stream_slots,
    )
    with started_engine(
        directory,
        load_format=LOAD_FORMAT,
        worker_cls=worker_cls_for("cpu"),
        worker_extension_cls=WORKER_EXTENSION_CLS,
        additional_config=settings.to_config(),
        **engine_args,
    ) as llm:
        engine = PooledEngine(llm, pools)
        if is_empty:
            yield engine
            return
        rng = random.Random(0)
        copies = []
        for layer, experts in enumerate(wanted):
            slots = rng.sample(range(min(num_slots, experts_of_layer[layer])), len(experts))
            copies += [[layer, e, slot] for e, slot in zip(experts, slots, strict=True)]
        first = next(iter(pools))
        engine.load(copies, engine.rows[first], pools[first])
        for name, experts_kept in pools.items():
            engine.call("emo_publish_pool", engine.rows[name], experts_kept, 1.0)
        yield engine


SMALL: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}
