"""Every error emo-serve raises on purpose, named by its cause.

    EmoServeError
      ConfigError               a flag, an environment or a model field the server cannot start with
        CheckpointError         weights that are missing, truncated or of another shape
      PoolFileError             a pool file that cannot be read or does not fit the model
      RequestError              the client must change the request (HTTP 400)
        UnknownPool             no pool of that name (HTTP 404)
        PoolConflict            two parts of one request name different pools
        PoolTooLarge            the slab can never hold this pool
      Unavailable               the same request may succeed later (HTTP 503)
        PoolNotResident         known, but its experts are not in device memory
        NoFreePoolRow           every row of the pool table belongs to a pool in use
        Draining                the server is shutting down
      EngineDead                the engine process is gone or a worker call failed (HTTP 500)

Messages name the value, the limit and the remedy; `server.vllm_openai` owns the one table from
these classes to HTTP statuses.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Draining",
    "EmoServeError",
    "EngineDead",
    "NoFreePoolRow",
    "PoolConflict",
    "PoolFileError",
    "PoolNotResident",
    "PoolTooLarge",
    "RequestError",
    "Unavailable",
    "UnknownPool",
]


class EmoServeError(Exception):
    """Root of every error raised on purpose."""


class ConfigError(EmoServeError):
    """Refuse to start: a setting or a model field makes no sense."""


class CheckpointError(ConfigError):
    """Refuse a checkpoint whose tensors are missing, truncated or of another shape."""


class PoolFileError(EmoServeError):
    """Refuse one pool file; the other pools are served."""


class RequestError(EmoServeError):
    """Refuse a request that can only succeed when the client changes it."""


class UnknownPool(RequestError):
    """Refuse a pool name nobody has defined."""


class PoolConflict(RequestError):
    """Refuse a request whose model name and header disagree on the pool."""


class PoolTooLarge(RequestError):
    """Refuse a pool that needs more slots than the slab has."""


class Unavailable(EmoServeError):
    """Refuse a request that may succeed later, unchanged."""


class PoolNotResident(Unavailable):
    """Refuse a pool whose experts are not all in device memory."""


class NoFreePoolRow(Unavailable):
    """Refuse a new union while every row of the pool table is in use."""


class Draining(Unavailable):
    """Refuse new work during shutdown."""


class EngineDead(EmoServeError):
    """Report that the engine cannot answer any more."""
