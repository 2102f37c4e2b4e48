"""The pools of a directory, by name. One bad file costs its own pool and no other.

The catalog is read once and then only answers: which pools there are, which files were refused and
why, and what a name such as "math" or "math+code" stands for. A file may be called anything that
ends in .json; the name inside counts. Two files with one name are both refused, for which of them
is served must not hang on the order of a directory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from emo_serve.errors import ConfigError, PoolFileError, UnknownPool
from emo_serve.pools.pool import UNION, ExpertPool

if TYPE_CHECKING:
    from emo_serve.emo.config import MoeLayer

__all__ = ["PoolCatalog"]

# Clients choose which unions exist; what they make us remember is bounded.
_MAX_CACHED_UNIONS = 1024


class PoolCatalog:
    """Hold the pools of one model, sorted by name; `refused` says which files were left out."""

    def __init__(
        self, pools: Sequence[ExpertPool] = (), refused: Sequence[PoolFileError] = ()
    ) -> None:
        by_name = {pool.name: pool for pool in sorted(pools, key=lambda pool: pool.name)}
        assert len(by_name) == len(pools), "names are unique"
        self.pools: Mapping[str, ExpertPool] = MappingProxyType(by_name)
        self.refused = tuple(refused)
        self._unions: OrderedDict[str, ExpertPool] = OrderedDict()

    @classmethod
    def read(
        cls,
        path: Path,
        moe_layers: Sequence[MoeLayer | None] | None = None,
        fingerprint: str | None = None,
    ) -> PoolCatalog:
        """Read every *.json of a directory, or the one file that `path` is.

        With `moe_layers` each pool is checked against the model and completed with the experts the
        model implies; without, it is only checked against itself. Refused files are reported, never
        raised. Raises ConfigError when there is no such directory or file.
        """
        read: dict[Path, ExpertPool] = {}
        refused: list[PoolFileError] = []
        for file in _pool_files(path):
            try:
                pool = ExpertPool.read(file)
                if moe_layers is not None:
                    pool.check_fits(moe_layers, fingerprint, str(file))
                    pool = pool.complete(moe_layers)
                read[file] = pool
            except PoolFileError as error:
                refused.append(error)
        files_of: dict[str, list[Path]] = {}
        for file, pool in read.items():
            files_of.setdefault(pool.name, []).append(file)
        for name, files in files_of.items():
            for file in files if len(files) > 1 else ():
                others = ", ".join(str(other) for other in files if other != file)
                refused.append(
                    PoolFileError(
                        f"{file}: name is {name!r}; expected one no other file has: {others}"
                    )
                )
        return cls([read[files[0]] for files in files_of.values() if len(files) == 1], refused)

    def resolve(self, name: str) -> ExpertPool:
        """Return the pool of that name, or the union "a+b+..." in whatever order it is written.

        Equal unions are one object. Raises UnknownPool naming the pools there are, and RequestError
        for a union of pools that are routed at different temperatures.
        """
        parts = sorted(set(name.split(UNION)))
        for part in parts:
            if part not in self.pools:
                there_are = ", ".join(self.pools) or "none"
                raise UnknownPool(f"there is no pool {part[:80]!r}; the pools are: {there_are}")
        canonical = UNION.join(parts)
        if len(parts) == 1:
            return self.pools[canonical]
        if canonical not in self._unions:
            united = reduce(ExpertPool.union, (self.pools[part] for part in parts))
            self._unions[canonical] = united
            if len(self._unions) > _MAX_CACHED_UNIONS:
                self._unions.popitem(last=False)
        self._unions.move_to_end(canonical)
        return self._unions[canonical]


def _pool_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; expected a directory of pool files")
    return sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
