"""What ties the engine's processes and files to the front end."""

from __future__ import annotations

import pytest

from emo_serve.vllm_plugin.contract import END_WITH_PARENT_VARIABLE
from emo_serve.vllm_plugin.orphans import end_with_parent, in_run_directory


def test_ranks_meet_in_the_run_directory_of_our_own_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/run/emo")
    monkeypatch.delenv(END_WITH_PARENT_VARIABLE, raising=False)
    assert in_run_directory("file:///tmp/vllm_dist_1") == "file:///tmp/vllm_dist_1"
    monkeypatch.setenv(END_WITH_PARENT_VARIABLE, "1")
    assert in_run_directory("file:///tmp/vllm_dist_1") == "file:///run/emo/vllm_dist_1"
    assert in_run_directory("tcp://10.0.0.1:1") == "tcp://10.0.0.1:1"


def test_a_process_that_multiprocessing_did_not_start_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(END_WITH_PARENT_VARIABLE, "1")
    end_with_parent()
