"""What layers of vLLM need when they are built outside an engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM's layers ask for when they are built: a configuration, and a group of one."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel()
        yield
        destroy_model_parallel()
        destroy_distributed_environment()
