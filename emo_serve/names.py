"""The grammar of model names, and which pool a request asks for.

    base                a name of the base model, e.g. `emo` or `allenai/Emo_1b14b_1T`
    pool                a pool: 1 to 64 of a-z 0-9 . _ -, the first no dot
    pool@8              the pool with its 8 best experts per layer
    a+b, a@8+b@4        the union of pools, each perhaps with a size
    base:pool, base:a+b the same, for clients that expect the model's name first
    auto                the server chooses the pool
    x-emo-pool: a+b     the header; names the pool, or repeats the one that the model name names

Only text is read here. Whether a pool of that name exists and can be served now is decided
elsewhere. Two requests that mean the same pool get the same string; contradictions and malformed
headers are refused.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

from emo_serve.errors import ConfigError, PoolConflict, PoolFileError, RequestError

__all__ = [
    "AUTO_POOL",
    "BASE_POOL",
    "FILE_NAME_RULE",
    "NAME_PATTERN",
    "NAME_RULE",
    "POOL_HEADER",
    "REQUEST_RULE",
    "SIZE",
    "UNION",
    "ModelNames",
    "canonical_name",
    "check_chosen",
    "check_pool_name",
    "is_derived",
    "is_pool_name",
    "is_pool_or_union",
    "is_sized",
    "is_union",
    "join_names",
    "pools_of",
    "sized_name",
    "split_name",
    "split_size",
    "with_size",
]

BASE_POOL = "base"
"""The name of the base pool; no pool file may carry it."""

AUTO_POOL = "auto"
"""The name by which clients leave the choice of a pool to the server."""

UNION = "+"
SIZE = "@"
POOL_HEADER = "x-emo-pool"

NAME_PATTERN = r"^[a-z0-9_-][a-z0-9._-]{0,63}$"
"""The name of one pool, as a regular expression for Python and for JSON schemas.

None begins with a dot: clients take `/v1/pools/..` for another path, and its file would be hidden.
"""

NAME_RULE = "1 to 64 of a-z 0-9 . _ -, the first no dot"
"""`NAME_PATTERN` in words."""

FILE_NAME_RULE = (
    f"{NAME_RULE} ({UNION!r} is reserved for unions, {SIZE!r} for sizes, ':' for base:pool)"
)
"""The same for people who name a pool, and what the other signs are for."""

REQUEST_RULE = (
    f"{NAME_RULE}; it may end in a size, as in math{SIZE}8, and several may be joined with {UNION}"
)
"""What a request may name, in words."""

_SIZE_PATTERN = r"[1-9][0-9]{0,4}"
_ORDERED = 3  # pools of a union

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80


# -- names of pools, sizes and unions --


def is_pool_name(name: str) -> bool:
    """Tell whether `name` can be the name of one pool."""
    return re.fullmatch(NAME_PATTERN, name) is not None


def is_pool_or_union(name: str) -> bool:
    """Tell whether `name` can be a pool, or pools joined with `+`, each perhaps with a size."""
    return all(is_pool_name(split_size(part)[0]) for part in name.split(UNION))


def is_union(name: str) -> bool:
    """Tell whether `name` joins several names, whatever they are."""
    return UNION in name


def is_sized(name: str) -> bool:
    """Tell whether `name` is one pool at a size."""
    return not is_union(name) and split_size(name)[1] is not None


def is_derived(name: str) -> bool:
    """Tell whether `name` is a union or a size: what is made of pools, and defined by no file."""
    return is_union(name) or is_sized(name)


def split_size(part: str) -> tuple[str, int | None]:
    """Return the pool and the size that one part of a name gives: `math@8` is ("math", 8).

    A size has one spelling, without sign and leading zeros; `math@08` is returned whole.
    """
    pool, sign, size = part.rpartition(SIZE)
    if sign and re.fullmatch(_SIZE_PATTERN, size):
        return pool, int(size)
    return part, None


def sized_name(pool: str, size: int) -> str:
    """Return the name of a pool at a size."""
    return f"{pool}{SIZE}{size}"


def pools_of(name: str) -> tuple[str, ...]:
    """Return the pools that a name is made of, without their sizes, each once."""
    return tuple(dict.fromkeys(split_size(part)[0] for part in split_name(name)))


def with_size(name: str, size: int) -> str:
    """Return the name of the same pools at one size; raises RequestError if one has a size."""
    for part in split_name(name):
        if split_size(part)[1] is not None:
            raise RequestError(
                f"{part!r} has a size already, and experts={size} gives another; give one of them"
            )
    return join_names(sized_name(part, size) for part in split_name(name))


def split_name(name: str) -> tuple[str, ...]:
    """Return the names that a union joins, each once, as ordered in it; a pool gives its own."""
    return tuple(dict.fromkeys(name.split(UNION)))


def join_names(names: Iterable[str]) -> str:
    """Return the one spelling of a union of these pools: each once, sorted."""
    return UNION.join(sorted(set(names)))


def canonical_name(name: str) -> str:
    """Return the one spelling of a union: `b+a+b` is `a+b`; a single pool's name is itself."""
    return join_names(split_name(name))


def check_pool_name(source: str, name: object) -> str:
    """Return a name that a pool file may carry; PoolFileError names `source`, value and rule."""
    if isinstance(name, str) and is_pool_name(name):
        return name
    raise PoolFileError(f"{source}: name is {_shown.repr(name)}; expected {FILE_NAME_RULE}")


# -- what a request asks for --


def check_chosen(name: str) -> None:
    """Raise RequestError for `auto`, alone or in a union, where a pool must have been chosen.

    By then a request that generates from a prompt has the chosen pool's name.
    """
    if AUTO_POOL in pools_of(name) and is_sized(name):
        raise RequestError(
            f"{name!r} is no pool: the server chooses the pool for {AUTO_POOL!r} and serves it at"
            " the pool's own size; to choose the size, name the pool, as in math@8"
        )
    if AUTO_POOL in pools_of(name):
        raise RequestError(
            f"{AUTO_POOL!r} is no pool: the server chooses one for it, alone and not in a union,"
            " from the text of a prompt to /v1/completions, /v1/chat/completions, /v1/responses,"
            " /v1/messages or /invocations; elsewhere name a pool"
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

        `model` is the request's model name: the base's, a pool, a size, a union, or one of these
        after `base:`; None or "" is the base's. `headers` are the values of x-emo-pool, usually
        none or one. Raises RequestError for a malformed header, PoolConflict when two of them name
        different pools.
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

    def spellings(self, name: str) -> tuple[str, ...]:
        """Return the model names by which requests ask for a pool or union, its own name first.

        `choose` makes each of them this name again. A union may be joined in any order; beyond
        _ORDERED pools only the canonical order is named, because there are too many others.
        """
        parts = split_name(name)
        orders = permutations(parts) if len(parts) <= _ORDERED else [parts]
        own = dict.fromkeys([name, *map(UNION.join, orders)])
        prefixed = [f"{base}:{way}" for base in self.base for way in own]
        is_default = canonical_name(name) == canonical_name(self.default_pool)
        return (*own, *prefixed, *(self.base if is_default else ()))

    def _pool_part(self, model: str | None) -> str | None:
        if not model or model in self.base:
            return None
        for base in self.base:
            if model.startswith(f"{base}:"):
                return model.removeprefix(f"{base}:")
        return model


def _checked_header(value: str) -> str:
    name = value.strip()
    if not is_pool_or_union(name):
        raise RequestError(f"{POOL_HEADER} is {value!r}; expected a pool's name, {REQUEST_RULE}")
    return name
