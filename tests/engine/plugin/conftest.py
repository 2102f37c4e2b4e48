"""The checkpoint of the golden values, and the reference model on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from emo_serve.emo.checkpoint import load_model
from emo_serve.emo.model import EmoForCausalLM
from tests.support.golden.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def shared1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("shared1", tmp_path_factory.mktemp("shared1"))


@pytest.fixture(scope="session")
def reference(shared1: Path) -> EmoForCausalLM:
    return load_model(shared1)
