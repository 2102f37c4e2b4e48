"""What a request asks of a cluster: a pool by its one spelling, or nothing in particular.

A router sees a request before any server has. So it reads names as a server does, but refuses
nothing: whatever a server would refuse, any server may refuse.

    model and headers               what is asked
    a pool, base:pool               the pool
    a@8, base:a@8                   the pool at a size
    a+b, b+a                        the union a+b
    the model's name, or none       the default pool, which is the base pool unless told otherwise
    base, a+base                    the base pool
    auto                            anything: the server that gets it chooses the pool
    an unknown name                 anything: any server answers 404
    contradictions, malformed names anything: any server answers 400
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from emo_serve.errors import RequestError
from emo_serve.names import (
    AUTO_POOL,
    BASE_POOL,
    ModelNames,
    is_pool_or_union,
    pools_of,
    split_name,
)

__all__ = ["ANYTHING", "Asked", "read_asked"]


@dataclass(frozen=True)
class Asked:
    """What a request is for: a pool, size or union, and the names it joins; empty for anything."""

    name: str
    parts: tuple[str, ...]

    @property
    def is_anything(self) -> bool:
        """Tell whether all servers are equally good for it, but for their load."""
        return not self.parts


ANYTHING = Asked("", ())


def read_asked(
    names: ModelNames,
    pools: Collection[str] | None,
    model: object,
    headers: Sequence[str] = (),
) -> Asked:
    """Read the `model` of a request's body, None if it has none, and its x-emo-pool headers.

    `pools` are the names of the pools that exist, without the base pool; None if that is not known,
    and then every name that could be a pool's counts as one.
    """
    if not (model is None or isinstance(model, str)):
        return ANYTHING
    try:
        name = names.choose(model, headers)
    except RequestError:
        return ANYTHING
    parts, joined = split_name(name), pools_of(name)
    if AUTO_POOL in joined or not is_pool_or_union(name):  # no union has `auto` in it
        return ANYTHING
    exists = pools is None or all(pool == BASE_POOL or pool in pools for pool in joined)
    has_base = BASE_POOL in parts
    if not exists or (BASE_POOL in joined and not has_base):  # base@8: it has one size
        return ANYTHING
    if has_base:  # it has all experts of the others
        return Asked(BASE_POOL, (BASE_POOL,))
    return Asked(name, parts)
