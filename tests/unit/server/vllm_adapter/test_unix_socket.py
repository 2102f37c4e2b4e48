"""A Unix socket that a dead server left is replaced; one in use, or any other file, is not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from emo_serve.server.vllm_adapter.openai import _remove_dead_socket

pytestmark = pytest.mark.vllm


def test_a_socket_that_nobody_has_bound_any_more_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    _remove_dead_socket(str(path))
    assert not path.exists()
    _remove_dead_socket(str(path))


@pytest.mark.parametrize("listens", [False, True])
def test_a_socket_in_use_is_left_alone(tmp_path: Path, listens: bool) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        if listens:
            living.listen()
        _remove_dead_socket(str(path))
        assert path.is_socket()


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    _remove_dead_socket(str(path))
    assert path.read_text() == "precious"
