"""An engine client that places every request in a pool: the one hook of all generating routes.

Chat, completions, responses, messages and beam search all call `generate` of the engine client.
Ours is a plain function: it finds the pool and raises errors while an HTTP status can still be
sent. Then it starts a task that waits for the pool and runs the request, and returns a generator of
the request's outputs. The task holds the lease, so the lease lasts as long as the engine works, not
as long as the client reads. The task also tells admission when a stream may begin.
"""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineGenerateError
from vllm.v1.engine.output_processor import RequestOutputCollector

from emo_serve.errors import EmoServeError, RequestError, TooManyQueued
from emo_serve.metrics import PoolMetrics
from emo_serve.pools.pool import ExpertPool
from emo_serve.residency.backlog import Place
from emo_serve.server.asgi.context import EngineRequest, RequestContext, current_request
from emo_serve.server.asgi.errors import reason_of, retry_after_of, status_of
from emo_serve.server.coverage import CoverageSum
from emo_serve.server.pool_admin.residency import NamedResidency
from emo_serve.server.vllm_adapter.coverage import CoverageBook
from emo_serve.server.vllm_adapter.request_account import RequestAccount
from emo_serve.server.vllm_adapter.request_faults import (
    as_ours,
    check_grammar,
    outputs_of,
    refused_value,
)
from emo_serve.server.vllm_adapter.request_log import RequestLog
from emo_serve.server.vllm_adapter.spans import RequestSpans
from emo_serve.server.vllm_adapter.tokenization import check_bad_words
from emo_serve.vllm_plugin.contract import NO_ACCOUNT, NO_MASS_SLOT, STREAMED_ARG, RequestTag

__all__ = ["PooledLLM", "place_in_row", "salt_prompt", "to_http_error"]


def to_http_error(error: EmoServeError, param: str | None = "model") -> Exception:
    """Return the vLLM exception whose handler answers with our error's status and message.

    `param` is the request field that a 400 names. For a 503, the seconds to wait are left in the
    request's context, and admission sends them as Retry-After.
    """
    current_request().retry_after_seconds = retry_after_of(error)
    return _as_http_error(error, param)


def _as_http_error(error: EmoServeError, param: str | None) -> Exception:
    status = status_of(error)
    raised: Exception
    if status == HTTPStatus.NOT_FOUND:
        raised = VLLMNotFoundError(str(error))
    elif status == HTTPStatus.BAD_REQUEST:
        raised = VLLMValidationError(str(error), parameter=param)
    else:
        raised = GracefulHTTPError(str(error), status)
    raised.__cause__ = error  # by which answers and logs know it for ours
    return raised


class _Reader(NamedTuple):
    """What the reader of a request's outputs waits for, and the HTTP request that it answers."""

    collector: RequestOutputCollector
    admission: asyncio.Future[EmoServeError | None]
    context: RequestContext


