"""The pools and sizes that flags name: that they exist, and what they are."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from emo_serve.checkpoints.checkpoint import ModelCheckpoint
from emo_serve.config import ServeSettings
from emo_serve.errors import ConfigError, RequestError
from emo_serve.names import BASE_POOL, pools_of, split_name
from emo_serve.pools.catalog import PoolCatalog
from emo_serve.pools.pool import ExpertPool
from emo_serve.spelling import did_you_mean

__all__ = [
    "check_default_experts",
    "check_names",
    "named_pool",
    "note_sizeless",
    "single_names",
]

logger = logging.getLogger(__name__)


def check_default_experts(settings: ServeSettings, checkpoint: ModelCheckpoint) -> None:
    """Raise ConfigError for a default size that no pool of this model can have."""
    k = settings.default_experts
    if k is None:
        return
    layers = [layer for layer in checkpoint.facts.moe_layers if layer is not None]
    least = max(1, *(len(layer.implied) for layer in layers))
    most = max(layer.num_experts for layer in layers)
    if not least <= k <= most:
        raise ConfigError(
            f"--default-experts is {k}; give a number from {least}, the experts that every pool"
            f" has, to {most}, all experts of a layer"
        )


def note_sizeless(settings: ServeSettings, catalog: PoolCatalog) -> None:
    """Log which pools --default-experts cannot cut."""
    names = ", ".join(name for name, pool in catalog.pools.items() if not pool.has_scores)
    if settings.default_experts is not None and names:
        logger.warning(
            "--default-experts does not apply to pools without scores, which keep the experts of"
            " their files: %s",
            names,
        )


def check_names(settings: ServeSettings, catalog: PoolCatalog, base_pool: ExpertPool) -> None:
    """Raise ConfigError for a pool or size that a flag names and that does not exist."""
    known = {**catalog.pools, base_pool.name: base_pool}
    for flag, asked in (
        ("--pin", settings.pin),
        ("--preload", settings.preload or ()),
        ("--default-pool", [settings.default_pool or BASE_POOL]),
    ):
        for name in single_names(asked):
            if pools_of(name)[0] not in known:
                names = ", ".join(known)
                meant = did_you_mean(pools_of(name)[0], known)
                raise ConfigError(
                    f"{flag}: there is no pool {name!r}{meant}; the pools are: {names}"
                )
        for name in asked:
            try:
                named_pool(name, catalog, base_pool)
            except ConfigError as error:
                raise ConfigError(f"{flag}: {error}") from error


def named_pool(name: str, catalog: PoolCatalog, base_pool: ExpertPool) -> ExpertPool:
    """Return a pool named on the command line, after its names were checked."""
    if base_pool.name in split_name(name):
        return base_pool  # a union with it holds nothing more
    try:
        return catalog.resolve(name)
    except RequestError as error:
        raise ConfigError(str(error)) from error


def single_names(names: Iterable[str]) -> list[str]:
    """Return the pools and sizes that names join, each by itself."""
    return [part for name in names for part in split_name(name)]
