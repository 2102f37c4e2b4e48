"""An engine and its workers on a CPU wait for each other asleep, not in a loop.

vLLM's processes read from shared memory in a loop until nothing has come for a second. On a CPU the
engine so burns a core for as long as its worker computes, and where that core is the other half of
the worker's, as in most virtual machines, the model runs at little more than half its speed.
"""

from __future__ import annotations

import os
from typing import Any

from emo_serve.vllm_plugin.contract import END_WITH_PARENT_VARIABLE

__all__ = ["spin_briefly"]

_SPIN_SECONDS = 0.002
"""A step of the small model is shorter: waking up, some 0.1 ms, would be felt in it."""


def spin_briefly() -> None:
    """Have this process's readers sleep after a short loop, if a front end of ours started it.

    Only on a CPU: with a GPU the loop takes nothing from the model.
    """
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if END_WITH_PARENT_VARIABLE not in os.environ or not current_platform.is_cpu():
        return
    if shm_broadcast.SpinCondition.__name__ == "BriefSpin":
        return

    class BriefSpin(shm_broadcast.SpinCondition):
        """Waits for a notification when nothing has come for _SPIN_SECONDS."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.is_reader:
                self.busy_loop_s = _SPIN_SECONDS

        def notify(self) -> None:
            # The queue of notifications holds one. ZeroMQ drops another while it has not taken
            # note that the last one left, of which it otherwise takes note once in a millisecond
            # or so. A reader that sleeps would then sleep until it looks again, in 5 s.
            self.local_notify_socket.getsockopt(shm_broadcast.zmq.EVENTS)
            super().notify()

    shm_broadcast.SpinCondition = BriefSpin
