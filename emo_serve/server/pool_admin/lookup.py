"""Find the pool a request means: the base pool, a pool, a size or a union, by name and headers."""

from __future__ import annotations

from collections.abc import Sequence

from emo_serve.errors import RequestError, UnknownPool
from emo_serve.names import (
    BASE_POOL,
    ModelNames,
    check_chosen,
    join_names,
    split_name,
    split_size,
    with_size,
)
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool

__all__ = ["PoolLookup"]


class PoolLookup:
    """Find pools by name, as the catalog has them now.

    Raises ConfigError for a pool named like the model, UnknownPool for an undefined default pool.
    """

    def __init__(self, names: ModelNames, base_pool: ExpertPool, catalog: PoolCatalog) -> None:
        names.check_free(tuple(catalog.pools))
        self.names = names
        self.base_pool = base_pool
        self._catalog = catalog
        self.find(None)  # raises unless the default pool exists

    @property
    def named(self) -> tuple[ExpertPool, ...]:
        """Return the catalog's pools, ordered by name."""
        return tuple(self._catalog.pools.values())

    @property
    def pools(self) -> tuple[ExpertPool, ...]:
        """Return the base pool, then the catalog's ordered by name; no sizes and unions."""
        return (self.base_pool, *self.named)

    def find(
        self, model: str | None, headers: Sequence[str] = (), *, experts: int | None = None
    ) -> ExpertPool:
        """Return the pool a request asks for, resident or not; with `experts`, at that size.

        Raises RequestError: PoolConflict, or UnknownPool, which names the pools or sizes there are.
        """
        name = self.names.choose(model, headers)
        check_chosen(name)
        if experts is not None:
            name = with_size(name, experts)
        others = [part for part in split_name(name) if part != BASE_POOL]
        if sized := next((part for part in others if split_size(part)[0] == BASE_POOL), None):
            raise self.explained(
                UnknownPool(
                    f"there is no pool {sized!r}: the base pool has all experts, and no other size"
                )
            )
        found = self._resolve(join_names(others)) if others else self.base_pool
        # A union with the base pool is the base pool, which holds all experts of the others.
        return self.base_pool if BASE_POOL in split_name(name) else found

    def known(self, name: str) -> ExpertPool | None:
        """Return the pool, size or union of that name; None if it is no longer defined."""
        try:
            return self.find(name)
        except RequestError:
            return None

    def explained(self, error: UnknownPool) -> UnknownPool:
        """Return the error with the model's own name added, which is always served."""
        return UnknownPool(f"{error}; the model itself is {self.names.base[0]!r}")

    def _resolve(self, name: str) -> ExpertPool:
        try:
            return self._catalog.resolve(name)
        except UnknownPool as error:
            raise self.explained(error) from None
