"""The pools of a directory, by name. A bad file is left out; the other pools are served.

The catalog knows which pools there are, which files were refused and why, and what a name such as
"math", "math@8" or "math+code" stands for. A file may be called anything that ends in .json, in
small letters or capitals; only the name inside it counts. Two files with the same name inside are
both refused: which one is served must not depend on the order of a directory.

It changes at run time in three steps, so that files can be written beside an event loop:

    change = catalog.plan_add(pool, replace=True)   # or plan_remove(name); decides, changes nothing
    change.write()                                  # the file, atomically; may be slow
    catalog.commit(change)                          # memory; cannot fail

So a failed write changes nothing, and what is in memory is also in the file. Without a directory to
write to (`persists` is false) a change lasts as long as the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from emo_serve.errors import (
    ConfigError,
    PoolExists,
    PoolFileError,
    PoolStoreError,
    StateConflict,
)
from emo_serve.facts import MoeLayer
from emo_serve.names import canonical_name, check_pool_name
from emo_serve.pools.derived import DerivedPools, derive, unknown_definition
from emo_serve.pools.document import read_pool, write_pool
from emo_serve.pools.pool import ExpertPool
from emo_serve.pools.sizes import served_pool
from emo_serve.pools.strict_json import place_of

__all__ = ["CatalogChange", "PoolCatalog"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogChange:
    """A pool to define, redefine or (`pool` is None) remove; valid until the catalog changes.

    `written` is the pool as it was given, `pool` what is served: completed for the model.
    """

    name: str
    pool: ExpertPool | None
    written: ExpertPool | None
    file: Path | None
    revision: int

    def write(self) -> None:
        """Write or remove the pool's file, if it has one; raises PoolStoreError."""
        if self.file is None:
            return
        try:
            if self.written is not None:
                write_pool(self.written, self.file)
            else:
                self.file.unlink(missing_ok=True)
        except PoolFileError as error:
            raise PoolStoreError(f"pool {self.name!r} is not stored: {error}") from error
        except OSError as error:
            reason = error.strerror or error
            raise PoolStoreError(
                f"pool {self.name!r} is not removed: {self.file} cannot be deleted: {reason}"
            ) from error


