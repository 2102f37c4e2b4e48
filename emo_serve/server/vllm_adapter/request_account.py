"""What one engine request used, in tokens and time, for metrics and the request log."""

from __future__ import annotations

import time
from typing import Any

from emo_serve.server.vllm_adapter.request_log import RequestRecord

__all__ = ["RequestAccount"]


class RequestAccount:
    """Count the tokens and times of one request from its admission on.

    Outputs are vLLM's RequestOutput: with `is_delta` each has only new tokens, otherwise all tokens
    so far.
    """

    def __init__(self, pool: str, *, is_delta: bool) -> None:
        self.prompt_tokens = 0
        self._pool = pool
        self._is_delta = is_delta
        self._tokens_of: dict[int, int] = {}  # by index of the completion
        self._is_hit = False
        self._arrived_at = time.time()  # Unix time, for the log alone
        self._start = time.monotonic()
        self._granted: float | None = None

    @property
    def generation_tokens(self) -> int:
        """Return the tokens generated so far, of all completions."""
        return sum(self._tokens_of.values())

    @property
    def wait_seconds(self) -> float:
        """Return how long the request waited for its pool, or has waited so far."""
        return (time.monotonic() if self._granted is None else self._granted) - self._start

    def note_granted(self, *, is_hit: bool) -> None:
        """Note that the pool is leased now; `is_hit` if it needed no load."""
        self._granted, self._is_hit = time.monotonic(), is_hit

    def add(self, output: Any) -> None:
        """Count the tokens of one output."""
        self.prompt_tokens = len(output.prompt_token_ids or ())
        for completion in output.outputs:
            before = self._tokens_of.get(completion.index, 0) if self._is_delta else 0
            self._tokens_of[completion.index] = before + len(completion.token_ids)

    def record(self, outcome: str) -> RequestRecord:
        """Return the record of a request that ends now."""
        now = time.monotonic()
        granted = now if self._granted is None else self._granted
        return RequestRecord(
            at_seconds=self._arrived_at,
            pool=self._pool,
            wait_seconds=granted - self._start,
            service_seconds=now - granted,
            is_hit=self._is_hit,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            outcome=outcome,
        )
