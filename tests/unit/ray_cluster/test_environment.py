"""What Ray's processes find in their environment."""

from __future__ import annotations

import os

import pytest

from emo_serve.ray_cluster.environment import VARIABLES, prepare_environment


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {"PATH": "/bin"}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_a_ray_of_its_own_is_for_this_machine_and_this_start(environ: dict[str, str]) -> None:
    prepare_environment(is_alone=True)
    assert VARIABLES.items() <= environ.items()
    assert environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert environ["RAY_AUTH_MODE"] == "token"
    assert len(environ["RAY_AUTH_TOKEN"]) == 64


def test_a_ray_that_runs_keeps_its_ways(environ: dict[str, str]) -> None:
    prepare_environment(is_alone=False)
    assert VARIABLES.items() <= environ.items()
    assert not {"RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"} & environ.keys()


def test_what_the_user_says_counts(environ: dict[str, str]) -> None:
    environ["RAY_AUTH_MODE"] = "disabled"
    prepare_environment(is_alone=True)
    assert "RAY_AUTH_TOKEN" not in environ