class PoolCatalog:
    """Hold the pools of one model, sorted by name; `refused` says which files were left out.

    With `moe_layers` every pool added later is checked against the model, completed, and served at
    its default size, which is `default_experts` for pools with scores that have none of their own.
    """

    def __init__(
        self,
        pools: Sequence[ExpertPool] = (),
        moe_layers: Sequence[MoeLayer | None] | None = None,
        fingerprint: str | None = None,
        default_experts: int | None = None,
    ) -> None:
        self.moe_layers = moe_layers
        self.fingerprint = fingerprint
        self._default_experts = default_experts
        self.pools: Mapping[str, ExpertPool] = MappingProxyType({})
        self._directory: Path | None = None
        self._files: dict[str, Path] = {}  # of pools that survive a restart
        self._refused: dict[Path, PoolFileError] = {}
        self._contested: dict[str, list[Path]] = {}  # names that several files carry
        self._versions: dict[str, int] = {}
        self._revision = 0
        self._derived = DerivedPools(moe_layers)
        for pool in pools:
            assert pool.name not in self.pools, "names are unique"
            self._set(pool.name, pool)

    @classmethod
    def read(
        cls,
        path: Path,
        moe_layers: Sequence[MoeLayer | None] | None = None,
        fingerprint: str | None = None,
        *,
        default_experts: int | None = None,
        persists: bool = False,
        check_free: Callable[[Sequence[str]], None] = lambda names: None,
    ) -> PoolCatalog:
        """Read every *.json of a directory, in small letters or capitals, or the file `path`.

        With `moe_layers` each pool is checked against the model, completed with the experts the
        model implies and cut to its default size; without, it is only checked against itself.
        Refused files are reported, never raised; so is a pool whose name `check_free` refuses with
        a ConfigError. With `persists` later changes are written to the directory, where that can be
        written. Raises ConfigError when there is no such directory or file.
        """
        catalog = cls((), moe_layers, fingerprint, default_experts)
        read: dict[Path, ExpertPool] = {}
        for file in _pool_files(path):
            try:
                _check_readable(file)
                pool = catalog._fitted(read_pool(file), place_of(file))
                _check_free(pool.name, file, check_free)
                read[file] = pool
            except PoolFileError as error:
                catalog._refused[file] = error
        files_of: dict[str, list[Path]] = {}
        for file, pool in read.items():
            files_of.setdefault(pool.name, []).append(file)
        for name, files in files_of.items():
            if len(files) == 1:
                catalog._set(name, read[files[0]])
                catalog._files[name] = files[0]
            else:
                catalog._contest(name, files)
        if persists and path.is_dir():
            catalog._persist_in(path)
        return catalog

    # -- questions --

    @property
    def persists(self) -> bool:
        """Tell whether pools added and removed at run time survive a restart."""
        return self._directory is not None

    @property
    def refused(self) -> tuple[PoolFileError, ...]:
        """Return why each refused file was left out."""
        return tuple(self._refused.values())

    @property
    def revision(self) -> int:
        """Return a number that grows with every change."""
        return self._revision

    def version(self, name: str) -> int:
        """Return how often a pool of that name was defined since the start, 0 if never."""
        return self._versions.get(name, 0)

    def is_stored(self, name: str) -> bool:
        """Tell whether this definition survives a restart."""
        return name in self._files

    def resolve(self, name: str) -> ExpertPool:
        """Return the pool, size or union of that name, in whatever order it is written.

        `math@8` has the 8 best experts per layer of `math`. Equal unions are one object. Raises
        UnknownPool naming the pools or sizes there are, and RequestError for a union of pools that
        are routed at different temperatures.
        """
        return self._derived.resolve(name, self.pools)

    def resolve_with(self, name: str, pool: ExpertPool) -> ExpertPool:
        """Return what `resolve` would if `pool`, as a change has it, were defined."""
        return derive(canonical_name(name), {**self.pools, pool.name: pool}, self.moe_layers)

    # -- changes --

    def plan_add(self, pool: ExpertPool, *, replace: bool = False) -> CatalogChange:
        """Decide how to define a pool, or with `replace` to define it anew.

        Raises PoolFileError for a pool that does not fit the model, PoolExists for a name (or a
        refused file of that name) that only `replace` may take, StateConflict for one it may not.
        """
        name = check_pool_name(f"pool {pool.name[:80]!r}", pool.name)
        fitted = self._fitted(pool, f"pool {name!r}")
        if name in self.pools and not replace:
            raise PoolExists(f"pool {name!r} is defined already; give replace=true to redefine it")
        file = self._file_for(name, replace=replace) if self._directory else None
        return CatalogChange(name, fitted, pool, file, self._revision)

    def plan_remove(self, name: str) -> CatalogChange:
        """Decide how to forget a pool; raises UnknownPool."""
        if name not in self.pools:
            raise unknown_definition(name, self.pools)
        file = self._files.get(name) if self._directory else None
        return CatalogChange(name, None, None, file, self._revision)

    def commit(self, change: CatalogChange) -> None:
        """Take a written change into memory; nothing else may have changed since its plan."""
        assert change.revision == self._revision, "the catalog changed since the plan was made"
        self._set(change.name, change.pool)
        self._files.pop(change.name, None)
        if change.file is not None:
            self._refused.pop(change.file, None)
            if change.pool is not None:
                self._files[change.name] = change.file

    def add(self, pool: ExpertPool, *, replace: bool = False) -> None:
        """Define a pool, file first; raises as `plan_add` does, and PoolStoreError."""
        change = self.plan_add(pool, replace=replace)
        change.write()
        self.commit(change)

    def remove(self, name: str) -> None:
        """Forget a pool, file first; raises UnknownPool and PoolStoreError."""
        change = self.plan_remove(name)
        change.write()
        self.commit(change)

    # -- parts --

    def _set(self, name: str, pool: ExpertPool | None) -> None:
        """Define or forget one name; readers hold the old mapping or the new one."""
        pools = {key: held for key, held in self.pools.items() if key != name}
        if pool is not None:
            pools[name] = pool
            self._versions[name] = self.version(name) + 1
        self.pools = MappingProxyType(dict(sorted(pools.items())))
        self._revision += 1
        self._derived.forget(name)

    def _fitted(self, pool: ExpertPool, source: str) -> ExpertPool:
        if self.moe_layers is None:
            return pool
        pool.check_fits(self.moe_layers, self.fingerprint, source)
        return served_pool(pool, self.moe_layers, source, self._default_experts)

    def _contest(self, name: str, files: Sequence[Path]) -> None:
        self._contested[name] = list(files)
        for file in files:
            others = ", ".join(place_of(other) for other in files if other != file)
            self._refused[file] = PoolFileError(
                f"{place_of(file)}: name is {name!r}; expected a name that no other file has:"
                f" {others}"
            )

    def _persist_in(self, directory: Path) -> None:
        if os.access(directory, os.W_OK | os.X_OK):
            self._directory = directory
        else:
            logger.warning(
                "%s cannot be written: changes to pools will not survive a restart", directory
            )

    def _file_for(self, name: str, *, replace: bool) -> Path:
        """Return the file to write a pool to: its own, or one that no other pool uses."""
        assert self._directory is not None
        if name in self._files:
            return self._files[name]
        contested = [file.name for file in self._contested.get(name, ()) if os.path.lexists(file)]
        if contested:
            raise StateConflict(
                f"pool {name!r} cannot be stored: {', '.join(contested)} have its name inside"
                " and are refused; remove them first"
            )
        file = self._directory / f"{name}.json"
        owner = next((owner for owner, theirs in self._files.items() if theirs == file), None)
        if owner is not None:
            raise StateConflict(
                f"pool {name!r} cannot be stored: {file.name} holds pool {owner!r}; rename the file"
                " and restart"
            )
        if not replace and os.path.lexists(file):
            raise PoolExists(
                f"{file.name} exists but is not served; give replace=true to overwrite it"
            )
        return file


def _check_free(name: str, file: Path, check_free: Callable[[Sequence[str]], None]) -> None:
    try:
        check_free((name,))
    except ConfigError as error:
        raise PoolFileError(f"{place_of(file)}: {error}") from None


def _check_readable(file: Path) -> None:
    """Refuse pipes and devices, which a read could wait for without end."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise PoolFileError(f"{place_of(file)}: is a pipe or a device; expected a file")


def _pool_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; expected a directory of pool files")
    try:
        found = list(path.iterdir())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return sorted(
        file for file in found if file.suffix.lower() == ".json" and not file.name.startswith(".")
    )
