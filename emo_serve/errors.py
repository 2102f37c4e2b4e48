"""Every error emo-serve raises on purpose, named by its cause.

    EmoServeError
      ConfigError               a flag, an environment or a model field the server cannot start with
        CheckpointError         weights that are missing, truncated or of another shape
      PoolFileError             a pool file that cannot be read or does not fit the model
      RequestError              the client must change the request (HTTP 400)
        UnknownPool             no pool of that name (HTTP 404)
        PoolConflict            two parts of one request name different pools
        PoolTooLarge            the slab can never hold this pool
      StateConflict             the server's state does not allow the request now (HTTP 409)
        PoolExists              a pool of that name is defined already
        PoolInUse               running requests, a load or a pin keep the pool resident
      Unavailable               the same request may succeed later (HTTP 503)
        PoolBlocked             pinned pools leave too few slots or rows
        TooManyWaiting          the queue of requests waiting for loads is full
        TooManyQueued           too many requests run or wait, of this pool or of all
        LoadDeadlineExceeded    the pool was not loaded in time
        Draining                the server is shutting down
      PoolLoadFailed            one pool's experts could not be read (HTTP 500); the server goes on
      PoolStoreError            the directory of pool files cannot be written (HTTP 500)
      EngineDead                the engine process is gone or a worker call failed (HTTP 500)

Messages name the value, the limit and the remedy; `server.asgi.errors` owns the one table from
these classes to HTTP statuses.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Draining",
    "EmoServeError",
    "EngineDead",
    "LoadDeadlineExceeded",
    "PoolBlocked",
    "PoolConflict",
    "PoolExists",
    "PoolFileError",
    "PoolInUse",
    "PoolLoadFailed",
    "PoolStoreError",
    "PoolTooLarge",
    "RequestError",
    "StateConflict",
    "TooManyQueued",
    "TooManyWaiting",
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


class StateConflict(EmoServeError):
    """Refuse what the state of the pools does not allow now; the operator must change that."""


class PoolExists(StateConflict):
    """Refuse to define a pool twice without being told to replace it."""


class PoolInUse(StateConflict):
    """Refuse to evict a pool that is leased, loading or pinned."""


class Unavailable(EmoServeError):
    """Refuse a request that may succeed later, unchanged, after about `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class PoolBlocked(Unavailable):
    """Refuse a pool that does not fit beside the pinned ones."""


class TooManyWaiting(Unavailable):
    """Refuse a request that would make the line of waiting requests too long."""


class TooManyQueued(Unavailable):
    """Refuse a request beyond what the engine can run and queue, or beyond its pool's share."""


class LoadDeadlineExceeded(Unavailable):
    """Give up on a request whose pool was not loaded in time."""


class Draining(Unavailable):
    """Refuse new work during shutdown.

    A retry soon is right: it opens a new connection, which reaches another server if there is one.
    When this server is back is not known here.
    """


class PoolLoadFailed(EmoServeError):
    """Report that one pool's experts cannot be read; other pools are served."""


class PoolStoreError(EmoServeError):
    """Report that a pool file cannot be written or removed; nothing has changed."""


class EngineDead(EmoServeError):
    """Report that the engine cannot answer any more."""
