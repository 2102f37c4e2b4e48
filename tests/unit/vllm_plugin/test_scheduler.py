"""Steps of their own for streamed requests: whose turn it is, and what vLLM's scheduler sees."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from emo_serve.vllm_plugin.contract import STREAMED_ARG
from emo_serve.vllm_plugin.scheduler import Turns, TurnScheduler

STREAMED, OTHERS = True, False


def test_streaming_gets_its_share_of_the_time() -> None:
    turns, spent = Turns(stream_share=0.2), {STREAMED: 0.0, OTHERS: 0.0}
    seconds = {STREAMED: 0.5, OTHERS: 0.03}
    for _ in range(5000):
        turn = turns.is_streamed_next()
        spent[turn] += seconds[turn]
        turns.note(seconds[turn], is_streamed=turn, is_empty=False)
    assert spent[STREAMED] / sum(spent.values()) == pytest.approx(0.2, rel=0.02)


def test_who_cannot_run_leaves_the_turn_to_the_others() -> None:
    turns = Turns()
    assert turns.is_streamed_next()
    turns.note(0.0, is_streamed=STREAMED, is_empty=True)
    assert not turns.is_streamed_next()
    turns.note(1.0, is_streamed=OTHERS, is_empty=False)
    assert turns.is_streamed_next()
    turns.note(9.0, is_streamed=STREAMED, is_empty=False)
    assert not turns.is_streamed_next()
    turns.note(0.0, is_streamed=OTHERS, is_empty=True)
    assert turns.is_streamed_next()


class Steps:
    """A TurnScheduler over a vLLM scheduler that runs whatever it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.step = 0.0, 0
        self.made = TurnScheduler.__new__(TurnScheduler)
        monkeypatch.setattr(Scheduler, "__init__", lambda made: None)
        monkeypatch.setattr(Scheduler, "add_request", lambda made, request: None)
        monkeypatch.setattr(Scheduler, "schedule", lambda made: self._schedule())
        monkeypatch.setattr(Scheduler, "update_from_output", lambda made, output, results: None)
        monkeypatch.setattr(
            Scheduler, "_handle_blocked_waiting_request", lambda made, request: True
        )
        monkeypatch.setattr(TurnScheduler, "_clock", lambda made: self.now)
        TurnScheduler.__init__(self.made)
        self.made.requests, self.made.running, self.waiting = {}, [], []

    def add(self, name: str, *, is_streamed: bool, is_running: bool = True) -> None:
        params = SimpleNamespace(extra_args={STREAMED_ARG: is_streamed})
        request: Any = SimpleNamespace(
            request_id=name, sampling_params=params, next_decode_eligible_step=0
        )
        self.made.add_request(request)
        self.made.requests[name] = request
        (self.made.running if is_running else self.waiting).append(request)

    def end(self, name: str) -> None:
        self.made.running.remove(self.made.requests.pop(name))

    def _schedule(self) -> list[str]:
        self.step += 1
        running = [one for one in self.made.running if one.next_decode_eligible_step <= self.step]
        begun = [one for one in self.waiting if self.made._handle_blocked_waiting_request(one)]
        self.waiting = [one for one in self.waiting if one not in begun]
        self.made.running += begun
        return [one.request_id for one in (*running, *begun)]

    def take(self, seconds: float) -> list[str]:
        ran: list[str] = self.made.schedule()
        self.now += seconds
        output = SimpleNamespace(total_num_scheduled_tokens=len(ran))
        self.made.update_from_output(output, None)
        return ran


def test_a_step_has_requests_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.add("a", is_streamed=False)
    assert steps.take(0.125) == ["a"]
    steps.add("s", is_streamed=True, is_running=False)
    steps.add("b", is_streamed=False, is_running=False)
    assert steps.take(0.25) == ["s"]
    assert [steps.take(0.125) for _ in range(8)] == [["a", "b"]] * 8  # four times as long
    assert steps.take(0.25) == ["s"]
    steps.end("s")
    assert steps.take(0.125) == ["a", "b"]


def test_alone_streamed_requests_need_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.add("s", is_streamed=True)
    steps.add("t", is_streamed=True)
    assert [steps.take(9.0) for _ in range(3)] == [["s", "t"]] * 3
    steps.add("a", is_streamed=False)
    steps.take(9.0)
    assert steps.take(0.1) == ["a"]
    steps.end("a")
    assert steps.take(0.1) == ["s", "t"]


def test_vllm_asks_where_we_answer() -> None:
    source = inspect.getsource(Scheduler.schedule)
    assert "if self.current_step < request.next_decode_eligible_step:" in source
    assert "ready_to_schedule = self._handle_blocked_waiting_request(request)" in source
    assert source.index("next_decode_eligible_step") < source.index("allocate_slots(")
