"""What Ray's processes must find in their environment, wherever they are started."""

from __future__ import annotations

import os
import secrets

__all__ = ["VARIABLES", "prepare_environment"]

VARIABLES = {
    # our layer in the proxies, without which the router does not know what requests ask for
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "emo_serve.ray_cluster.proxy.middlewares",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""The variables of every process of Ray's, where `ray start` or KubeRay starts them."""

_ON_THIS_MACHINE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system: Ray listens on loopback only
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's own lines go to its files
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def prepare_environment(*, is_alone: bool) -> None:
    """Set the variables of this process, and of a Ray that it starts; before Ray is imported.

    With `is_alone`, that Ray is of this machine alone.
    """
    os.environ.update(VARIABLES)
    if is_alone:
        for name, value in _ON_THIS_MACHINE.items():
            os.environ.setdefault(name, value)
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            # Each replica has a port of Ray's on every interface; only this Ray may use it.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
