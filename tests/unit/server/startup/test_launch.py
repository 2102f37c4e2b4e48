"""Which keys a server accepts, and which variable the line to try names."""

from __future__ import annotations

import argparse
import io
import logging
from pathlib import Path

import pytest

from emo_serve.config import GIB, ServeSettings
from emo_serve.errors import ConfigError
from emo_serve.server.startup import launch
from emo_serve.server.startup.address import ServerAddress
from emo_serve.server.startup.launch import DefaultModel, Keys, prepare
from emo_serve.server.startup.machine_memory import MemoryLimit
from emo_serve.server.startup.progress import StartProgress
from emo_serve.server.vllm_adapter import engine_sizes
from emo_serve.vllm_plugin import register
from tests.support.golden.checkpoints import write_checkpoint


@pytest.mark.parametrize(
    ("flag", "environment", "admin", "api", "variable"),
    [
        (None, None, (), (), None),
        (None, "from-env", (), ("from-env",), "VLLM_API_KEY"),
        (["from-flag"], None, (), ("from-flag",), "EMO_SERVE_API_KEY"),
        (["from-flag"], "from-env", ("a",), ("from-flag",), "EMO_SERVE_API_KEY"),
        (None, None, ("a",), (), None),
    ],
)
def test_the_line_to_try_names_a_variable_whose_key_opens_the_server(
    monkeypatch: pytest.MonkeyPatch,
    flag: list[str] | None,
    environment: str | None,
    admin: tuple[str, ...],
    api: tuple[str, ...],
    variable: str | None,
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if environment is not None:
        monkeypatch.setenv("VLLM_API_KEY", environment)
    args = argparse.Namespace(
        api_key=flag, host=None, port=1, uds=None, ssl_keyfile=None, ssl_certfile=None
    )
    keys = Keys.read(args, ServeSettings(admin_api_keys=admin))
    assert (keys.api, keys.admin) == (api, admin)
    assert args.api_key == flag  # a namespace is never changed
    assert ServerAddress.of(args, keys.variable).key_variable == variable


@pytest.mark.parametrize("path", ["", "/no/such/directory", __file__])
def test_a_place_where_no_counter_can_be_kept_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", path)
    default = DefaultModel("m", tmp_path, tmp_path, {})
    with pytest.raises(ConfigError, match=f"PROMETHEUS_MULTIPROC_DIR is '{path}'; expected a dir"):
        prepare([], default, StartProgress(io.StringIO()))


@pytest.mark.parametrize(
    ("flags", "free", "kv_bytes", "warns"),
    [
        ((), 9 * GIB, None, False),
        (("--kv-cache-memory-bytes", "64M"), 9 * GIB, 64 * 2**20, False),
        (("--kv-cache-memory-bytes", "64M", "--expert-slots", "32"), GIB, 64 * 2**20, True),
    ],
)
def test_the_engine_gets_the_cache_that_was_planned(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    flags: tuple[str, ...],
    free: int,
    kv_bytes: int | None,
    warns: bool,
) -> None:
    register()
    monkeypatch.setattr(engine_sizes.current_platform, "device_type", "cpu")
    monkeypatch.setattr(engine_sizes.current_platform, "is_cpu", lambda: True)
    monkeypatch.setattr(launch, "read_limits", lambda nodes: (MemoryLimit("test", free),))
    model = write_checkpoint("shared1", tmp_path / "shared1")
    with caplog.at_level(logging.WARNING, "emo_serve"):
        ready = prepare(
            [str(model), *flags], DefaultModel("m", model, model, {}), StartProgress(io.StringIO())
        )
    assert ready.plan.memory is not None
    assert ready.args.kv_cache_memory_bytes == ready.plan.memory.kv_bytes
    assert kv_bytes in (None, ready.args.kv_cache_memory_bytes)
    assert ("these flags take more memory than there is: trunk" in caplog.text) == warns
