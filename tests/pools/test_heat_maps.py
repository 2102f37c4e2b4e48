"""The pictures are PNGs of a sensible size, and they show what they are drawn from."""

from __future__ import annotations

import builtins
import io
from typing import Any

import pytest

from emo_serve.errors import ConfigError
from emo_serve.pools.comparison import PoolComparison
from emo_serve.pools.heat_maps import comparison_png
from emo_serve.pools.pool import ExpertPool, LayerExperts

image = pytest.importorskip("matplotlib.image", reason="pictures need the extra `plot`")


def compared(*kept: tuple[int, ...], layers: int = 2) -> PoolComparison:
    pools = [ExpertPool(f"pool-{i}", (LayerExperts(ids),) * layers) for i, ids in enumerate(kept)]
    return PoolComparison(pools)


def pixels(png: bytes) -> Any:
    return image.imread(io.BytesIO(png), format="png")


def test_it_is_a_png_whose_size_follows_the_pools() -> None:
    small = comparison_png(compared((0, 1), (1, 2)))
    large = comparison_png(compared(*((i, i + 1) for i in range(12)), layers=16))
    assert small.startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = pixels(small).shape
    assert 400 < height < width < 1600
    assert pixels(large).shape[0] > height
    assert pixels(large).shape[1] > width


def test_any_number_of_pools_gives_a_picture_of_bounded_size() -> None:
    assert pixels(comparison_png(compared((0, 1)))).shape[1] > 400
    many = pixels(comparison_png(compared(*((i % 9, 9) for i in range(120)))))
    assert max(many.shape) < 6000


def test_the_same_pools_give_the_same_picture_and_others_another() -> None:
    first = pixels(comparison_png(compared((0, 1), (1, 2))))
    assert (first == pixels(comparison_png(compared((0, 1), (1, 2))))).all()
    other = pixels(comparison_png(compared((0, 1), (0, 1))))
    assert other.shape == first.shape
    assert (other != first).any(axis=-1).mean() > 0.01  # cells, not a digit


def test_more_alike_is_brighter() -> None:
    """The colour map goes from dark to bright; all cells of one picture against the other's."""
    alike = pixels(comparison_png(compared((0, 1), (0, 1))))[..., :3].mean()
    apart = pixels(comparison_png(compared((0, 1), (2, 3))))[..., :3].mean()
    assert alike > apart + 0.01


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'emo-serve\[plot\]'"):
        comparison_png(compared((0, 1), (1, 2)))