class PooledLLM:
    """The engine client that vLLM's serving layer calls; it places every request in a pool.

    It wraps a running engine: `generate` and `encode` are ours, everything else is the engine's.
    With `honours_priority`, the client's priority counts; otherwise all requests have the same.
    `max_sequences` bounds the `n` of one request: the engine's batch.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        residency: NamedResidency,
        metrics: PoolMetrics,
        coverage: CoverageBook | None = None,
        request_log: RequestLog | None = None,
        spans: RequestSpans | None = None,
        *,
        honours_priority: bool = False,
        max_sequences: int | None = None,
    ) -> None:
        self._engine, self._max_sequences = engine, max_sequences
        self._residency, self._metrics, self._request_log = residency, metrics, request_log
        self._coverage, self._honours_priority = coverage, honours_priority
        self._spans = spans
        self._running: dict[asyncio.Task[None], _Reader] = {}  # asyncio keeps weak references
        self._reports: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        """Return the engine's attribute: configuration, renderer, state, abort, statistics."""
        return getattr(self._engine, name)

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Find the pool, start the request, and return a generator of its outputs.

        `lora_request` carries the model name that the client sent, and never reaches the engine.
        Raises vLLM's exceptions for HTTP statuses at once if the pool cannot be had; while
        iterating, the generator raises later errors.
        """
        check_bad_words(sampling_params)
        model = None if lora_request is None else lora_request.lora_name
        context = current_request()
        pool, place = self._admit(model, sampling_params.n, context)
        try:
            salted = salt_prompt(prompt, pool.content_hash)
        except BaseException:
            place.release()
            raise
        if not self._honours_priority:
            options["priority"] = 0
        context.pool_names.append(pool.name)
        admission = context.admission()
        covered: asyncio.Future[CoverageSum | None] | None = None
        if context.wants_coverage:
            covered = asyncio.get_running_loop().create_future()
            context.coverages.append(covered)
        account = self._open_account(pool, request_id)
        collector = RequestOutputCollector(sampling_params.output_kind, request_id)
        request = (salted, sampling_params, request_id, options)
        pump = asyncio.create_task(
            self._pump(collector, context, admission, account, pool, *request)
        )
        self._running[pump] = _Reader(collector, admission, context)
        running = EngineRequest(pump, sampling_params.n)
        context.running.add(running)
        pump.add_done_callback(lambda _: context.running.discard(running))
        pump.add_done_callback(lambda _: place.release())
        pump.add_done_callback(partial(self._settle, request_id, account, covered))
        stream = _collected(collector, running)
        # A generator never iterated runs no `finally`. The end of the HTTP request cancels its
        # pump; this does so where there is no such request.
        weakref.finalize(stream, pump.cancel).atexit = False
        return stream

    def cut(self, error: EmoServeError) -> None:
        """End every request now: a waiting one with the error's status, a stream with its event."""
        for pump, reader in list(self._running.items()):
            reader.context.cut_by = error
            reader.context.retry_after_seconds = retry_after_of(error)
            reader.collector.put(_as_http_error(error, None))
            if not reader.admission.done():
                reader.admission.set_result(error)
            pump.cancel()

    def encode(self, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        """Refuse pooling requests, which would not be placed in a pool."""
        raise VLLMValidationError(
            "this server generates text only; it does not serve pooling requests"
        )

    def _open_account(self, pool: ExpertPool, request_id: str) -> int:
        """Open the request's account of coverage, whose final sum its spans get, if there are any.

        Without accounts return NO_ACCOUNT.
        """
        if self._coverage is None:
            return NO_ACCOUNT
        if self._spans is None:
            return self._coverage.open(pool.name)
        return self._coverage.open(pool.name, partial(self._spans.settle, request_id))

    def _admit(
        self, model: str | None, num_sequences: int, context: RequestContext
    ) -> tuple[ExpertPool, Place]:
        """Find the pool and count the request as admitted; raises vLLM's exceptions."""
        param = "model"
        try:
            pool = self._residency.admit(
                model,
                context.pool_headers,
                least=context.min_experts,
                begun=context.begun,
                temperature=context.router_temperature,
            )
            param = "n"
            return pool, self._enter(pool, num_sequences, context)
        except EmoServeError as error:
            self._metrics.count_refusal(reason_of(error))
            context.admission().set_result(error)  # for an answer that has begun before
            raise to_http_error(error, param) from error

    def _enter(self, pool: ExpertPool, num_sequences: int, context: RequestContext) -> Place:
        """Take a place among the admitted; raises RequestError for what could never be admitted."""
        limit = self._max_sequences
        if limit is not None and num_sequences > limit:
            raise RequestError(
                f"n is {num_sequences}, and the engine runs at most {limit} completions at once"
                " (--max-num-seqs); send several requests with a smaller n"
            )
        together = context.num_sequences + num_sequences
        is_continued = context.is_under_way and (limit is None or together <= limit)
        try:
            return self._residency.enter(pool, num_sequences, is_continued=is_continued)
        except TooManyQueued as error:
            limits = self._residency.limits
            if limits is None or together <= limits.max_alone:
                raise
            raise RequestError(
                f"the request asks for {together} completions or more at once (prompts times n),"
                f" and a pool may have at most {limits.max_alone} running and queued; send several"
                " requests, or raise --max-queued"
            ) from error

    async def _pump(
        self,
        collector: RequestOutputCollector,
        context: RequestContext,
        admission: asyncio.Future[EmoServeError | None],
        number: int,
        pool: ExpertPool,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        options: Mapping[str, Any],
    ) -> None:
        """Hold the lease while the engine works; pass errors to the reader, abort if cancelled."""
        metrics = self._metrics
        account = RequestAccount(pool.name, is_delta=params.output_kind == RequestOutputKind.DELTA)
        outcome, param = "failed", "model"

        def on_taken() -> None:
            if params.structured_outputs is None:  # else the first output tells
                admission.set_result(None)

        try:
            async with self._residency.lease(pool) as lease:
                account.note_granted(is_hit=lease.is_hit)
                if self._spans is not None:
                    waited = account.wait_seconds
                    self._spans.note(
                        request_id, pool.name, is_hit=lease.is_hit, wait_seconds=waited
                    )
                placed = place_in_row(
                    params, lease.row, account=number, is_streamed=lease.is_streamed
                )
                stream = outputs_of(self._engine, on_taken, prompt, placed, request_id, **options)
                async with aclosing(stream):  # an abort is sent before the lease ends
                    async for output in stream:
                        if not admission.done():
                            param = "structured_outputs"
                            check_grammar(output)
                            admission.set_result(None)
                        account.add(output)
                        collector.put(output)
                        if output.finished:
                            outcome, context.is_under_way = "finished", True
            if outcome != "finished":
                collector.put(EngineGenerateError("the engine ended the request without a result"))
        except asyncio.CancelledError:
            outcome = outcome if outcome == "finished" else "aborted"
            raise
        except EmoServeError as refused:
            metrics.count_refusal(reason_of(refused))
            collector.put(to_http_error(refused, param))
            if not admission.done():
                admission.set_result(refused)
        except Exception as raised:
            error = refused_value(raised) or raised
            collector.put(error)
            if not admission.done():
                admission.set_result(as_ours(error))
        finally:
            metrics.count_request(pool.name, outcome)
            metrics.observe_experts(pool.name, pool.experts_per_layer)
            metrics.count_tokens(pool.name, account.prompt_tokens, account.generation_tokens)
            if self._request_log is not None:
                self._request_log.append(account.record(outcome))

    def _settle(
        self,
        request_id: str,
        account: int,
        covered: asyncio.Future[CoverageSum | None] | None,
        pump: asyncio.Task[None],
    ) -> None:
        """Resolve the futures of a request that has ended, even if it was never started."""
        admission = self._running.pop(pump).admission
        if not admission.done():
            admission.set_result(None)
        if covered is not None:
            reading = asyncio.create_task(self._report(account, covered))
            self._reports.add(reading)
            reading.add_done_callback(self._reports.discard)
        elif self._coverage is not None:
            self._coverage.close(account)
        elif self._spans is not None:
            self._spans.settle(request_id, None)

    async def _report(self, account: int, covered: asyncio.Future[CoverageSum | None]) -> None:
        found: CoverageSum | None = None
        try:
            if self._coverage is not None:
                found = await self._coverage.result(account)
        finally:
            covered.set_result(found)


# For the one route that asks for the class: vLLM's /abort_requests, in its development mode.
AsyncLLM.register(PooledLLM)


async def _collected(
    collector: RequestOutputCollector, request: EngineRequest
) -> AsyncGenerator[RequestOutput, None]:
    """Yield what the pump collects; for a slow reader outputs are merged, never dropped."""
    is_finished = False
    try:
        while not is_finished:
            request.reader = asyncio.current_task()
            output = collector.get_nowait() or await collector.get()
            is_finished = output.finished
            yield output
    finally:
        request.task.cancel()


def salt_prompt(prompt: Any, content_hash: str) -> dict[str, Any]:
    """Return a copy of a prompt that shares prefix cache entries only within the pool.

    The new salt contains the client's own. The hash has a fixed length, so different pairs of hash
    and client salt give different salts. Raises VLLMValidationError for prompts that take no salt.
    """
    if not isinstance(prompt, dict):
        raise VLLMValidationError(
            f"prompts of type {type(prompt).__name__} cannot be placed in a pool"
        )
    return {**prompt, "cache_salt": f"emo:{content_hash}:{prompt.get('cache_salt') or ''}"}


def place_in_row(
    params: SamplingParams,
    row: int,
    *,
    account: int = NO_ACCOUNT,
    mass_slot: int = NO_MASS_SLOT,
    is_streamed: bool = False,
) -> SamplingParams:
    """Return a copy whose tokens route in `row` of the pool table.

    Replaces tags that a client may have sent; the original is shared with other requests.
    """
    placed = copy.copy(params)
    tag = RequestTag(row, account, mass_slot)
    ours = {**tag.to_extra_args(), STREAMED_ARG: is_streamed}
    placed.extra_args = {**(params.extra_args or {}), **ours}
    return placed
