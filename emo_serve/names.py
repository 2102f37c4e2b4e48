"""Which pool a request asks for: its model name and its `x-emo-pool` header, nothing else.

Pure text to text. Whether a pool of that name exists, and whether it can be served now, is asked
elsewhere; here two requests that mean the same pool get the same string, and contradictions and
malformed headers are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from emo_serve.config import AUTO_POOL, BASE_POOL
from emo_serve.errors import ConfigError, PoolConflict, RequestError

__all__ = ["POOL_HEADER", "UNION", "ModelNames", "canonical_name", "check_chosen"]

POOL_HEADER = "x-emo-pool"
UNION = "+"
_NAME = re.compile(r"[a-z0-9._-]{1,64}(\+[a-z0-9._-]{1,64})*")


def canonical_name(name: str) -> str:
    """Return the one spelling of a union: `b+a+b` is `a+b`; a single pool's name is itself."""
    return UNION.join(sorted(set(name.split(UNION))))


def check_chosen(name: str) -> None:
    """Raise RequestError for `auto`, alone or in a union, where a pool must have been chosen.

    By then a request that generates from a prompt has the chosen pool's name.
    """
    if AUTO_POOL in name.split(UNION):
        raise RequestError(
            f"{AUTO_POOL!r} is no pool: the server chooses one for it, alone and not in a union,"
            " from the text of a prompt to /v1/completions, /v1/chat/completions, /v1/responses or"
            " /v1/messages; elsewhere name a pool"
        )


@dataclass(frozen=True)
class ModelNames:
    """The names of the base model, and the pool meant by a request that gives only one of them."""

    base: tuple[str, ...]
    default_pool: str = BASE_POOL

    def check_free(self, pools: Sequence[str]) -> None:
        """Raise ConfigError when a pool is called like the model, the base pool or `auto`."""
        for name in pools:
            if name in self.base:
                raise ConfigError(
                    f"pool {name!r} has the name of the model; give the model another with"
                    " --served-model-name"
                )
            if name == BASE_POOL:
                raise ConfigError(
                    f"pool name {name!r} is kept for all experts of the model; rename the pool"
                )
            if name == AUTO_POOL:
                raise ConfigError(
                    f"pool name {name!r} is kept for the server's own choice of a pool; rename the"
                    " pool"
                )

    def choose(self, model: str | None, headers: Sequence[str] = ()) -> str:
        """Return the canonical name of the pool asked for, AUTO_POOL where that is to be chosen.

        `model` is the request's model name: the base's, a pool, `base:pool` or a union; None or ""
        is the base's. `headers` are the values of x-emo-pool, usually none or one. Raises
        RequestError for a malformed header, PoolConflict when two of them name different pools.
        """
        named = self._pool_part(model)
        asked = {} if named is None else {canonical_name(named): f"model {model!r}"}
        for value in headers:
            asked.setdefault(canonical_name(_checked_header(value)), f"{POOL_HEADER} {value!r}")
        if len(asked) > 1:
            first, second, *_ = asked.values()
            raise PoolConflict(
                f"{first} and {second} name different pools; name the pool once, in the model"
                f" or in the header beside model {self.base[0]!r}"
            )
        return next(iter(asked), canonical_name(self.default_pool))

    def _pool_part(self, model: str | None) -> str | None:
        if not model or model in self.base:
            return None
        for base in self.base:
            if model.startswith(f"{base}:"):
                return model.removeprefix(f"{base}:")
        return model


def _checked_header(value: str) -> str:
    name = value.strip()
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{POOL_HEADER} is {value!r}; expected a pool's name, 1 to 64 of a-z 0-9 . _ -,"
            f" or several joined with {UNION}"
        )
    return name
