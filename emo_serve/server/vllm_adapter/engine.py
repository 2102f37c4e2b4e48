"""vLLM's engine: started with empty expert slots; also the server's own requests to it.

The server's own requests are the warm-up at start and the router probes of `auto` and of builds.
They go to the engine directly, without the HTTP layers, under a lease that the caller holds, and
stand in none of vLLM's figures.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from vllm.inputs import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from emo_serve.errors import EngineDead
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.manager import Lease
from emo_serve.server.vllm_adapter.flags import engine_args, resolved
from emo_serve.server.vllm_adapter.generation import place_in_row, salt_prompt
from emo_serve.server.vllm_adapter.own_figures import leave_out
from emo_serve.vllm_plugin.contract import END_WITH_PARENT_VARIABLE

__all__ = ["OwnRequests", "has_work", "note_steps", "start_engine", "stop_engine"]


def start_engine(args: argparse.Namespace, *, on_every_core: bool) -> AsyncLLM:
    """Start vLLM's engine with flags that `with_engine_values` returned.

    vLLM's workers on a CPU leave a core to the other processes, `on_every_core` they do not. The
    environment variables VLLM_CPU_NUM_OF_RESERVED_CPU and VLLM_CPU_OMP_THREADS_BIND decide first.
    Raises ConfigError for flags that vLLM refuses, and EngineDead if the engine does not start.
    """
    os.environ[END_WITH_PARENT_VARIABLE] = "1"
    # How long workers wait before they are stopped; a drained server need not wait.
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
    if on_every_core:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if args.enforce_eager and current_platform.is_cpu():
        # --enforce-eager still compiles small helpers of vLLM's, e.g. for log-probabilities; on a
        # CPU they need a C++ compiler and 14 s at first use.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    flags, usage = engine_args(args), UsageContext.OPENAI_API_SERVER
    flags.scheduling_policy = "priority"  # builds of pools run behind all other requests
    config = resolved(lambda: flags.create_engine_config(usage_context=usage))

    def start() -> AsyncLLM:
        return AsyncLLM.from_vllm_config(
            vllm_config=config,
            usage_context=usage,
            enable_log_requests=flags.enable_log_requests,
            aggregate_engine_logging=flags.aggregate_engine_logging,
            disable_log_stats=flags.disable_log_stats,
        )

    try:
        return resolved(start)  # its tokenizer is opened in this process, as a flag names it
    except RuntimeError as error:  # its processes have printed the cause
        raise EngineDead("the engine did not start") from error
    except Exception as error:  # the tokenizer's files are read here too
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EngineDead(f"the engine did not start: {reason}") from error


def stop_engine(engine: AsyncLLM) -> None:
    """Kill the engine's processes: by now nobody waits for a result, and the kernel cleans up.

    Asked to end, they take seconds. vLLM warns of each process that it kills; that is not shown.
    """
    for name in ("vllm.v1.utils", "vllm.utils.system_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    engine.shutdown(timeout=0.0)


def note_steps(engine: AsyncLLM, note: Callable[[], None]) -> None:
    """Call `note` for every step whose results the front end gets.

    With vLLM's statistics (the default) that is every step; with --disable-log-stats, those that
    give a token to any request.
    """
    client = engine.engine_core
    get_output = client.get_output_async

    async def get_and_note() -> Any:
        output = await get_output()
        note()
        return output

    client.get_output_async = get_and_note


def has_work(engine: AsyncLLM) -> bool:
    """Tell whether the engine has requests that it has not finished."""
    return bool(engine.output_processor.has_unfinished_requests())


class OwnRequests:
    """Requests of the server itself, in rows of the pool table that the caller has leased."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._numbers = itertools.count(1)
        # No client can guess it, and so keep a request of its own out of the figures.
        self._id_prefix = f"emo-serve-{secrets.token_hex(8)}-"
        leave_out(engine, self._id_prefix)

    async def warm_up(self, pool: ExpertPool, row: int) -> None:
        """Generate one token with log-probabilities, which vLLM compiles at first use.

        Compiling takes one second, or 14 if nothing is cached, and blocks all requests meanwhile.
        Raises EngineDead.
        """
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=1,
            detokenize=False,
            skip_reading_prefix_cache=True,  # which would count the question
        )
        prompt = salt_prompt(tokens_input([0]), pool.content_hash)
        request = (prompt, place_in_row(params, row), f"{self._id_prefix}warm-up")
        try:
            async for _ in self._engine.generate(*request):
                pass
        except EngineDeadError as error:
            raise EngineDead("the engine died in its first step") from error

    async def run_probe(
        self, lease: Lease, token_ids: Sequence[int], mass_slot: int, priority: int
    ) -> None:
        """Run tokens so that the router's mass on them is added to a mass slot; for RouterProbe.

        Skips the prefix cache, because cached tokens are not routed. Raises EngineDead.
        """
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True
        )
        placed = place_in_row(params, lease.row, mass_slot=mass_slot, is_streamed=lease.is_streamed)
        prompt = salt_prompt(tokens_input(list(token_ids)), lease.pool.content_hash)
        request_id = f"{self._id_prefix}probe-{next(self._numbers)}"
        stream = self._engine.generate(prompt, placed, request_id, priority=priority)
        try:
            async with aclosing(stream):
                async for _ in stream:
                    pass
        except EngineDeadError as error:
            raise EngineDead("the engine died during a router probe") from error
