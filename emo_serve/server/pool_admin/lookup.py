"""Which pool a request means: from a model name and headers to the base pool, a pool or a union."""

from __future__ import annotations

from collections.abc import Sequence

from emo_serve.errors import RequestError, UnknownPool
from emo_serve.names import (
    BASE_POOL,
    ModelNames,
    check_chosen,
    join_names,
    split_name,
)
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool

__all__ = ["PoolLookup"]


class PoolLookup:
    """Find pools by name, as the catalog knows them now; raises where the names are not free."""

    def __init__(self, names: ModelNames, base_pool: ExpertPool, catalog: PoolCatalog) -> None:
        names.check_free(tuple(catalog.pools))
        self.names = names
        self.base_pool = base_pool
        self._catalog = catalog
        self.find(None)  # the default pool exists

    @property
    def named(self) -> tuple[ExpertPool, ...]:
        """Return the catalog's pools in order of name."""
        return tuple(self._catalog.pools.values())

    @property
    def pools(self) -> tuple[ExpertPool, ...]:
        """Return the base pool and then the catalog's, in order of name; no unions."""
        return (self.base_pool, *self.named)

    def find(self, model: str | None, headers: Sequence[str] = ()) -> ExpertPool:
        """Return the pool a request asks for, resident or not.

        Raises RequestError (PoolConflict, UnknownPool naming what exists).
        """
        name = self.names.choose(model, headers)
        check_chosen(name)
        others = [part for part in split_name(name) if part != BASE_POOL]
        found = self._resolve(join_names(others)) if others else self.base_pool
        # A union with the base pool is the base pool: it holds every expert of the others.
        return self.base_pool if BASE_POOL in split_name(name) else found

    def known(self, name: str) -> ExpertPool | None:
        """Return the pool or union of that name; None if it is not defined any more."""
        try:
            return self.find(name)
        except RequestError:
            return None

    def explained(self, error: UnknownPool) -> UnknownPool:
        """Return the error with the model's own name, which serves the default pool."""
        return UnknownPool(f"{error}; the model itself is {self.names.base[0]!r}")

    def _resolve(self, name: str) -> ExpertPool:
        try:
            return self._catalog.resolve(name)
        except UnknownPool as error:
            raise self.explained(error) from None
